// Package forwarded makes the header fields by which a service learns who calls
// it, and strips what clients say of that themselves.
//
//	settings := forwarded.Settings{IdentityHeader: "x-spiffe-id", XFCC: forwarded.Sanitize}
//	rules, err := forwarded.Compile(settings)                        // once
//	maker := rules.Maker(forwarded.Client{ID: peer, Own: us, …})     // for each connection
//	id, notes, err = maker.Edit(&request, &edit, notes)              // for each request; does not allocate
//
// It knows no connection and decides on nothing: who the client is was proven
// before.
//
// # What becomes of the fields of a client
//
//	identity header              goes, in every case and spelling (_ for -), and so does x-spiffe-id; ours is set, but not for plaintext
//	client-cert, -cert-chain     go (RFC 9440, section 4)
//	x-original-url, -rewrite-url, go: some services take them for the path and method, which the rules
//	  x-http-method and the like   have decided on
//	x-forwarded-client-cert      goes; ours is set by XFCC; a trusted peer's is kept where XFCC says so, or the request is refused
//	x-forwarded-for, -proto,     Replace: go, and ours (-for, -proto, -host) are set; Append: ours come behind;
//	  -host, -port, forwarded      Untouched: are passed on; so it is with x-real-ip and x-forwarded-ssl, -scheme, -protocol, but that ours are not set
//	request id                   one of 1 to 128 visible ASCII bytes but " , ; and \ is kept, once; another is made anew
//	traceparent, tracestate      are passed on; where traceparent is malformed, or there twice, both go (W3C Trace Context, section 4.3)
package forwarded

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"unsafe"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/http1"
)

// XFCC is what becomes of x-forwarded-client-cert, in which Envoy tells of
// client certificates.
type XFCC uint8

// The ways. All but Off set ours.
const (
	Off      XFCC = iota // the service is sent none
	Sanitize             // ours alone
	Append               // ours behind that of a trusted peer
	Forward              // that of a trusted peer as it is
)

// Origin is what becomes of the fields that tell of addresses and hosts.
type Origin uint8

// The ways.
const (
	Replace   Origin = iota // ours alone
	Behind                  // ours behind what the client sends
	Untouched               // none of ours
)

// Settings are what a listener's services are told. The zero value tells them
// where a request comes from, and its id.
type Settings struct {
	IdentityHeader string // a canonical name; empty: none
	XFCC           XFCC
	Trusted        []spiffeid.ID // whose x-forwarded-client-cert is believed
	Origin         Origin
	RequestID      string // a canonical name; empty: x-request-id
}

// The names of the fields.
const (
	requestID   = "x-request-id"
	xfcc        = "x-forwarded-client-cert"
	spiffeID    = "x-spiffe-id" // which services believe, whatever the listener names ours
	forFor      = "x-forwarded-for"
	forProto    = "x-forwarded-proto"
	forHost     = "x-forwarded-host"
	forPort     = "x-forwarded-port"
	standard    = "forwarded" // RFC 7239
	traceparent = "traceparent"
	tracestate  = "tracestate"
)

// overrides are what some services take for the path or the method.
var overrides = []string{"x-original-url", "x-rewrite-url", "x-http-method", "x-http-method-override", "x-method-override"}

// Rules are compiled settings. They never change.
type Rules struct {
	settings Settings
	names    *http1.Names // what of a client's goes
	noTrace  *http1.Names // the same, and its trace
}

// Compile checks settings and makes what is needed for every request.
func Compile(s Settings) (*Rules, error) {
	if s.RequestID == "" {
		s.RequestID = requestID
	}
	if s.XFCC > Forward || s.Origin > Untouched {
		return nil, errors.New("forwarded: a way that there is not")
	}
	names := append([]string{xfcc, "client-cert", "client-cert-chain", spiffeID, s.RequestID}, overrides...)
	if s.IdentityHeader != "" && s.IdentityHeader != spiffeID {
		names = append(names, s.IdentityHeader)
	}
	if s.Origin != Untouched {
		names = append(names, forFor, forProto, forHost, forPort, standard, "x-real-ip", "x-forwarded-ssl", "x-forwarded-scheme", "x-forwarded-protocol")
	}
	for i, name := range names {
		if canonicalName, err := canonical.HeaderName(name); err != nil || canonicalName != name {
			return nil, fmt.Errorf("forwarded: %q is no canonical name of a header", name)
		}
		if slices.Contains(names[:i], name) {
			return nil, fmt.Errorf("forwarded: the header %s would have two meanings", name)
		}
	}
	r := &Rules{settings: s}
	var err error
	if r.names, err = http1.NewNames(names...); err != nil {
		return nil, err
	}
	if r.noTrace, err = http1.NewNames(append(names, traceparent, tracestate)...); err != nil {
		return nil, err
	}
	return r, nil
}

// Client is who calls, over one connection.
type Client struct {
	ID     spiffeid.ID // zero: it proved nothing
	Hash   [32]byte    // SHA-256 of its certificate (DER)
	Own    spiffeid.ID // whom it called
	Source netip.Addr  // invalid: of a unix socket
	TLS    bool
}

