package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// Question is a request in a person's words, as tests of a policy and command
// lines ask it.
type Question struct {
	As       string // a SPIFFE ID or unauthenticated
	To       string // a SPIFFE ID; empty: nobody
	On       string // listener
	At       string // inbound | outbound; empty: inbound
	SourceIP string
	Port     uint16
	SNI      string
	Do       string   // an HTTP request: "GET /path" or "GET https://host/path"
	Host     string   // of Do
	GRPC     string   // a gRPC call, service/method, in place of Do
	Headers  []Header // with Do or GRPC
	Subject  string   // whom a JWT-SVID on Do or GRPC speaks for, a SPIFFE ID; empty: it has none. Inbound
	Time     time.Time
}

// DefaultTime is when a question is asked that does not say.
var DefaultTime = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// QuestionError says which field of a Question is wrong.
type QuestionError struct {
	Field string // as tests name it: as, source_ip, do …
	Err   error
}

// Error returns "field: what is wrong".
func (e *QuestionError) Error() string { return e.Field + ": " + e.Err.Error() }

// Unwrap returns what is wrong.
func (e *QuestionError) Unwrap() error { return e.Err }

// Request returns what is asked, in its canonical form. Every error is a
// *QuestionError. What a proxy would refuse before it asks the policy, such as a
// path with "..", is an error.
func (q *Question) Request() (*Request, error) {
	r := &Request{Listener: q.On, Port: q.Port, Time: q.Time}
	if r.Time.IsZero() {
		r.Time = DefaultTime
	}
	for _, step := range []struct {
		field string
		set   func(*Request) error
	}{{"as", q.setFrom}, {"to", q.setTo}, {"at", q.setAt}, {"source_ip", q.setSource}, {"sni", q.setSNI}, {"do", q.setDo}, {"grpc", q.setGRPC}, {"headers", q.setHeaders}, {"subject", q.setSubject}} {
		if err := step.set(r); err != nil {
			if wrong := (*QuestionError)(nil); errors.As(err, &wrong) {
				return nil, wrong
			}
			return nil, &QuestionError{step.field, err}
		}
	}
	return r, nil
}

func parsePeer(s string) (Peer, error) {
	id, err := spiffeid.FromString(s)
	if err != nil {
		return Peer{}, fmt.Errorf("%q is no SPIFFE ID: %w", clip(s), err)
	}
	return Peer{ID: id}, nil
}

func (q *Question) setFrom(r *Request) (err error) {
	switch q.As {
	case "":
		return errors.New("is missing: who asks, a SPIFFE ID or unauthenticated")
	case Unauthenticated:
		r.From.Unauthenticated = true
		return nil
	}
	r.From, err = parsePeer(q.As)
	return err
}

func (q *Question) setTo(r *Request) (err error) {
	if q.To != "" {
		r.To, err = parsePeer(q.To)
	}
	return err
}

func (q *Question) setAt(r *Request) error {
	switch q.At {
	case "", Inbound.String():
	case Outbound.String():
		r.Direction = Outbound
	default:
		return fmt.Errorf("%q: want inbound or outbound", clip(q.At))
	}
	return nil
}

func (q *Question) setSource(r *Request) error {
	if q.SourceIP == "" {
		return nil
	}
	addr, err := netip.ParseAddr(q.SourceIP)
	if err != nil {
		return fmt.Errorf("%q is no address", clip(q.SourceIP))
	}
	if r.Direction != Inbound {
		return errors.New("is known at the inbound end only")
	}
	r.Source = netip.AddrPortFrom(addr.Unmap(), 0)
	return nil
}

func (q *Question) setSNI(r *Request) (err error) {
	if q.SNI != "" {
		r.SNI, err = canonical.Host(q.SNI)
	}
	return err
}

func (q *Question) setDo(r *Request) error {
	if q.Do == "" {
		if q.Host != "" && q.GRPC == "" {
			return &QuestionError{"host", errors.New("goes with do or grpc")}
		}
		return nil
	}
	if q.GRPC != "" {
		return errors.New("do and grpc are both here; a gRPC call is an HTTP request")
	}
	method, target, ok := strings.Cut(q.Do, " ")
	if !ok {
		return fmt.Errorf("%q: want a method and a target, like GET /v1/orders", clip(q.Do))
	}
	if _, err := parseMethod(method); err != nil {
		return err
	}
	h, err := httpRequest(method, strings.TrimSpace(target), q.Host)
	r.HTTP = h
	return err
}

// httpRequest makes the canonical request that a client would send.
func httpRequest(method, target, host string) (*HTTP, error) {
	t, err := canonical.ParseTarget(method, target, canonical.Options{})
	if err != nil {
		return nil, fmt.Errorf("%q: a proxy refuses it: %w", clip(target), err)
	}
	h := &HTTP{Method: method, Path: t.Path, Host: t.Host}
	if host != "" {
		if h.Host, err = canonical.Host(host); err != nil {
			return nil, &QuestionError{"host", fmt.Errorf("%q: %w", clip(host), err)}
		}
		if t.Host != "" && t.Host != h.Host {
			return nil, fmt.Errorf("the target names host %s, and host is %s", t.Host, h.Host)
		}
	}
	return h, nil
}

func (q *Question) setGRPC(r *Request) error {
	if q.GRPC == "" {
		return nil
	}
	service, method, _ := strings.Cut(strings.TrimPrefix(q.GRPC, "/"), "/")
	if _, err := parseService(service); err != nil {
		return fmt.Errorf("%q: want service/method, like shop.v1.Orders/Get", clip(q.GRPC))
	}
	if _, err := parseCall(method); err != nil {
		return fmt.Errorf("%q: want service/method, like shop.v1.Orders/Get", clip(q.GRPC))
	}
	h, err := httpRequest("POST", "/"+service+"/"+method, q.Host)
	if err != nil {
		return err
	}
	h.Headers = append(h.Headers, Header{"content-type", grpcType})
	r.HTTP = h
	return nil
}

func (q *Question) setHeaders(r *Request) error {
	if len(q.Headers) > 0 && r.HTTP == nil {
		return errors.New("go with do or grpc")
	}
	for _, h := range q.Headers {
		name, err := headerName(h.Name)
		if err != nil {
			return err
		}
		value, err := headerValue(h.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		r.HTTP.Headers = append(r.HTTP.Headers, Header{name, value})
	}
	return nil
}

func (q *Question) setSubject(r *Request) error {
	switch {
	case q.Subject == "":
		return nil
	case r.HTTP == nil:
		return errors.New("goes with do or grpc")
	case r.Direction != Inbound:
		return errors.New("is known at the inbound end only")
	}
	peer, err := parsePeer(q.Subject)
	r.HTTP.Subject = peer.ID
	return err
}

// describe says what is asked, in a line.
func (r *Request) describe() string {
	what := ""
	if r.HTTP != nil {
		what = r.HTTP.Method + " " + r.HTTP.Host + r.HTTP.Path + " "
	}
	speaker := ""
	if r.proof(r.HTTP) > proofMissing {
		speaker = " for " + r.HTTP.Subject.String()
	}
	return fmt.Sprintf("%sfrom %s%s to %s, %s on %q", what, r.From.describe(), speaker, r.To.describe(), r.Direction, r.Listener)
}
