package canonical

import "strings"

// HeaderName returns the name of a field in lower case. It must be a token
// (RFC 9110, section 5.6.2): no colon, so that :path is none, and no white
// space. The error is an [*Error].
func HeaderName(raw string) (string, error) {
	switch {
	case raw == "":
		return "", refuse(PartHeaderName, Empty, "", 0)
	case len(raw) > MaxHeaderName:
		return "", refuse(PartHeaderName, TooLong, "", 0)
	}
	upper := false
	for i := range len(raw) {
		kind := tokenBytes[raw[i]]
		if kind == notToken {
			return "", refuse(PartHeaderName, NotToken, raw, i)
		}
		upper = upper || kind == tokenUpper
	}
	if upper {
		return lower(raw), nil
	}
	return raw, nil
}

const (
	notToken = iota
	token
	tokenUpper
)

var tokenBytes = func() (t [256]uint8) {
	for b := range t {
		switch {
		case 'A' <= b && b <= 'Z':
			t[b] = tokenUpper
		case isAlphanumeric(byte(b)) || b < 0x80 && strings.IndexByte("!#$%&'*+-.^_`|~", byte(b)) >= 0:
			t[b] = token
		}
	}
	return t
}()

// HeaderValue returns the value of a field line without the spaces and tabs
// around it (RFC 9110, section 5.5). It may be empty.
//
// Bytes from 0x80 on may stand in it: they are opaque (RFC 9110, section 5.5),
// real names and file names are sent so, and rules compare bytes. No field
// that says where a message ends is made of them; who reads those fields
// refuses them there. The error is an [*Error].
func HeaderValue(raw string) (string, error) {
	if len(raw) > MaxHeaderValue {
		return "", refuse(PartHeaderValue, TooLong, "", 0)
	}
	for i := range len(raw) {
		if b := raw[i]; b < ' ' && b != '\t' || b == 0x7f {
			return "", refuse(PartHeaderValue, Control, "", 0)
		}
	}
	start, end := 0, len(raw)
	for start < end && isBlank(raw[start]) {
		start++
	}
	for start < end && isBlank(raw[end-1]) {
		end--
	}
	return raw[start:end], nil
}

func isBlank(b byte) bool { return b == ' ' || b == '\t' }

// lower returns s with the letters of ASCII in lower case, and those alone.
func lower(s string) string {
	for i := range len(s) {
		if 'A' <= s[i] && s[i] <= 'Z' {
			out := []byte(s)
			for ; i < len(out); i++ {
				if 'A' <= out[i] && out[i] <= 'Z' {
					out[i] |= 0x20
				}
			}
			return string(out)
		}
	}
	return s
}

// IsToken reports whether a byte may stand in a token (RFC 9110, section
// 5.6.2).
func IsToken(b byte) bool { return tokenBytes[b] != notToken }
