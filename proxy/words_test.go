package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"
)

func TestHostName(t *testing.T) {
	for sni, want := range map[string]string{
		"": "", "orders.shop.svc": "orders.shop.svc", "_x.A-1": "_x.A-1", strings.Repeat("a", 255): strings.Repeat("a", 255),
		strings.Repeat("a", 256): invalidServerName, "a b": invalidServerName, "a\x1b[31m": invalidServerName, "a\u2028": invalidServerName,
	} {
		if got := hostName(sni); got != want {
			t.Errorf("%q: %q, want %q", sni, got, want)
		}
	}
}

// TestStrangersWriteLittle: what a client that proved nothing chooses is
// bounded in the access log and in the log.
func TestStrangersWriteLittle(t *testing.T) {
	t.Parallel()
	ca, other := testca.New(t, "example.org"), testca.New(t, "example.org")
	uri := func(size int) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/" + strings.Repeat("a", size-len("spiffe://example.org/"))}}
		}
	}
	many, large := other.SVID("/web"), other.SVID("/web", func(c *x509.Certificate) { c.DNSNames = []string{strings.Repeat("d", 100_000)} })
	for range 10 {
		many.Certificate = append(many.Certificate, other.Cert.Raw)
	}
	for _, test := range []struct {
		name         string
		cert         tls.Certificate
		sni          string
		reason, from string
		serverName   string
	}{
		{"longest SPIFFE ID", ca.SVID("/web", uri(2048)), "", "policy: no policy is loaded", uri2048, ""},
		{"longer", ca.SVID("/web", uri(2049)), "", "a URI SAN has 2049 bytes, a SPIFFE ID has at most 2048", "", ""},
		{"immense", other.SVID("/web", uri(200_000)), "", "at most 65536 are accepted", "", ""},
		{"many certificates", many, "", "11 certificates, at most 10 are accepted", "", ""},
		{"large certificates", large, "", "at most 65536 are accepted", "", ""},
		{"server name", other.SVID("/web"), strings.Repeat("a.", 5_000) + "a", "not signed by", "spiffe://example.org/web", invalidServerName},
		{"server name of no host", other.SVID("/web"), "a\x1b[31m\nb", "not signed by", "spiffe://example.org/web", invalidServerName},
	} {
		t.Run(test.name, func(t *testing.T) {
			log := &lines{}
			p := run(t, Config{
				Listeners: []Listener{inbound("orders", "127.0.0.1:1")}, Identities: source(t, ca.SVID("/orders"), ca),
				Log: hclog.New(&hclog.LoggerOptions{Output: log}),
			})
			cc := clientConfig(test.cert)
			cc.ServerName = test.sni
			raw, err := net.Dial("tcp", p.addr("orders"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = raw.Close() }()
			c := tls.Client(raw, cc)
			_ = c.SetDeadline(time.Now().Add(patience))
			_, _ = c.Read(make([]byte, 1))
			a := p.next()
			if !strings.Contains(a.Reason, test.reason) || a.From != test.from || a.ServerName != test.serverName {
				t.Errorf("access record %+v\nwant reason %q", a, test.reason)
			}
			if n := len(fmt.Sprintf("%+v", a)); n > 4<<10 {
				t.Errorf("an access record of %d bytes", n)
			}
			p.stop()
			if n := len(log.text.String()); n > 6<<10 {
				t.Errorf("%d bytes of log", n)
			}
		})
	}
}

var uri2048 = "spiffe://example.org/" + strings.Repeat("a", 2048-len("spiffe://example.org/"))
