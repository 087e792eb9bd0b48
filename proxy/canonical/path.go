package canonical

import (
	"strings"
	"unicode/utf8"
)

// Path returns the canonical form of an absolute path, which has no query.
//
// The result holds only what RFC 3986, section 3.3, allows in a path, without
// semicolon; it is never longer than raw. The error is an [*Error].
func Path(raw string, o Options) (string, error) {
	switch {
	case len(raw) > MaxTarget:
		return "", refuse(PartPath, TooLong, "", 0)
	case raw == "":
		return "", refuse(PartPath, Empty, "", 0)
	case raw[0] != '/':
		return "", refuse(PartPath, NotAbsolute, raw, 0)
	}
	plain, settled := scan(raw)
	if settled {
		return raw, nil
	}
	s := raw
	if plain < len(raw) {
		var reason Reason
		var at int
		if s, reason, at = spell(raw, plain, o.EncodedSlash); reason != none {
			return "", refuse(PartPath, reason, raw, at)
		}
	}
	if reason, at := checkSegments(s, plain < len(raw), o); reason != none {
		return "", refuse(PartPath, reason, s, at)
	}
	return s, nil
}

// PatternSegment returns the canonical form of one segment of a path as a
// person writes it into a rule: like Path, and what is not ASCII is
// percent-encoded, as it is in requests. An encoded slash may stand in it: on
// a listener that allows it, a request has one. Whether the segment may be
// empty is for the caller to say. The error is an [*Error].
func PatternSegment(raw string) (string, error) {
	if len(raw) > MaxTarget {
		return "", refuse(PartPath, TooLong, "", 0)
	}
	if at := strings.IndexByte(raw, '/'); at >= 0 {
		return "", refuse(PartPath, Character, raw, at)
	}
	if !utf8.ValidString(raw) {
		return "", refuse(PartPath, NotUTF8, raw, 0)
	}
	escaped := escapeNonASCII(raw)
	if len(escaped) > MaxTarget {
		return "", refuse(PartPath, TooLong, "", 0)
	}
	s, reason, at := spell(escaped, 0, true)
	if reason != none {
		return "", refuse(PartPath, reason, escaped, at)
	}
	if reason, at = checkSegment(s, true); reason != none {
		return "", refuse(PartPath, reason, s, at)
	}
	return s, nil
}

func escapeNonASCII(s string) string {
	first := 0
	for first < len(s) && s[first] < utf8.RuneSelf {
		first++
	}
	if first == len(s) {
		return s
	}
	out := append(make([]byte, 0, 3*len(s)), s[:first]...)
	for i := first; i < len(s); i++ {
		if s[i] < utf8.RuneSelf {
			out = append(out, s[i])
		} else {
			out = appendEscape(out, s[i])
		}
	}
	return string(out)
}

// rawPath is why a byte may not stand in a path as it is; none where it may
// (RFC 3986, section 3.3: pchar and the slash).
var rawPath = func() (t [256]Reason) {
	for b := range t {
		switch {
		case b < ' ' || b == 0x7f:
			t[b] = Control
		case b > 0x7f:
			t[b] = NotASCII
		case !isAlphanumeric(byte(b)) && !strings.ContainsRune("-._~!$&'()*+,=:@/", rune(b)):
			t[b] = Character
		}
	}
	t[' '], t['#'], t['?'], t['\\'], t[';'] = Space, Fragment, QueryMark, Backslash, Parameter
	t['%'] = BadEscape
	return t
}()

func isAlphanumeric(b byte) bool {
	return '0' <= b && b <= '9' || 'a' <= b|0x20 && b|0x20 <= 'z'
}

// scan returns how many bytes at the start of a path stand for themselves, and
// whether that settles it: they are all, and no segment is empty or begins
// with a dot. That is so of nearly every path, which needs no second look.
func scan(s string) (plain int, settled bool) {
	slashes, odd := 0, false
	for i := range len(s) {
		c := s[i]
		if rawPath[c] != none {
			return i, false
		}
		if c == '/' {
			slashes++
			odd = odd || i+1 < len(s) && (s[i+1] == '/' || s[i+1] == '.')
		}
	}
	return len(s), !odd && slashes <= MaxSegments
}

// spell returns s with every escape in its one spelling. The first plain bytes
// need none. Nothing is copied before the first byte that changes.
func spell(s string, plain int, encodedSlash bool) (string, Reason, int) {
	var out []byte // s[:i] respelled; nil while that is s[:i]
	for i := plain; i < len(s); {
		size, same := 1, true
		c := s[i]
		if reason := rawPath[c]; reason != none && c != '%' {
			return "", reason, i
		}
		if c == '%' {
			var ok bool
			if c, ok = unescape(s[i:]); !ok {
				return "", BadEscape, i
			}
			if reason := checkEscaped(c, encodedSlash); reason != none {
				return "", reason, i
			}
			size, same = 3, keeps(c) && isUpperHex(s[i+1]) && isUpperHex(s[i+2])
		}
		if !same && out == nil {
			out = append(make([]byte, 0, len(s)), s[:i]...)
		}
		switch {
		case out == nil:
		case size == 3 && keeps(c):
			out = appendEscape(out, c)
		default:
			out = append(out, c)
		}
		i += size
	}
	if out == nil {
		return s, none, 0
	}
	return string(out), none, 0
}

// keeps reports whether an escaped byte stays escaped: what may not stand in a
// path otherwise, and the slash, which would be another one.
func keeps(b byte) bool { return b == '/' || rawPath[b] != none }

// checkEscaped says why a byte may not even be escaped.
func checkEscaped(b byte, encodedSlash bool) Reason {
	switch {
	case b < ' ' || b == 0x7f:
		return Control
	case b == '\\':
		return Backslash
	case b == ';':
		return Parameter
	case b == '/' && !encodedSlash:
		return EncodedSlash
	}
	return none
}

// unescape returns the byte of the escape at the start of s.
func unescape(s string) (byte, bool) {
	if len(s) < 3 || s[0] != '%' || !isHex(s[1]) || !isHex(s[2]) {
		return 0, false
	}
	return unhex(s[1])<<4 | unhex(s[2]), true
}

func isHex(b byte) bool { return '0' <= b && b <= '9' || 'a' <= b|0x20 && b|0x20 <= 'f' }

func isUpperHex(b byte) bool { return isHex(b) && b < 'a' }

func unhex(b byte) byte {
	if b <= '9' {
		return b - '0'
	}
	return b | 0x20 - 'a' + 10
}

func appendEscape(out []byte, b byte) []byte {
	const hex = "0123456789ABCDEF"
	return append(out, '%', hex[b>>4], hex[b&0xf])
}
