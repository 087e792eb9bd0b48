package canonical

import (
	"strings"
	"unicode/utf8"
)

// checkSegments checks the segments of a path whose escapes have their one
// spelling. It returns what is wrong, and where.
func checkSegments(s string, escapes bool, o Options) (Reason, int) {
	segments := 0
	for start := 1; ; {
		if segments++; segments > MaxSegments {
			return TooManySegments, start
		}
		size := strings.IndexByte(s[start:], '/')
		last := size < 0
		if last {
			size = len(s) - start
		}
		if size == 0 && !last && !o.EmptySegments {
			return EmptySegment, start - 1
		}
		if reason, at := checkSegment(s[start:start+size], escapes); reason != none {
			return reason, start + at
		}
		if last {
			return none, 0
		}
		start += size + 1
	}
}

// checkSegment checks one segment. It is told whether there may be escapes in
// it.
func checkSegment(s string, escapes bool) (Reason, int) {
	switch {
	case s == "." || s == "..":
		return DotSegment, 0
	case escapes && strings.IndexByte(s, '%') >= 0:
		return checkEscapes(s)
	}
	return none, 0
}

// checkEscapes checks a segment with escapes as a service may see it that
// decodes it.
func checkEscapes(s string) (Reason, int) {
	// Of one piece between encoded slashes: Windows drops spaces at the end of
	// a name, and other software those at its start.
	dots, only, piece := 0, true, 0 // only: of nothing but dots and spaces
	for i := 0; i < len(s); {
		if s[i] != '%' {
			if s[i] == '.' {
				dots++
			} else {
				only = false
			}
			i++
			continue
		}
		size := 3
		switch b, _ := unescape(s[i:]); {
		case b == ' ':
		case b == '/':
			if isDotSegment(dots, only) {
				return DotSegment, piece
			}
			dots, only, piece = 0, true, i+3
		case b == '%' && isEscapeRest(s[i+3:]):
			return DoubleEncoding, i
		case b >= utf8.RuneSelf:
			var reason Reason
			if reason, size = checkRune(s[i:]); reason != none {
				return reason, i
			}
			only = false
		default:
			only = false
		}
		i += size
	}
	if isDotSegment(dots, only) {
		return DotSegment, piece
	}
	return none, 0
}

func isDotSegment(dots int, only bool) bool { return only && (dots == 1 || dots == 2) }

// isEscapeRest reports whether s would be the rest of an escape, if a percent
// sign stood before it: of RFC 3986, or %uXXXX, which IIS reads.
func isEscapeRest(s string) bool {
	if len(s) >= 2 && isHex(s[0]) && isHex(s[1]) {
		return true
	}
	return len(s) >= 5 && s[0]|0x20 == 'u' && isHex(s[1]) && isHex(s[2]) && isHex(s[3]) && isHex(s[4])
}

// checkRune checks the character whose escaped bytes s begins with. It returns
// how many bytes of s it takes.
func checkRune(s string) (Reason, int) {
	var bytes [utf8.UTFMax]byte
	n := 0
	for n < len(bytes) {
		b, ok := unescape(s[3*n:])
		if !ok {
			break
		}
		bytes[n] = b
		n++
	}
	r, size := utf8.DecodeRune(bytes[:n])
	switch {
	case r == utf8.RuneError && size <= 1:
		return NotUTF8, 3
	case r < 0xa0: // C1
		return Control, 3 * size
	case isLookalike(r):
		return Lookalike, 3 * size
	}
	return none, 3 * size
}

// isLookalike reports whether the character becomes one of / \ ; % or a whole
// dot segment under compatibility normalisation (Unicode Standard Annex 15,
// NFKC), or a slash or backslash in code pages of Windows, which have no
// fraction slash, division slash and set minus.
func isLookalike(r rune) bool {
	switch r {
	case 0x2100, 0x2101, 0x2105, 0x2106, 0xff0f, // a/c, a/s, c/o, c/u, /
		0x2044, 0x2215, // /
		0xfe68, 0xff3c, 0x2216, // \
		0x037e, 0xfe14, 0xfe54, 0xff1b, // ;
		0xfe6a, 0xff05, // %
		0x2024, 0x2025, 0xfe30, 0xfe52, 0xff0e: // . and ..
		return true
	}
	return false
}
