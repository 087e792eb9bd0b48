package http1

import (
	"net/http"
	"strings"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// Request is the head of a request. The zero value is ready for use, and is
// used again for the next one without allocating. Its strings are views of the
// buffer that was parsed.
type Request struct {
	Options canonical.Options // what the listener's services take literally; stays as it is

	Method string
	Target canonical.Target
	Host   string // canonical; never empty
	Minor  int    // of the version: 0 or 1
	Fields []Field

	KeepAlive bool    // the client would send another request
	Upgrade   string  // the one protocol offered, as it was sent; empty where none, several, or there is a body
	Body      Framing // NoBody, Counted or Chunked
	Length    int64   // of a Counted body; 0 otherwise
	Continue  bool    // the client waits for [Continue] before it sends its body
	Trailers  bool    // the client accepts trailers (TE: trailers)

	head  head
	begun bool
}

// Parse reads a head from the start of buf. It returns how long it is, or 0
// where more is to come: call it again with the same bytes and those that
// follow them; they may have moved. Once it returned anything else the next
// call begins a new request.
//
// The error is an [*Error]. Nothing of what comes after it can be understood:
// answer and close.
func (r *Request) Parse(buf []byte) (int, error) {
	if !r.begun {
		r.head.reset()
		*r = Request{Options: r.Options, head: r.head, begun: true}
	}
	n, err := r.head.scan(buf, maxRequestLine, errRequestLine, func(line []byte) error {
		_, _, _, err := splitRequestLine(line)
		return err
	})
	if n == 0 && err == nil {
		return 0, nil
	}
	r.begun = false
	if err == nil {
		err = r.read(buf)
	}
	if err != nil {
		return 0, err
	}
	return n, nil
}

// Forget drops a head of which only a part was parsed, and what was parsed
// before. The memory stays.
func (r *Request) Forget() {
	r.head.reset()
	*r = Request{Options: r.Options, head: r.head}
}

func splitRequestLine(line []byte) (method, target string, minor byte, err error) {
	s := view(line)
	method, rest, _ := strings.Cut(s, " ")
	target, version, _ := strings.Cut(rest, " ")
	if method, err = canonical.Method(method); err != nil {
		return "", "", 0, uncanonical(err)
	}
	if minor, err = parseVersion(version); err != nil {
		return "", "", 0, err
	}
	return method, target, minor, nil
}

func (r *Request) read(buf []byte) error {
	h := &r.head
	method, target, minor, err := splitRequestLine(buf[:h.ends[0]-2])
	if err != nil {
		return err
	}
	if method == http.MethodConnect {
		return errConnect
	}
	h.minor = minor
	r.Method, r.Minor = method, int(minor)
	if r.Target, err = canonical.ParseTarget(method, target, r.Options); err != nil {
		return uncanonical(err)
	}
	if err = h.readFields(buf); err != nil {
		return err
	}
	r.Fields = h.fields
	if r.Host, err = canonical.Authority(r.Target, h.hosts[:h.hostLines]); err != nil {
		return uncanonical(err)
	}
	if err = h.checkFraming(); err != nil {
		return err
	}
	return r.frame()
}

// frame says where the request ends and what it asks of the connection.
func (r *Request) frame() error {
	h := &r.head
	switch {
	case h.chunked:
		r.Body = Chunked
	case h.length > 0:
		r.Body, r.Length = Counted, h.length
	}
	if r.Method == http.MethodTrace && r.Body != NoBody {
		return bad("trace_body", "TRACE has no body (RFC 9110, section 9.3.8)")
	}
	r.KeepAlive, r.Trailers = h.keepsAlive(), h.te
	if r.Body == NoBody {
		r.Upgrade = h.asksUpgrade()
	}
	if h.expectations == 0 || h.minor == 0 { // RFC 9110, section 10.1.1
		return nil
	}
	if h.expectations > 1 || !strings.EqualFold(h.expects, "100-continue") {
		return refuse(http.StatusExpectationFailed, "expectation", "Expect: only 100-continue is served")
	}
	r.Continue = r.Body != NoBody
	return nil
}
