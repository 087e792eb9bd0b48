package proxy

import (
	"crypto/tls"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// replace writes a file by rename.
func replace(t *testing.T, path string, data []byte) {
	t.Helper()
	err := os.WriteFile(path+".new", data, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestRevokedWhileConnected: a new CRL closes those it names, at once,
// whatever on_policy_change says, and nobody else.
func TestRevokedWhileConnected(t *testing.T) {
	ca := testca.New(t, "example.org")
	middle := ca.Intermediate()
	for _, action := range []Action{ActionClose, ActionDrain, ActionKeep} {
		t.Run(action.String(), func(t *testing.T) {
			dir := t.TempDir()
			replace(t, dir+"/root.crl", ca.CRL(1, nil))
			replace(t, dir+"/middle.crl", testca.CRLPEM(middle.CRL(1, nil)))
			ids := source(t, ca.SVID("/orders"), ca)
			crls, err := identity.NewCRLs(identity.CRLsConfig{Files: map[spiffeid.TrustDomain][]string{ca.TrustDomain: {dir + "/*.crl"}}, Identities: ids, Poll: time.Hour, Log: testLog(t)})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := crls.Close(); err != nil {
					t.Error(err)
				}
			}()
			in := inbound("orders", serve(t, echo))
			in.OnPolicyChange, in.Timeouts.Drain = action, time.Hour
			p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: ids})
			web, batch, low := ca.SVID("/web"), ca.SVID("/batch"), middle.SVID("/low")
			low.Certificate = append(low.Certificate, middle.Cert.Raw)
			dial := func(c tls.Certificate) *tls.Conn { return dialTLS(t, p.addr("orders"), clientConfig(c)) }
			webConn, batchConn, lowConn := dial(web), dial(batch), dial(low)
			for _, c := range []*tls.Conn{webConn, batchConn, lowConn} {
				say(t, c, "hello")
			}
			record := func(conn *tls.Conn, want string) {
				t.Helper()
				gone(t, conn)
				if a := p.next(); a.Closed != "revoked" || a.Outcome != "failure" || !strings.Contains(a.Reason, want) {
					t.Errorf("access record %+v\nwant %s", a, want)
				}
			}
			replace(t, dir+"/root.crl", ca.CRL(2, nil, web.Leaf))
			record(webConn, "peer certificate of spiffe://example.org/web: revoked at ")
			say(t, lowConn, "still there")
			replace(t, dir+"/root.crl", ca.CRL(3, nil, web.Leaf, middle.Cert))
			record(lowConn, "its intermediate CN=")
			again := dial(web)
			gone(t, again)
			if a := p.next(); a.Outcome != "failure" || !strings.Contains(a.Reason, "(keyCompromise), says CRL 3 of CN=") || a.From != "spiffe://example.org/web" {
				t.Errorf("access record %+v", a)
			}
			if n := p.metric("narthex_tls_handshakes_total", "orders", "revoked"); n != 1 {
				t.Errorf("%v handshakes counted as revoked", n)
			}
			say(t, batchConn, "untouched")
			if s := p.Status().CRLs; len(s) != 2 || s[0].TrustDomain != "example.org" {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// TestRevokedDuringHandshake: a CRL that comes between the handshake and the
// decision counts.
func TestRevokedDuringHandshake(t *testing.T) {
	ca := testca.New(t, "example.org")
	web := ca.SVID("/web")
	file := t.TempDir() + "/crl"
	replace(t, file, ca.CRL(1, nil))
	ids := source(t, ca.SVID("/orders"), ca)
	files := map[spiffeid.TrustDomain][]string{ca.TrustDomain: {file}}
	crls, err := identity.NewCRLs(identity.CRLsConfig{Files: files, Identities: ids, Poll: time.Hour, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = crls.Close() }()
	p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, word("hello")))}, Policy: rulesOf(t, allowAll), Identities: ids})
	raw, err := net.Dial("tcp", p.addr("orders"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	half := halt(raw)
	c := tls.Client(half, clientConfig(web))
	var shaken sync.WaitGroup
	shaken.Go(func() { _ = c.Handshake() })
	<-half.read
	replace(t, file, ca.CRL(2, nil, web.Leaf))
	crls.Configure(files)
	close(half.on)
	shaken.Wait()
	_, err = reached(c)
	_ = c.Close()
	if a := p.next(); err == nil || a.Outcome != "failure" || !strings.Contains(a.Reason, "peer certificate of spiffe://example.org/web: revoked at") {
		t.Errorf("%v, access record %+v", err, a)
	}
}
