package http1

import (
	"net/http"
	"strings"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// Parts is a head that came in parts of its own rather than in lines, as in
// HTTP/2 (RFC 9113, section 8.3): names in lower case, values without white
// space around them, nothing that is for one connection alone.
type Parts struct {
	Method, Scheme, Authority, Path string // of a request; a CONNECT may have no scheme and path
	Protocol                        string // of an extended CONNECT (RFC 8441); empty otherwise
	Status                          int    // of a response
	Fields                          []Field
	Ended                           bool // nothing follows
}

// Assemble makes the request of its parts, held to what Parse demands. It
// copies the list of fields and none of the strings. An extended CONNECT is
// a GET that offers to change the protocol, as it would be in HTTP/1.1, and has
// no length. The error is an [*Error].
func (r *Request) Assemble(p *Parts) error {
	r.Forget()
	h := &r.head
	h.minor = 1
	method, err := canonical.Method(p.Method)
	switch {
	case err != nil:
		return uncanonical(err)
	case p.Protocol != "":
		method = http.MethodGet
	case method == http.MethodConnect:
		return errConnect
	}
	r.Method, r.Minor, r.KeepAlive = method, 1, true
	if p.Path != "" && p.Path[0] != '/' && p.Path != "*" {
		return bad("bad_path", ":path: want one that begins with a slash (RFC 9113, section 8.3.1)")
	}
	if r.Target, err = canonical.ParseTarget(method, p.Path, r.Options); err != nil {
		return uncanonical(err)
	}
	if err = h.assemble(p.Fields); err != nil {
		return err
	}
	if r.Host, err = h.authority(p.Authority); err != nil {
		return err
	}
	r.Fields = h.fields
	if p.Protocol != "" {
		return r.offer(p.Protocol)
	}
	if p.Ended && h.length > 0 {
		return bad("length_of_none", "Content-Length of a request that ends with its head; send as much, or leave it out")
	}
	h.chunked = !p.Ended && h.length < 0
	return r.frame()
}

// offer makes an extended CONNECT an offer to change the protocol.
func (r *Request) offer(protocol string) error {
	h := &r.head
	h.upgrades, h.upgrade, h.protocols, h.length = true, protocol, 1, -1
	if err := r.frame(); err != nil {
		return err
	}
	if r.Upgrade == "" {
		return bad("bad_protocol", ":protocol: want one name, as of Upgrade (RFC 8441, section 4)")
	}
	return nil
}

var errConnect = refuse(http.StatusNotImplemented, "connect", "CONNECT is not served: there is no path to decide on")

// authority returns the host of a request that names it in its parts, in a field
// or in both, where they must be the same.
func (h *head) authority(authority string) (string, error) {
	hosts := h.hosts[:h.hostLines]
	target := canonical.Target{}
	if authority != "" {
		host, err := canonical.Host(authority)
		if err != nil {
			return "", uncanonical(err)
		}
		if len(hosts) == 0 {
			return host, nil
		}
		target.Host = host
	}
	host, err := canonical.Authority(target, hosts)
	if err != nil {
		return "", uncanonical(err)
	}
	return host, nil
}

// assemble takes up fields that came as such.
func (h *head) assemble(fields []Field) error {
	if len(fields) > MaxFields {
		return errTooManyFields
	}
	cookies := 0
	for i := range fields {
		f := fields[i]
		f.Hop = false
		var err error
		if f.Name, err = canonical.HeaderName(f.Name); err != nil {
			return uncanonical(err)
		}
		if f.Value, err = canonical.HeaderValue(f.Value); err != nil {
			return uncanonical(err)
		}
		switch f.Name {
		case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
			return bad("connection_field", "a field that is for one connection of HTTP/1.1 alone; leave it out (RFC 9113, section 8.2.2)")
		}
		if err = h.note(&f); err != nil {
			return err
		}
		if f.Name == "cookie" {
			cookies++
		}
		h.fields = append(h.fields, f)
	}
	if cookies > 1 {
		return h.joinCookies()
	}
	return nil
}

// joinCookies makes one field of several cookies, which HTTP/2 may part (RFC
// 9113, section 8.2.3). It is held to the bound of one.
func (h *head) joinCookies() error {
	var all []string
	kept := h.fields[:0]
	first, sensitive := 0, false
	for _, f := range h.fields {
		if f.Name != "cookie" {
			kept = append(kept, f)
			continue
		}
		sensitive = sensitive || f.Sensitive
		if all = append(all, f.Value); len(all) == 1 {
			first = len(kept)
			kept = append(kept, f)
		}
	}
	clear(h.fields[len(kept):])
	h.fields = kept
	joined, err := canonical.HeaderValue(strings.Join(all, "; "))
	if err != nil {
		return uncanonical(err)
	}
	h.fields[first].Value, h.fields[first].Sensitive = joined, sensitive
	return nil
}

// Assemble makes the response of its parts, as [Request.Assemble] does. The
// error is an [*Error] of status 502.
func (r *Response) Assemble(p *Parts, asked Asked) error {
	r.Forget()
	h := &r.head
	h.minor = 1
	if p.Status < 100 || p.Status > 599 || p.Status == http.StatusSwitchingProtocols {
		return ofService(bad("bad_status", "want a status from 100 to 599, and no 101 (RFC 9113, section 8.6)"))
	}
	r.Status, r.Phrase, r.Minor, r.KeepAlive = p.Status, http.StatusText(p.Status), 1, true
	if err := h.assemble(p.Fields); err != nil {
		return ofService(err)
	}
	empty := p.Status < 200 || p.Status == http.StatusNoContent || p.Status == http.StatusNotModified || asked.Method == http.MethodHead
	switch {
	case empty:
	case p.Ended && h.length > 0:
		return ofService(bad("length_of_none", "Content-Length of a response that ends with its head"))
	case h.length < 0:
		h.ended, h.chunked = p.Ended, !p.Ended
	}
	r.Fields, r.Length = h.fields, h.length
	if err := r.frame(asked); err != nil {
		return ofService(err)
	}
	return nil
}

// Switch makes a response that takes an extended CONNECT the 101 of HTTP/1.1 that
// says the same (RFC 8441, section 5; RFC 9110, section 15.2.2).
func (r *Response) Switch(protocol string) {
	r.Status, r.Phrase = http.StatusSwitchingProtocols, http.StatusText(http.StatusSwitchingProtocols)
	r.KeepAlive, r.Upgrade, r.Body, r.Length = true, protocol, NoBody, -1
	r.head.chunked, r.head.ended = false, false
}

// CheckTrailer returns why a field may not come behind a body: it would change
// what was decided by the head, or says who the peer is. The error is an
// [*Error].
func CheckTrailer(f Field, identity *Names) error {
	if _, err := canonical.HeaderName(f.Name); err != nil {
		return uncanonical(err)
	}
	if _, err := canonical.HeaderValue(f.Value); err != nil {
		return uncanonical(err)
	}
	if err := checkTrailerName(f.Name); err != nil {
		return err
	}
	if identity.Has(f.Name) {
		return bad("trailer_identity", "a trailer that says who the peer is; leave it out")
	}
	return nil
}

// Keeps reports whether a field of the head that is edited is passed on.
func (e *Edit) Keeps(f *Field) bool { return e.keeps(f) }

// ContentLength returns what Content-Length says, or -1 where there is none.
func (r *Request) ContentLength() int64 { return r.head.length }
