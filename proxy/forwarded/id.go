package forwarded

import (
	"crypto/rand"
	"encoding/hex"
	"sync"
)

const maxID = 128 // bytes of a request id

// validID reports whether a client's id can stand in a log, a header and an
// answer: visible ASCII without what parts or quotes.
func validID(id string) bool {
	for i := range len(id) {
		switch c := id[i]; {
		case c <= ' ' || c > '~', c == '"', c == ',', c == ';', c == '\\':
			return false
		}
	}
	return id != "" && len(id) <= maxID
}

// randomness is bytes of crypto/rand that were not used yet. Nobody is to guess
// the ids of others' requests.
type randomness struct {
	bytes [1024]byte
	used  int
}

var randoms = sync.Pool{New: func() any { return &randomness{used: len(randomness{}.bytes)} }}

// NewID appends an id as those that requests are given, for one that was not
// read. It is a view of what it appends to.
func NewID(dst []byte) (id string, notes []byte) { return appendUUID(dst) }

// appendUUID appends a random UUID (RFC 9562, section 5.4), which it returns too.
func appendUUID(dst []byte) (string, []byte) {
	const size = 16
	r := randoms.Get().(*randomness)
	if r.used > len(r.bytes)-size {
		_, _ = rand.Read(r.bytes[:]) // never fails (crypto/rand)
		r.used = 0
	}
	var u [size]byte
	copy(u[:], r.bytes[r.used:])
	clear(r.bytes[r.used : r.used+size])
	r.used += size
	randoms.Put(r)
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	start := len(dst)
	for i, n := range [...]int{0, 4, 6, 8, 10, size} {
		if i == 0 {
			continue
		}
		from := [...]int{0, 4, 6, 8, 10}[i-1]
		if from > 0 {
			dst = append(dst, '-')
		}
		dst = hex.AppendEncode(dst, u[from:n])
	}
	return view(dst[start:]), dst
}

// validTrace reports whether a traceparent is one (W3C Trace Context, section
// 3.2): of version 00 exactly, of a later one at least as long.
func validTrace(s string) bool {
	const (
		size    = len("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
		traceAt = 3
		spanAt  = 36
		flagsAt = 53
	)
	if len(s) < size || s[2] != '-' || s[spanAt-1] != '-' || s[flagsAt-1] != '-' {
		return false
	}
	if !isHex(s[:2]) || s[:2] == "ff" || s[:2] == "00" && len(s) != size || len(s) > size && s[size] != '-' {
		return false
	}
	trace, span := s[traceAt:spanAt-1], s[spanAt:flagsAt-1]
	return isHex(trace) && isHex(span) && isHex(s[flagsAt:size]) && !isZero(trace) && !isZero(span)
}

func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func isZero(s string) bool {
	for i := range len(s) {
		if s[i] != '0' {
			return false
		}
	}
	return true
}
