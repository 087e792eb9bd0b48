package http2

import (
	"net/http"
	"strconv"

	"golang.org/x/net/http2/hpack"

	"github.com/narthex-id/narthex/proxy/http1"
)

// This file writes heads (RFC 7541). What is in the static table is named by
// it and everything else is written out, so that there is no table of ours to
// keep, to copy strings into or to search: a head costs some bytes more on the
// wire and little time. Nothing secret lands in a table by that either (RFC
// 7541, section 7.1).

// static is the static table (RFC 7541, appendix A), by name.
var static, staticPairs = func() (names map[string]int, pairs map[[2]string]int) {
	names, pairs = map[string]int{}, map[[2]string]int{}
	var fields []hpack.HeaderField
	d := hpack.NewDecoder(0, func(f hpack.HeaderField) { fields = append(fields, f) })
	for i := range staticSize {
		if _, err := d.Write([]byte{0x80 | byte(i+1)}); err != nil {
			panic(err) // cannot happen: these are all there
		}
	}
	for i, f := range fields {
		if _, ok := names[f.Name]; !ok {
			names[f.Name] = i + 1
		}
		if f.Value != "" {
			pairs[[2]string{f.Name, f.Value}] = i + 1
		}
	}
	return names, pairs
}()

const staticSize = 61

// emptyTable is a change of our table's size to 0 (RFC 7541, section 6.3). A peer
// that allows for a smaller table than before waits for one (RFC 9113, section
// 4.3.1), even where the table was never used.
const emptyTable = 0x20

// appendIndexed appends a field of the static table.
func appendIndexed(dst []byte, index int) []byte { return appendInt(dst, 0x80, 7, index) }

// appendField appends a field written out. Its name may be in the static table.
func appendField(dst []byte, f *http1.Field) []byte {
	first := byte(literal)
	if f.Sensitive {
		first = neverIndexed
	}
	if index := static[f.Name]; index > 0 {
		dst = appendInt(dst, first, 4, index)
	} else {
		dst = appendString(append(dst, first), f.Name)
	}
	return appendString(dst, f.Value)
}

// How a field that is written out begins: others may put it into a table of
// theirs further on, or may not (RFC 7541, sections 6.2.2 and 6.2.3).
const (
	literal      = 0
	neverIndexed = 0x10
)

// appendPair appends a pseudo-field, of which the value may be in the table too.
func appendPair(dst []byte, name, value string) []byte {
	if index := staticPairs[[2]string{name, value}]; index > 0 {
		return appendIndexed(dst, index)
	}
	return appendField(dst, &http1.Field{Name: name, Value: value})
}

func appendString(dst []byte, s string) []byte {
	return append(appendInt(dst, 0, 7, len(s)), s...)
}

// appendInt appends an integer whose first byte has room for so many bits (RFC
// 7541, section 5.1).
func appendInt(dst []byte, first byte, bits, n int) []byte {
	most := 1<<bits - 1
	if n < most {
		return append(dst, first|byte(n))
	}
	dst = append(dst, first|byte(most))
	for n -= most; n >= 0x80; n >>= 7 {
		dst = append(dst, byte(n)|0x80)
	}
	return append(dst, byte(n))
}

// appendFields appends the fields of a head as an edit has them.
func appendFields(dst []byte, fields []http1.Field, e *http1.Edit) []byte {
	for i := range fields {
		if f := &fields[i]; e.Keeps(f) {
			dst = appendField(dst, f)
		}
	}
	for i := range e.Set {
		dst = appendField(dst, &e.Set[i])
	}
	for i := range e.Append {
		dst = appendField(dst, &e.Append[i])
	}
	return dst
}

func appendNumber(dst []byte, name string, n int64) []byte {
	var digits [20]byte
	value := strconv.AppendInt(digits[:0], n, 10)
	dst = appendInt(dst, literal, 4, static[name])
	return append(appendInt(dst, 0, 7, len(value)), value...)
}

// appendRequest appends the block of a request as it goes to a service.
func appendRequest(dst []byte, r *http1.Request, e *http1.Edit, scheme string) []byte {
	if e.Upgrade != "" {
		dst = appendPair(dst, ":method", http.MethodConnect)
		dst = appendPair(dst, ":protocol", e.Upgrade)
	} else {
		dst = appendPair(dst, ":method", r.Method)
	}
	dst = appendPair(dst, ":scheme", scheme)
	dst = appendTarget(dst, r)
	host := r.Host
	if e.Host != "" {
		host = e.Host
	}
	dst = appendField(dst, &http1.Field{Name: ":authority", Value: host})
	for i := range r.Fields {
		if f := &r.Fields[i]; f.Name != "host" && (e.Upgrade == "" || f.Name != "sec-websocket-key") && e.Keeps(f) { // RFC 8441, section 5
			dst = appendField(dst, f)
		}
	}
	if r.Trailers {
		dst = appendPair(dst, "te", "trailers")
	}
	if n := r.ContentLength(); n >= 0 && e.Upgrade == "" {
		dst = appendNumber(dst, "content-length", n)
	}
	return appendFields(dst, nil, e)
}

func appendTarget(dst []byte, r *http1.Request) []byte {
	if !r.Target.HasQuery {
		return appendPair(dst, ":path", r.Target.Path)
	}
	dst = appendInt(dst, literal, 4, static[":path"])
	dst = appendInt(dst, 0, 7, len(r.Target.Path)+1+len(r.Target.Query))
	dst = append(append(dst, r.Target.Path...), '?')
	return append(dst, r.Target.Query...)
}

// appendResponse appends the block of a response as it goes to a client.
func appendResponse(dst []byte, r *http1.Response, e *http1.Edit) []byte {
	dst = appendFields(appendStatus(dst, r.Status), r.Fields, e)
	if r.Length >= 0 {
		dst = appendNumber(dst, "content-length", r.Length)
	}
	return dst
}

func appendStatus(dst []byte, status int) []byte {
	if status == http.StatusOK {
		return appendIndexed(dst, 8)
	}
	return appendPair(dst, ":status", strconv.Itoa(status))
}

// openBlock leaves room for the head of the frame that a block stands in.
func openBlock(dst []byte) []byte { return append(dst, 0, 0, 0, 0, 0, 0, 0, 0, 0) }

// closeBlock makes frames of what was appended since openBlock, at from.
func closeBlock(dst []byte, from int, stream uint32, ended bool) []byte {
	size := len(dst) - from - frameHead
	flags := uint8(0)
	if ended {
		flags = endStream
	}
	if size <= MaxFrame {
		appendHead(dst[:from], headers, flags|endHeaders, stream, size)
		return dst
	}
	block := append([]byte(nil), dst[from+frameHead:]...)
	dst = dst[:from]
	for k := headers; len(block) > 0; k, flags = continuation, 0 {
		n := min(len(block), MaxFrame)
		if n == len(block) {
			flags |= endHeaders
		}
		dst = append(appendHead(dst, k, flags, stream, n), block[:n]...)
		block = block[n:]
	}
	return dst
}
