// Package http1 reads messages of HTTP/1.1 strictly and writes them exactly:
// bytes to messages and back (RFC 9112). It has no network, clock or goroutine
// and decides on nothing.
//
//	var r http1.Request
//	n, err := r.Parse(buf)      // n == 0: fill buf further and call again
//	body.Start(r.Body, r.Length, identity)
//	out = r.Append(out[:0], &http1.Edit{Drop: identity, Append: ours})
//	n, done, err := body.Next(buf)     // buf[:n] is passed on as it is
//
// The caller owns the buffer. A head's strings are views of it: they change
// when the buffer is filled anew. Whoever keeps one clones it.
//
// Whatever two readers could understand differently is refused, with the
// status to answer with: see docs/design/0018-http1-messages.md. Names of
// fields are put into lower case in the buffer itself. Parse never looks at a
// byte twice to find the head's end, however it arrives, and takes time linear
// in it.
package http1

import (
	"unsafe"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// The bounds. What is longer is refused.
const (
	MaxHead    = 64 << 10 // of a head, its start line and last empty line included; in bytes
	MaxFields  = 128      // field lines of a head
	MaxTrailer = 8 << 10  // of the last chunk's line and what follows it; in bytes
	MaxChunk   = 15       // hexadecimal digits of a chunk's size

	maxRequestLine = canonical.MaxMethod + canonical.MaxTarget + len("  HTTP/1.1\r\n")
	maxStatusLine  = 1 << 10
	maxFieldLine   = canonical.MaxHeaderName + len(":") + canonical.MaxHeaderValue + len("\r\n")
	maxTrailers    = 32
	maxOptions     = 32 // of Connection: each is looked for among all fields
)

// Continue is the interim response that asks for a body (RFC 9110, section
// 15.2.1).
const Continue = "HTTP/1.1 100 Continue\r\n\r\n"

// Field is one field line. A name that was sent several times is there as
// often.
type Field struct {
	Name  string // in lower case
	Value string // without white space around it
	// Hop is set where the field is for this connection alone (RFC 9110,
	// section 7.6.1), or says how the message is framed. It is not passed on,
	// so rules are not to see it either.
	Hop bool
	// Sensitive is set where HTTP/2 brought it so that it lands in no table, in
	// which it is to be passed on as well (RFC 7541, section 7.1.3).
	Sensitive bool
}

// Framing is how a message's end is found (RFC 9112, section 6.3).
type Framing uint8

// The framings.
const (
	NoBody     Framing = iota
	Counted            // by Content-Length
	Chunked            // by Transfer-Encoding: chunked
	UntilClose         // by the end of the connection; of responses alone
)

// view returns b as a string that shares its memory.
func view(b []byte) string {
	return unsafe.String(unsafe.SliceData(b), len(b)) //nolint:gosec // the head's contract says how long it is valid; a copy would cost an allocation a field
}
