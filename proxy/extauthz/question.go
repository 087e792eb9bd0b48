package extauthz

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/policy"
)

// This file reads what Envoy says of a request. Envoy forwards what its client
// sent, whatever we make of it: so what has another canonical form than it was
// sent in is refused, since rules would be asked of the one and the service
// would see the other.

// The bounds of a request, as our own listeners have them. What is longer is
// refused.
const (
	maxHead    = 64 << 10 // bytes of the target and all fields, with four for each
	maxFields  = 128      // with the parts of those that were joined
	fieldExtra = len(": \r\n")
)

// misfit is why a request cannot be decided on, and what its client is told.
type misfit struct {
	status int
	err    error
}

func misfitf(status int, format string, args ...any) *misfit {
	return &misfit{status, fmt.Errorf(format, args...)}
}

// question is a request that Envoy asks about.
type question struct {
	policy.Request
	http   policy.HTTP
	sender string // as Envoy has it: an address, or unix:/path
}

// read reads what Envoy sent. What could be read of a misfit stands in q.
func (q *question) read(c *auth.CheckRequest) *misfit {
	a := c.GetAttributes()
	sent := a.GetRequest().GetHttp()
	if sent == nil {
		return misfitf(http.StatusBadRequest, "the question holds no HTTP request: only the HTTP filter is answered, not the network filter")
	}
	q.HTTP = &q.http
	q.http.NoProof = true
	// All of them are read, whatever is wrong, for the record.
	return cmp.Or(q.readEnds(a), q.readAddresses(a), q.readSNI(a), q.readRequest(sent))
}

func (q *question) readSNI(a *auth.AttributeContext) *misfit {
	sni := a.GetTlsSession().GetSni()
	if sni == "" {
		return nil
	}
	var err error
	if q.SNI, err = canonical.Host(sni); err != nil {
		return misfitf(http.StatusBadRequest, "tls_session.sni: %w", err)
	}
	return nil
}

// readRequest reads what is asked for.
func (q *question) readRequest(sent *auth.AttributeContext_HttpRequest) *misfit {
	method, err := canonical.Method(sent.GetMethod())
	if err != nil {
		return &misfit{http.StatusBadRequest, err}
	}
	q.http.Method = method
	target, err := canonical.ParseTarget(method, sent.GetPath(), canonical.Options{})
	switch {
	case err != nil:
		return &misfit{http.StatusBadRequest, err}
	case target.String() != sent.GetPath():
		return misfitf(http.StatusBadRequest, "path: its one spelling is %s, and Envoy would forward another: let it normalize paths", clip(target.Path))
	}
	q.http.Path = target.Path
	if q.http.Host, err = canonical.Host(sent.GetHost()); err != nil {
		return &misfit{http.StatusBadRequest, err}
	}
	if q.http.Host != strings.ToLower(sent.GetHost()) {
		return misfitf(http.StatusBadRequest, "host: its one spelling is %s, and Envoy would forward another", q.http.Host)
	}
	if method == http.MethodTrace { // it would show the client what its service is told (RFC 9110, section 9.3.8)
		return misfitf(http.StatusMethodNotAllowed, "TRACE is not served")
	}
	return q.readHeaders(sent)
}

// framing are fields that rules do not see on our listeners either: they are of
// one connection, or stand elsewhere.
var framing = []string{"host", "connection", "content-length", "transfer-encoding", "trailer", "keep-alive", "proxy-connection", "upgrade"}

// readHeaders reads the fields: each line by itself where Envoy sends them so
// (encode_raw_headers), else each name once. Of a value that Envoy may have
// joined of several lines, rules see the whole and each part: a deny that names
// one of them holds, and an allow must name them all.
func (q *question) readHeaders(sent *auth.AttributeContext_HttpRequest) *misfit {
	size := len(sent.GetPath())
	add := func(name, value string) (err error) {
		if strings.HasPrefix(name, ":") {
			return nil // a pseudo-field (RFC 9113, section 8.3), which is an attribute of its own
		}
		if size += len(name) + len(value) + fieldExtra; size > maxHead || len(q.http.Headers) == maxFields {
			return errTooLarge
		}
		h := policy.Header{}
		if h.Name, err = canonical.HeaderName(name); err != nil {
			return err
		}
		if h.Value, err = canonical.HeaderValue(value); err != nil {
			return err
		}
		if !slices.Contains(framing, h.Name) {
			q.http.Headers = append(q.http.Headers, h)
		}
		return nil
	}
	var err error
	if lines := sent.GetHeaderMap().GetHeaders(); len(lines) > 0 {
		err = eachLine(lines, add)
	} else {
		err = eachJoined(sent.GetHeaders(), add)
	}
	switch {
	case errors.Is(err, errTooLarge):
		return &misfit{http.StatusRequestHeaderFieldsTooLarge, err}
	case err != nil:
		return &misfit{http.StatusBadRequest, err}
	}
	return nil
}

