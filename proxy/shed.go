package proxy

import (
	"bytes"
	"crypto/tls"
	"reflect"
	"unsafe"
)

// crypto/tls keeps, for the life of a connection, the buffer of the largest
// record it ever read: after some traffic that is more than everything else a
// silent connection costs, and there is no way to ask it back. This file takes
// it back. The layout it knows is checked once by reflection; where it is
// another, nothing is done and a test says so. docs/design has the reasons.

// tlsBuffers are where in a tls.Conn the buffers of its reading half are.
type tlsBuffers struct {
	rawInput, input, hand uintptr
	known                 bool
}

var buffers = findBuffers()

func findBuffers() (b tlsBuffers) {
	t := reflect.TypeFor[tls.Conn]()
	find := func(name string, is reflect.Type) uintptr {
		f, ok := t.FieldByName(name)
		if !ok || f.Type != is {
			b.known = false
			return 0
		}
		return f.Offset
	}
	b.known = true
	b.rawInput = find("rawInput", reflect.TypeFor[bytes.Buffer]())
	b.input = find("input", reflect.TypeFor[bytes.Reader]())
	b.hand = find("hand", reflect.TypeFor[bytes.Buffer]())
	return b
}

// shed gives back the empty read buffers of a TLS connection after its
// handshake. Who calls it is its only reader.
func shed(c *tls.Conn) {
	if !buffers.known {
		return
	}
	base := unsafe.Pointer(c) //nolint:gosec // the offsets were checked against the type
	rawInput := (*bytes.Buffer)(unsafe.Add(base, buffers.rawInput))
	input := (*bytes.Reader)(unsafe.Add(base, buffers.input))
	hand := (*bytes.Buffer)(unsafe.Add(base, buffers.hand))
	if rawInput.Len() == 0 && input.Len() == 0 { // input lies in rawInput
		*rawInput, *input = bytes.Buffer{}, bytes.Reader{}
	}
	if hand.Len() == 0 {
		*hand = bytes.Buffer{}
	}
}
