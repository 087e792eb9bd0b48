package http1

import (
	"net/http"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// Asked is what of a request its response is to be read by.
type Asked struct {
	Method  string
	Upgrade bool // it offered to change the protocol
}

// Response is the head of a response. The zero value is ready for use, and is
// used again for the next one without allocating. Its strings are views of the
// buffer that was parsed.
type Response struct {
	Status int    // 100 to 599
	Phrase string // may be empty
	Minor  int    // of the version: 0 or 1
	Fields []Field

	KeepAlive bool    // the service would take another request
	Upgrade   string  // of 101: the protocol that follows, as it was sent
	Body      Framing // any
	Length    int64   // of Content-Length, also where there is no body; -1 where none was sent

	head  head
	begun bool
}

// Interim reports whether another response to the same request follows (RFC
// 9110, section 15.2): of 100 and 103, but not of 101.
func (r *Response) Interim() bool {
	return r.Status < 200 && r.Status != http.StatusSwitchingProtocols
}

// Parse reads a head from the start of buf, as [Request.Parse] does. What it
// was asked must stay the same until it is whole. The error is an [*Error] of
// status 502.
func (r *Response) Parse(buf []byte, asked Asked) (int, error) {
	if !r.begun {
		r.head.reset()
		*r = Response{head: r.head, begun: true}
	}
	n, err := r.head.scan(buf, maxStatusLine, errStatusLine, func(line []byte) error {
		_, _, _, err := splitStatusLine(line)
		return err
	})
	if n == 0 && err == nil {
		return 0, nil
	}
	r.begun = false
	if err == nil {
		err = r.read(buf, asked)
	}
	if err != nil {
		return 0, ofService(err)
	}
	return n, nil
}

// Forget drops a head of which only a part was parsed, and what was parsed
// before. The memory stays.
func (r *Response) Forget() {
	r.head.reset()
	*r = Response{head: r.head}
}

func splitStatusLine(line []byte) (status int, phrase string, minor byte, err error) {
	const version, code = len("HTTP/1.1"), len("HTTP/1.1 200")
	if len(line) < code || line[version] != ' ' {
		return 0, "", 0, bad("bad_status_line", "want a status line such as HTTP/1.1 200 OK")
	}
	if minor, err = parseVersion(view(line[:version])); err != nil {
		return 0, "", 0, err
	}
	for _, b := range line[version+1 : code] {
		if !isDigit(b) {
			return 0, "", 0, bad("bad_status", "want a status from 100 to 599")
		}
		status = 10*status + int(b-'0')
	}
	if status < 100 || status > 599 {
		return 0, "", 0, bad("bad_status", "want a status from 100 to 599")
	}
	rest := line[code:]
	if len(rest) > 0 && rest[0] != ' ' {
		return 0, "", 0, bad("bad_status", "want a status of three digits")
	}
	if phrase, err = canonical.HeaderValue(view(rest)); err != nil {
		return 0, "", 0, uncanonical(err)
	}
	return status, phrase, minor, nil
}

func (r *Response) read(buf []byte, asked Asked) error {
	h := &r.head
	status, phrase, minor, err := splitStatusLine(buf[:h.ends[0]-2])
	if err != nil {
		return err
	}
	h.minor = minor
	r.Status, r.Phrase, r.Minor = status, phrase, int(minor)
	if err = h.readFields(buf); err != nil {
		return err
	}
	if err = h.checkFraming(); err != nil {
		return err
	}
	r.Fields, r.KeepAlive, r.Length = h.fields, h.keepsAlive(), h.length
	return r.frame(asked)
}

// frame says where the response ends (RFC 9112, section 6.3).
func (r *Response) frame(asked Asked) error {
	h := &r.head
	switch {
	case asked.Method == http.MethodConnect:
		return bad("connect", "CONNECT is not served")
	case r.Status < 200 || r.Status == http.StatusNoContent:
		if h.chunked || h.length > 0 {
			return bad("body_of_none", "a body where the status allows none")
		}
		r.Length = -1 // RFC 9110, section 8.6
		if r.Status == http.StatusSwitchingProtocols {
			return r.switches(asked)
		}
	case asked.Method == http.MethodHead || r.Status == http.StatusNotModified:
	case h.chunked:
		r.Body = Chunked
	case h.length > 0:
		r.Body = Counted
	case h.length < 0 && !h.ended:
		r.Body, r.KeepAlive = UntilClose, false
	}
	return nil
}

func (r *Response) switches(asked Asked) error {
	if r.Upgrade = r.head.asksUpgrade(); r.Upgrade == "" || !asked.Upgrade {
		return bad("unasked_upgrade", "101 without an Upgrade that was asked for")
	}
	return nil
}