var errTooLarge = fmt.Errorf("the head is larger than %d bytes or has more than %d fields", maxHead, maxFields)

func eachLine(lines []*core.HeaderValue, add func(name, value string) error) error {
	for _, line := range lines {
		value := line.GetValue()
		if raw := line.GetRawValue(); len(raw) > 0 {
			value = string(raw)
		}
		if err := add(line.GetKey(), value); err != nil {
			return err
		}
	}
	return nil
}

func eachJoined(fields map[string]string, add func(name, value string) error) error {
	for name, value := range fields {
		if err := add(name, value); err != nil {
			return err
		}
		if !strings.Contains(value, ",") {
			continue
		}
		for part := range strings.SplitSeq(value, ",") {
			if err := add(name, part); err != nil {
				return err
			}
		}
	}
	return nil
}

// readAddresses reads where the request comes from and where it came to.
func (q *question) readAddresses(a *auth.AttributeContext) *misfit {
	source, err := addressOf(a.GetSource().GetAddress())
	if err != nil {
		return misfitf(http.StatusForbidden, "source.address %w", err)
	}
	q.Source = source
	if source.IsValid() {
		q.sender = source.String()
	} else {
		q.sender = unixPrefix + a.GetSource().GetAddress().GetPipe().GetPath()
	}
	destination, err := addressOf(a.GetDestination().GetAddress())
	if err != nil {
		return misfitf(http.StatusForbidden, "destination.address %w", err)
	}
	q.Port = destination.Port()
	return nil
}

// addressOf reads an address, which is the zero one for a Unix socket.
func addressOf(a *core.Address) (netip.AddrPort, error) {
	if a.GetPipe() != nil {
		return netip.AddrPort{}, nil
	}
	at := a.GetSocketAddress()
	if at == nil {
		return netip.AddrPort{}, errors.New("is missing, and rules may ask for it")
	}
	ip, err := netip.ParseAddr(at.GetAddress())
	port := at.GetPortValue()
	if err != nil || port > 0xffff {
		return netip.AddrPort{}, fmt.Errorf("%s is no IP address with a port", clip(at.GetAddress()))
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(port)), nil
}

// readEnds reads who the two ends are: the URI SANs of the TLS connection that
// the request came over. Where Envoy sends the client's certificate, rules know
// its serial and issuer too, by which it may be revoked.
func (q *question) readEnds(a *auth.AttributeContext) *misfit {
	from, fromErr := idOf(a.GetSource().GetPrincipal())
	to, toErr := idOf(a.GetDestination().GetPrincipal())
	q.From, q.To = policy.Peer{ID: from}, policy.Peer{ID: to}
	switch {
	case fromErr != nil:
		return misfitf(http.StatusForbidden, "source.principal %w: Envoy has to require a client certificate, and to verify it", fromErr)
	case toErr != nil:
		return misfitf(http.StatusForbidden, "destination.principal %w: Envoy has to present an SVID where requests come in", toErr)
	}
	sent := a.GetSource().GetCertificate()
	if sent == "" {
		return nil
	}
	leaf, err := certificateOf(sent)
	if err == nil && (len(leaf.URIs) != 1 || leaf.URIs[0].String() != from.String()) {
		err = errors.New("is not that of source.principal")
	}
	if err != nil {
		return misfitf(http.StatusForbidden, "source.certificate %w", err)
	}
	q.From = policy.PeerOf(from, leaf)
	return nil
}

// certificateOf reads a certificate as Envoy sends it with
// include_peer_certificate: PEM in the encoding of URLs. Envoy has verified it.
func certificateOf(sent string) (*x509.Certificate, error) {
	text, err := url.PathUnescape(sent)
	if err != nil {
		return nil, errors.New("is not encoded as in URLs")
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("is no PEM certificate")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %s", clip(err.Error()))
	}
	return leaf, nil
}

func idOf(principal string) (spiffeid.ID, error) {
	if principal == "" {
		return spiffeid.ID{}, errors.New("is empty")
	}
	id, err := spiffeid.FromString(principal)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("%s is no SPIFFE ID", clip(principal))
	}
	return id, nil
}

// maxShown bounds what of a stranger's words stands in an error, in bytes.
const maxShown = 64

// clip quotes what a stranger sent for an error.
func clip(s string) string {
	if len(s) > maxShown {
		return fmt.Sprintf("%q…", s[:maxShown])
	}
	return fmt.Sprintf("%q", s)
}
