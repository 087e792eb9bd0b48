package forwarded

import (
	"slices"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// pairs are the keys that Envoy writes, each in its only spelling.
var pairs = []string{"By", "Hash", "Cert", "Chain", "Subject", "URI", "DNS"}

// validXFCC reports whether b is one or more elements of x-forwarded-client-cert
// as Envoy writes them. What follows behind it is then an element of its own,
// whoever reads it: no quote is open, and no value goes on.
func validXFCC(b []byte) bool {
	for {
		rest, ok := element(b)
		switch {
		case !ok:
			return false
		case len(rest) == 0:
			return true
		}
		b = skipBlank(rest[1:]) // behind the comma
	}
}

// element reads key=value pairs up to a comma or the end.
func element(b []byte) (rest []byte, ok bool) {
	for {
		n := 0
		for n < len(b) && canonical.IsToken(b[n]) {
			n++
		}
		if n == len(b) || b[n] != '=' || !slices.Contains(pairs, string(b[:n])) {
			return nil, false
		}
		if b, ok = value(b[n+1:]); !ok {
			return nil, false
		}
		if len(b) == 0 || b[0] == ',' {
			return b, true
		}
		b = b[1:] // behind the semicolon
	}
}

// value reads a value, quoted or not, up to what parts it from the next. An
// empty one is none.
func value(b []byte) (rest []byte, ok bool) {
	if len(b) > 0 && b[0] == '"' {
		return quoted(b[1:])
	}
	n := 0
	for n < len(b) && b[n] != ',' && b[n] != ';' {
		if b[n] == '"' || b[n] == '\\' || b[n] <= ' ' || b[n] > '~' {
			return nil, false
		}
		n++
	}
	return b[n:], n > 0
}

// quoted reads up to the quote that ends a value. Envoy puts a backslash before
// quotes and leaves backslashes alone, so that to it \\" goes on where it ends
// the value to everybody else: two backslashes are refused.
func quoted(b []byte) (rest []byte, ok bool) {
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '\\':
			if i++; i < len(b) && b[i] == '\\' {
				return nil, false
			}
		case '"':
			rest = b[i+1:]
			return rest, len(rest) == 0 || rest[0] == ',' || rest[0] == ';'
		}
	}
	return nil, false
}

func skipBlank(b []byte) []byte {
	for len(b) > 0 && b[0] == ' ' {
		b = b[1:]
	}
	return b
}
