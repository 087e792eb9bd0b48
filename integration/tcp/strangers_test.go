//go:build integration

package tcp_test

import (
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// stranger is a certificate that is not as it has to be.
type stranger struct {
	name   string
	own    *svid
	reason string // as recorded
}

// strangers are those that neither a client nor a server may show. With them
// goes ca, which speaks for example.org, and partner, which speaks for
// partner.example; both are trusted.
func strangers(t *testing.T, ca, partner *authority) []stranger {
	t.Helper()
	id := ca.id("/peer")
	impostor := newAuthority(t, "example.org") // the same name, another key
	below := ca.intermediate()
	alone := below.leaf("/peer")
	alone.withoutChain(t)
	expired := ca.intermediate(lasting(-time.Second))
	constrained := ca.intermediate(func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	return []stranger{
		{"wrong-chain", impostor.leaf("/peer"), "not signed by an authority in the bundle of example.org"},
		{"partner-speaks-for-us", partner.leaf("/peer", withURIs(id)), "not signed by an authority in the bundle of example.org"},
		{"we-speak-for-partner", ca.leaf("/peer", withURIs("spiffe://partner.example/peer")), "not signed by an authority in the bundle of partner.example"},
		{"unknown-domain", newAuthority(t, "elsewhere.example").leaf("/peer"), "no bundle for trust domain elsewhere.example"},
		{"no-uri", ca.leaf("/peer", withURIs()), "no URI SAN"},
		{"two-uris", ca.leaf("/peer", withURIs(id, id)), "more than one URI SAN"},
		{"another-scheme", ca.leaf("/peer", withURIs("https://example.org/peer")), "scheme"},
		{"no-path", ca.leaf("/peer", withURIs("spiffe://example.org")), "must have a path"},
		{"expired", ca.leaf("/peer", lasting(-time.Second)), "expired at"},
		{"too-early", ca.leaf("/peer", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), "not valid before"},
		{"authority", ca.leaf("/peer", func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), "must not be a CA"},
		{"signer", ca.leaf("/peer", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), "must not be allowed to sign"},
		{"for-code", ca.leaf("/peer", usedFor(x509.ExtKeyUsageCodeSigning)), "incompatible key usage"},
		{"chain-missing", alone, "not signed by an authority"},
		{"chain-expired", expired.leaf("/peer"), "expired"},
		{"chain-too-long", constrained.intermediate().leaf("/peer"), "too many intermediates"},
	}
}

// withoutChain leaves the leaf alone in the files.
func (s *svid) withoutChain(t *testing.T) {
	t.Helper()
	s.chain = s.chain[:1]
	stage.WriteFile(t, s.certFile, s.certPEM(), 0o644)
}

// TestStrangersInbound comes to an inbound listener with each, in TLS 1.2 and
// 1.3. Nothing of them reaches the service.
func TestStrangersInbound(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	partner := newAuthority(t, "partner.example")
	d.trust(partner)
	d.Stop()
	d.rules(d.clientMay(), allow("peer-may", d.ca.id("/peer")), allow("partner-may", partner.id("/peer")))
	d.start()
	all := append(strangers(t, d.ca, partner), stranger{"not-allowed", d.ca.leaf("/visitor"), "no rule allows"}, stranger{"none", nil, "the client sent no certificate"})
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		for _, s := range all {
			t.Run(s.name+version, func(t *testing.T) {
				skip, dialled := len(d.Records()), d.service.dialled.Load()
				args := []string{version}
				if s.own != nil {
					args = with(s.own, version)
				}
				if out := sClient(t, d.address, args...); strings.Contains(out, answer) {
					t.Fatalf("it was answered:\n%s", out)
				}
				d.refused(skip, s.reason)
				if d.service.dialled.Load() != dialled {
					t.Error("the service was dialled")
				}
			})
		}
		welcome := map[string]*svid{"partner": partner.leaf("/peer"), "below": d.ca.intermediate().intermediate().leaf("/peer"), "client-usage": d.ca.leaf("/peer", usedFor(x509.ExtKeyUsageClientAuth))}
		for name, s := range welcome {
			t.Run(name+version, func(t *testing.T) {
				skip := len(d.Records())
				if out := sClient(t, d.address, with(s, version)...); !strings.Contains(out, answer) {
					t.Fatalf("it was not answered:\n%s", out)
				}
				d.Record(skip, name, func(a telemetry.Access) bool { return a.From == s.id && a.Decision == "allow" })
			})
		}
	}
}

// TestStrangersOutbound goes to servers that show each. Not a byte of the
// caller's leaves, and the caller is told by a reset.
func TestStrangersOutbound(t *testing.T) {
	t.Parallel()
	ca, partner := newAuthority(t, "example.org"), newAuthority(t, "partner.example")
	n := newNode(t, "out", ca.leaf("/client"), ca, partner)
	n.rules(allow("all", ca.id("/client"), `to: ["spiffe://example.org/peer", "spiffe://example.org/other", "spiffe://partner.example/peer"]`))
	all := append(strangers(t, ca, partner),
		stranger{"unexpected", ca.leaf("/other"), "not who `expect` names"},
		stranger{"not-allowed", ca.leaf("/unruly"), "no rule allows"},
	)
	addresses := make([]string, len(all))
	servers := make([]*stage.Process, len(all))
	for i, s := range all {
		var target string
		servers[i], target = sServer(t, s.own, "-Verify", "1")
		expect := ca.id("/peer")
		switch s.name {
		case "we-speak-for-partner":
			expect = partner.id("/peer")
		case "not-allowed":
			expect = ca.id("/unruly")
		}
		addresses[i] = n.outbound(fmt.Sprintf("out-%d", i), target, expect)
	}
	_, target := sServer(t, ca.leaf("/peer"))
	good := n.outbound("good", target, ca.id("/peer"))
	n.start()
	for i, s := range all {
		t.Run(s.name, func(t *testing.T) {
			skip := len(n.Records())
			line, err := say(addresses[i], "secret")
			if line != "" || !isReset(err) {
				t.Errorf("the caller got %q, %v; want a reset", line, err)
			}
			n.refused(skip, s.reason)
			servers[i].Stop()
			if strings.Contains(servers[i].Said(), "secret") {
				t.Error("the server heard the caller")
			}
		})
	}
	if line, err := say(good, "hello"); line != "olleh" {
		t.Errorf("the right server: %q, %v", line, err)
	}
}
