package proxy

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// This file bounds what strangers can make us write: a client that proved
// nothing chooses its server name and what stands in its certificates.

const (
	maxReason     = 512 // bytes of a reason in the access log and in the log
	maxServerName = 255 // of a host name (RFC 1035 §2.3.4)
)

// invalidServerName stands where a server name is none. A host name has no
// blank, so it is nobody's.
const invalidServerName = "invalid server name"

// hostName returns the server name of a handshake (RFC 6066 §3), or
// invalidServerName when it is too long or has bytes that no host name has.
func hostName(sni string) string {
	if len(sni) > maxServerName {
		return invalidServerName
	}
	for _, c := range []byte(sni) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		default:
			return invalidServerName
		}
	}
	return sni
}

// tidy makes a reason out of text that strangers may have a part in: bounded,
// on one line, and without what a terminal would obey.
func tidy(reason string) string {
	if len(reason) > maxReason {
		end := maxReason
		for !utf8.RuneStart(reason[end]) {
			end--
		}
		reason = reason[:end] + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, reason)
}
