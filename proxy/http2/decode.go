package http2

import (
	"net/http"
	"strconv"

	"golang.org/x/net/http2/hpack"

	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/http1"
)

// decoder reads the heads of a connection, one after another: the table of
// HPACK is of all of them.
type decoder struct {
	hpack *hpack.Decoder

	parts    http1.Parts
	response bool   // it is read as one
	trailers bool   // likewise
	size     int    // as MaxHead counts it
	length   int64  // of Content-Length; -1: none
	regular  bool   // a field that is no pseudo-field has come
	bad      string // what is wrong with it; empty where nothing is
	large    bool   // it is longer than it may be
	pseudo   uint8  // which pseudo-fields have come
}

// The pseudo-fields (RFC 9113, section 8.3).
const (
	hasMethod = 1 << iota
	hasScheme
	hasAuthority
	hasPath
	hasProtocol
	hasStatus
)

func newDecoder() *decoder {
	d := &decoder{}
	d.hpack = hpack.NewDecoder(tableSize, d.take)
	d.hpack.SetMaxStringLength(MaxHead)
	return d
}

// read decodes a whole block. What it finds is in d until the next one. An
// error is one of the connection: who cannot follow the table understands
// nothing of what follows.
func (d *decoder) read(block []byte, response, trailers, ended bool) *Error {
	fields := d.parts.Fields
	clear(fields)
	*d = decoder{hpack: d.hpack, response: response, trailers: trailers, length: -1, parts: http1.Parts{Fields: fields[:0], Ended: ended}}
	d.hpack.SetEmitEnabled(true)
	if _, err := d.hpack.Write(block); err != nil {
		return broken(CompressionError, "a head that cannot be decoded: "+err.Error())
	}
	if err := d.hpack.Close(); err != nil {
		return broken(CompressionError, "a head that is cut off: "+err.Error())
	}
	if d.bad == "" && !d.large {
		d.check(ended)
	}
	return nil
}

// refuse notes what is wrong first.
func (d *decoder) refuse(why string) {
	if d.bad == "" {
		d.bad = why
	}
}

// take takes up one field.
func (d *decoder) take(f hpack.HeaderField) {
	if d.size += int(f.Size()); d.size > MaxHead || len(d.parts.Fields) >= MaxFields {
		d.large = true
		d.hpack.SetEmitEnabled(false) // the table is followed all the same
		return
	}
	if f.Name != "" && f.Name[0] == ':' {
		d.takePseudo(f)
		return
	}
	d.regular = true
	if why := checkField(f.Name, f.Value); why != "" {
		d.refuse(why)
		return
	}
	if f.Name == "content-length" {
		d.takeLength(f.Value)
	}
	d.parts.Fields = append(d.parts.Fields, http1.Field{Name: f.Name, Value: f.Value, Sensitive: f.Sensitive})
}

// checkField returns what makes a message with such a field malformed (RFC
// 9113, section 8.2).
func checkField(name, value string) string {
	for i := range len(name) {
		if b := name[i]; 'A' <= b && b <= 'Z' || !canonical.IsToken(b) {
			return "a name of a field that is no token in lower case"
		}
	}
	for i := range len(value) {
		if b := value[i]; b < ' ' && b != '\t' || b == 0x7f {
			return "a control byte in the value of a field"
		}
	}
	if n := len(value); n > 0 && (isBlank(value[0]) || isBlank(value[n-1])) {
		return "white space around the value of a field"
	}
	switch name {
	case "":
		return "a field without a name"
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return "a field that is for one connection of HTTP/1.1 alone: " + name
	case "te":
		if value != "trailers" {
			return "te: only trailers may be asked for"
		}
	}
	return ""
}

func isBlank(b byte) bool { return b == ' ' || b == '\t' }

// takeLength reads Content-Length. Several are refused, even where they are
// equal.
func (d *decoder) takeLength(value string) {
	n, err := strconv.ParseUint(value, 10, 62)
	if d.length >= 0 || err != nil {
		d.refuse("content-length: want one number")
		return
	}
	d.length = int64(n)
}

func (d *decoder) takePseudo(f hpack.HeaderField) {
	p := &d.parts
	var which uint8
	switch {
	case d.trailers || d.regular:
		d.refuse("a pseudo-field behind others, or in trailers")
		return
	case d.response && f.Name == ":status":
		which = hasStatus
		if p.Status = statusOf(f.Value); p.Status == 0 || p.Status == http.StatusSwitchingProtocols {
			d.refuse(":status: want three digits, and not 101 (RFC 9113, section 8.6)")
		}
	case d.response:
	case f.Name == ":method":
		which, p.Method = hasMethod, f.Value
	case f.Name == ":scheme":
		which, p.Scheme = hasScheme, f.Value
	case f.Name == ":authority":
		which, p.Authority = hasAuthority, f.Value
	case f.Name == ":path":
		which, p.Path = hasPath, f.Value
	case f.Name == ":protocol":
		which, p.Protocol = hasProtocol, f.Value
	}
	switch {
	case which == 0:
		d.refuse("a pseudo-field that there is not")
	case d.pseudo&which != 0:
		d.refuse("a pseudo-field twice")
	case f.Value == "":
		d.refuse("an empty pseudo-field")
	case checkField("x", f.Value) != "":
		d.refuse("a control byte or a blank in a pseudo-field")
	}
	d.pseudo |= which
}

func statusOf(s string) int {
	if len(s) != 3 {
		return 0
	}
	n := 0
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0
		}
		n = 10*n + int(s[i]-'0')
	}
	if n < 100 {
		return 0
	}
	return n
}

// noContent is wrong with every message but a response to HEAD.
const noContent = "content-length, and no content"

// check looks whether all is there (RFC 9113, section 8.3, and RFC 8441,
// section 4).
func (d *decoder) check(ended bool) {
	const whole = hasMethod | hasScheme | hasPath
	switch has := d.pseudo; {
	case d.trailers:
	case d.response:
		if has != hasStatus {
			d.refuse("a response without :status")
		}
		if ended && d.length > 0 && d.parts.Status != http.StatusNotModified {
			d.refuse(noContent)
		}
	case d.parts.Method == "CONNECT" && has&hasProtocol == 0:
		if has != hasMethod|hasAuthority {
			d.refuse("CONNECT: want :authority, and neither :scheme nor :path")
		}
	case has&hasProtocol != 0 && d.parts.Method != "CONNECT":
		d.refuse(":protocol without CONNECT")
	case has&whole != whole:
		d.refuse("a request without :method, :scheme or :path")
	case has&hasProtocol != 0 && has&hasAuthority == 0:
		d.refuse("an extended CONNECT without :authority")
	case d.parts.Scheme != "http" && d.parts.Scheme != "https":
		d.refuse(":scheme: want http or https")
	case ended && d.length > 0:
		d.refuse(noContent)
	}
}