// Maker makes the fields of one connection's requests. It is for one goroutine.
type Maker struct {
	rules    *Rules
	trusted  bool
	own      string        // our element of x-forwarded-client-cert; empty: none
	identity []http1.Field // the same for every request
	source   string
	proto    string
}

// Maker returns the maker for a client.
func (r *Rules) Maker(c Client) *Maker {
	m := &Maker{rules: r, source: "unknown", proto: "http"}
	if c.Source.IsValid() {
		m.source = c.Source.Unmap().WithZone("").String()
	}
	if c.TLS {
		m.proto = "https"
	}
	if c.ID.IsZero() {
		return m
	}
	s := &r.settings
	if s.IdentityHeader != "" {
		m.identity = append(m.identity, http1.Field{Name: s.IdentityHeader, Value: c.ID.String()})
	}
	if s.XFCC != Off {
		m.own = fmt.Sprintf("By=%s;Hash=%x;URI=%s", c.Own, c.Hash, c.ID)
	}
	m.trusted = (s.XFCC == Append || s.XFCC == Forward) && slices.Contains(s.Trusted, c.ID)
	if m.own != "" && !m.trusted {
		m.identity = append(m.identity, http1.Field{Name: xfcc, Value: m.own})
	}
	return m
}

// Names returns what of a client's fields, and of its trailers, goes.
func (m *Maker) Names() *http1.Names { return m.rules.names }

// ErrXFCC is why a trusted peer's x-forwarded-client-cert is refused.
var ErrXFCC = errors.New("x-forwarded-client-cert: want elements parted by commas, of key=value parted by semicolons, as Envoy writes them; a value with one of those, or with quotes, stands in quotes")

// Edit adds to e what the service is told of the request, and what of the
// client's goes. It returns the request's id and notes, in which the values lie
// that are of this request alone: they, and the id, are good until notes is used
// again. The error is ErrXFCC.
func (m *Maker) Edit(r *http1.Request, e *http1.Edit, notes []byte) (string, []byte, error) {
	var seen seen
	for i := range r.Fields {
		if f := &r.Fields[i]; !f.Hop {
			seen.note(f, m.rules.settings.RequestID)
		}
	}
	e.Drop = m.rules.names
	if seen.traces > 0 && (seen.traces > 1 || !validTrace(seen.trace)) {
		e.Drop = m.rules.noTrace
	}
	id := seen.id
	if seen.ids != 1 || !validID(id) {
		id, notes = appendUUID(notes)
	}
	e.Append = append(e.Append, m.identity...)
	e.Append = append(e.Append, http1.Field{Name: m.rules.settings.RequestID, Value: id})
	if m.trusted {
		value, more, err := m.chain(r, notes, seen.certs)
		if notes = more; err != nil {
			return id, notes, err
		}
		e.Append = append(e.Append, http1.Field{Name: xfcc, Value: value})
	}
	if m.rules.settings.Origin != Untouched {
		notes = m.origin(r, e, notes, &seen)
	}
	return id, notes, nil
}

// seen is what of a request's fields concerns us.
type seen struct {
	id, trace          string
	ids, traces, certs int
	sources            int
}

func (s *seen) note(f *http1.Field, idName string) {
	switch f.Name {
	case idName:
		s.id = f.Value
		s.ids++
	case traceparent:
		s.trace = f.Value
		s.traces++
	case xfcc:
		s.certs++
	case forFor:
		s.sources++
	}
}

// chain returns the x-forwarded-client-cert of a trusted peer, with ours behind
// it where that is to be.
func (m *Maker) chain(r *http1.Request, notes []byte, certs int) (string, []byte, error) {
	if certs == 0 {
		return m.own, notes, nil
	}
	notes, start := join(r, xfcc, notes), len(notes)
	if !validXFCC(notes[start:]) {
		return "", notes, ErrXFCC
	}
	if m.rules.settings.XFCC == Append {
		notes = append(append(notes, ','), m.own...)
	}
	return view(notes[start:]), notes, nil
}

// origin adds where the request comes from, and what it asked for.
func (m *Maker) origin(r *http1.Request, e *http1.Edit, notes []byte, s *seen) []byte {
	source := m.source
	if m.rules.settings.Origin == Behind && s.sources > 0 {
		start := len(notes)
		notes = join(r, forFor, notes)
		notes = append(append(notes, ", "...), source...)
		source = view(notes[start:])
	}
	e.Append = append(
		e.Append,
		http1.Field{Name: forFor, Value: source},
		http1.Field{Name: forProto, Value: m.proto},
		http1.Field{Name: forHost, Value: r.Host},
	)
	return notes
}

// join appends all values of a name, parted by commas (RFC 9110, section 5.3).
func join(r *http1.Request, name string, dst []byte) []byte {
	first := true
	for i := range r.Fields {
		if f := &r.Fields[i]; f.Name == name && !f.Hop {
			if !first {
				dst = append(dst, ", "...)
			}
			dst, first = append(dst, f.Value...), false
		}
	}
	return dst
}

func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) } //nolint:gosec // the bytes are not written any more
