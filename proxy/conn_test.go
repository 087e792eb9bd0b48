package proxy

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/proxy/policy"
)

func TestBadClients(t *testing.T) {
	t.Parallel()
	ca, stranger := testca.New(t, "example.org"), testca.New(t, "evil.example")
	imposter := testca.New(t, "example.org") // the right name, another key
	var reached atomic.Int64
	target := serve(t, func(net.Conn) { reached.Add(1) })
	p := run(t, Config{Listeners: []Listener{inbound("orders", target)}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	past := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	future := func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }
	twoURIs := func(c *x509.Certificate) {
		c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/admin"})
	}
	noURI := func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"web.example.org"} }
	noPath := func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}} }
	isCA := func(c *x509.Certificate) { c.IsCA = true }
	signs := func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }
	mail := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} }

	for _, test := range []struct {
		name   string
		certs  []tls.Certificate
		result string
		reason string
		from   string
	}{
		{"no certificate", nil, "no_certificate", "the client sent no certificate", ""},
		{"other trust domain", []tls.Certificate{stranger.SVID("/web")}, "untrusted", "no bundle for trust domain evil.example: it is neither ours nor federated with us", "spiffe://evil.example/web"},
		{"other authority of that name", []tls.Certificate{imposter.SVID("/web")}, "untrusted", "not signed by an authority in the bundle of example.org", "spiffe://example.org/web"},
		{"expired", []tls.Certificate{ca.SVID("/web", past)}, "expired", "expired at ", "spiffe://example.org/web"},
		{"not yet valid", []tls.Certificate{ca.SVID("/web", future)}, "expired", "are the clocks right?", "spiffe://example.org/web"},
		{"two URI SANs", []tls.Certificate{ca.SVID("/web", twoURIs)}, "not_svid", "more than one URI SAN", ""},
		{"no URI SAN", []tls.Certificate{ca.SVID("/web", noURI)}, "not_svid", "no URI SAN", ""},
		{"no path", []tls.Certificate{ca.SVID("/web", noPath)}, "not_svid", "must have a path", "spiffe://example.org"},
		{"a CA", []tls.Certificate{ca.SVID("/web", isCA)}, "not_svid", "must not be a CA", "spiffe://example.org/web"},
		{"may sign CRLs", []tls.Certificate{ca.SVID("/web", signs)}, "not_svid", "must not be allowed to sign", "spiffe://example.org/web"},
		{"other key usage", []tls.Certificate{ca.SVID("/web", mail)}, "untrusted", "incompatible key usage", "spiffe://example.org/web"},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(test.name+"/"+tls.VersionName(version), func(t *testing.T) {
				before := p.metric("narthex_tls_handshakes_total", "orders", test.result)
				cc := clientConfig(test.certs...)
				cc.MaxVersion = version
				c, err := tls.Dial("tcp", p.addr("orders"), cc)
				if err == nil { // TLS 1.3: the client learns it with its first read
					_ = c.SetDeadline(time.Now().Add(patience))
					_, _ = io.WriteString(c, "must not arrive")
					_, err = c.Read(make([]byte, 1))
					_ = c.Close()
				}
				var alert *net.OpError
				if !errors.As(err, &alert) || alert.Op != "remote error" {
					t.Errorf("client got no alert but %v", err)
				}
				a := p.next()
				if !strings.Contains(a.Reason, test.reason) || a.Outcome != "failure" || a.From != test.from || a.Decision != "" || a.Listener != "orders" {
					t.Errorf("access record %+v\nwant reason %q", a, test.reason)
				}
				if got := p.metric("narthex_tls_handshakes_total", "orders", test.result) - before; got != 1 {
					t.Errorf("handshakes with result %s: %v", test.result, got)
				}
			})
		}
	}
	for _, test := range []struct{ name, bytes, reason string }{
		{"plain HTTP", "GET / HTTP/1.1\r\nHost: orders\r\n\r\n", "not a TLS client: it speaks plain HTTP; this port speaks TLS"},
		{"noise", "\x00\x01\x02\x03\x04\x05\x06\x07", "not a TLS client: its first bytes are 0001020304"},
		{"nothing", "", "the peer closed the connection during the handshake"},
		{"half a hello", "\x16\x03\x01\x02\x00\x01\x00", "the peer closed the connection during the handshake"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := net.Dial("tcp", p.addr("orders"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, test.bytes); err != nil {
				t.Fatal(err)
			}
			_ = c.(*net.TCPConn).CloseWrite()
			_, _ = io.ReadAll(c)
			_ = c.Close()
			if a := p.next(); a.Reason != test.reason || a.Outcome != "failure" {
				t.Errorf("access record %+v\nwant reason %q", a, test.reason)
			}
		})
	}
	t.Run("denied by policy", func(t *testing.T) {
		p.apply(denyAll)
		wantRefused(t, p, clientConfig(ca.SVID("/web")), "policy: denied by a rule (nobody)")
	})
	t.Run("no policy", func(t *testing.T) {
		c := p.config
		c.Policy = nil
		if _, err := p.Apply(c); err != nil {
			t.Fatal(err)
		}
		wantRefused(t, p, clientConfig(ca.SVID("/web")), "policy: no policy is loaded")
	})
	if n := reached.Load(); n != 0 {
		t.Errorf("the target was dialled for %d refused clients", n)
	}
}

func TestTargetDown(t *testing.T) {
	ca := testca.New(t, "example.org")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := l.Addr().String()
	_ = l.Close()
	p := run(t, Config{Listeners: []Listener{inbound("orders", target)}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	wantRefused(t, p, clientConfig(ca.SVID("/web")), "target: dial tcp "+target+": connect: connection refused")
	if got := p.metric("narthex_connections_total", "orders", "failed"); got != 1 {
		t.Errorf("failed connections: %v", got)
	}
	if s := p.Status().Listeners[0]; s.Failed != 1 || s.Refused != 0 {
		t.Errorf("the status counts %d failed and %d refused", s.Failed, s.Refused)
	}
}

// tlsPeer is a server that an outbound listener dials; got receives what
// arrives on each connection and how many certificates the proxy showed.
func tlsPeer(t *testing.T, cert tls.Certificate, version uint16) (addr string, got chan string, shown *atomic.Int64) {
	t.Helper()
	got, shown = make(chan string, 8), new(atomic.Int64)
	config := &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert, MaxVersion: version}
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		shown.Add(int64(len(cs.PeerCertificates)))
		return nil
	}
	addr = serve(t, func(c net.Conn) {
		s := tls.Server(c, config)
		b, _ := io.ReadAll(s)
		got <- string(b)
	})
	return addr, got, shown
}

// In TLS 1.3 a target refuses our certificate when our handshake is over: that
// is a failure all the same.
func TestTargetRefusesUs(t *testing.T) {
	ca := testca.New(t, "example.org")
	config := &tls.Config{Certificates: []tls.Certificate{ca.SVID("/orders")}, ClientAuth: tls.RequireAnyClientCert}
	config.VerifyConnection = func(tls.ConnectionState) error { return errors.New("not you") }
	refusing := serve(t, func(c net.Conn) { _ = tls.Server(c, config).Handshake() })
	p := run(t, Config{
		Listeners: []Listener{outbound(t, "to-orders", refusing, "spiffe://example.org/orders")}, Policy: rulesOf(t, allowAll),
		Identities: source(t, ca.SVID("/web"), ca),
	})
	c, err := net.Dial("tcp", p.addr("to-orders"))
	if err == nil { // else the reset was there first
		defer func() { _ = c.Close() }()
	}
	if a := p.next(); a.Outcome != "failure" || a.Closed != "error" || a.Reason != "the target ended the handshake: bad certificate" {
		t.Errorf("access record %+v", a)
	}
}

// A proxy that refuses a caller by its rules says nothing, once the handshake is
// over for both.
func TestFarProxyRefusesUs(t *testing.T) {
	ca := testca.New(t, "example.org")
	server := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, denyAll), Identities: source(t, ca.SVID("/orders"), ca)})
	p := run(t, Config{
		Listeners: []Listener{outbound(t, "to-orders", server.addr("orders"), "spiffe://example.org/orders")}, Policy: rulesOf(t, allowAll),
		Identities: source(t, ca.SVID("/web"), ca),
	})
	c, err := net.Dial("tcp", p.addr("to-orders"))
	if err == nil { // else the reset was there first
		defer func() { _ = c.Close() }()
	}
	if a := p.next(); a.Outcome != "failure" || a.Closed != "error" || !strings.HasPrefix(a.Reason, "the far end closed without a word right after the handshake: its rules most likely refuse this caller") {
		t.Errorf("access record %+v", a)
	}
}

func TestOutboundPeerMustBeExpected(t *testing.T) {
	t.Parallel()
	ca, stranger := testca.New(t, "example.org"), testca.New(t, "evil.example")
	const inventory = "spiffe://example.org/inventory"
	for _, test := range []struct {
		name, rules string
		peer        tls.Certificate
		reason, to  string
		early       bool // refused before the proxy shows its certificate in TLS 1.3
	}{
		{"not expected", allowAll, ca.SVID("/orders"), "valid, but not who `expect` names: " + inventory, "spiffe://example.org/orders", true},
		{"other trust domain", allowAll, stranger.SVID("/inventory"), "no bundle for trust domain evil.example", "spiffe://evil.example/inventory", true},
		{"denied", denyAll, ca.SVID("/inventory"), "policy: denied by a rule (nobody)", inventory, false},
		{"not SPIFFE", allowAll, ca.SVID("/x", func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"localhost"} }), "no URI SAN", "", true},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(test.name+"/"+tls.VersionName(version), func(t *testing.T) {
				addr, got, shown := tlsPeer(t, test.peer, version)
				p := run(t, Config{Listeners: []Listener{outbound(t, "out", addr, inventory)}, Policy: rulesOf(t, test.rules), Identities: source(t, ca.SVID("/web"), ca)})
				c, err := net.Dial("tcp", p.addr("out"))
				if err == nil { // else the reset came sooner than this test
					_, _ = io.WriteString(c, "secret")
					_, err = c.Read(make([]byte, 1))
					_ = c.Close()
				}
				if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
					t.Errorf("the caller got %v, want a reset", err)
				}
				if s := <-got; s != "" {
					t.Errorf("%q left for a peer that was not proven", s)
				}
				if n := shown.Load(); test.early && version == tls.VersionTLS13 && n != 0 {
					t.Errorf("%d of our certificates shown to a peer that was not proven", n)
				}
				if a := p.next(); !strings.Contains(a.Reason, test.reason) || a.To != test.to || a.From != "spiffe://example.org/web" || a.BytesIn != 0 {
					t.Errorf("access record %+v\nwant reason %q", a, test.reason)
				}
			})
		}
	}
}

// TestOutboundTargetWithoutTLS dials what is no TLS server.
func TestOutboundTargetWithoutTLS(t *testing.T) {
	ca := testca.New(t, "example.org")
	for answer, want := range map[string]string{
		"HTTP/1.1 400 Bad Request\r\n\r\n": "the target is no TLS server: it answered with plain HTTP",
		"SSH-2.0-OpenSSH\r\n":              `the target is no TLS server: it answered with "SSH-2"`,
		"\x00\x01\x02\x03\x04\x05":         "the target is no TLS server: it answered with the bytes 0001020304",
		"":                                 "the target closed the connection during the handshake: does it speak mTLS?",
	} {
		log := &lines{}
		addr := serve(t, func(c net.Conn) {
			_, _ = c.Read(make([]byte, 16<<10)) // the hello: unread, it would turn the close into a reset
			_, _ = io.WriteString(c, answer)
		})
		p := run(t, Config{
			Listeners: []Listener{outbound(t, "out", addr, "spiffe://example.org/inventory")}, Policy: rulesOf(t, allowAll),
			Identities: source(t, ca.SVID("/web"), ca), Log: hclog.New(&hclog.LoggerOptions{Output: log}),
		})
		c, err := net.Dial("tcp", p.addr("out"))
		a := p.next()
		if err == nil { // else the reset came sooner than this test
			_ = c.Close()
		}
		if !strings.HasPrefix(a.Reason, want) {
			t.Errorf("reason %q, want %q", a.Reason, want)
		}
		p.stop()
		if log.count("target="+addr) != 1 {
			t.Errorf("the log does not name the target once:\n%s", log.text.String())
		}
	}
}

func TestSomeOf(t *testing.T) {
	var patterns []policy.Pattern
	for _, want := range []string{
		"", "spiffe://a/b", "spiffe://a/b or spiffe://a/b", "spiffe://a/b or spiffe://a/b or spiffe://a/b",
		"spiffe://a/b, spiffe://a/b, spiffe://a/b or 1 more",
	} {
		if got := someOf(patterns); got != want {
			t.Errorf("%d patterns: %q, want %q", len(patterns), got, want)
		}
		patterns = append(patterns, patternOf(t, "spiffe://a/b"))
	}
}

func TestOutboundServerName(t *testing.T) {
	for target, want := range map[string]string{
		"inventory.shop.svc:8443": "inventory.shop.svc", "inventory.shop.svc.:8443": "inventory.shop.svc",
		"10.0.0.1:8443": "", "[::1]:8443": "", "[fe80::1%eth0]:8443": "", "unix:/run/x": "",
	} {
		if got := serverNameOf(target); got != want {
			t.Errorf("server name of %s: %q, want %q", target, got, want)
		}
	}
}

func TestHalfCloseBothWays(t *testing.T) {
	ca := testca.New(t, "example.org")
	// This target speaks only once the client has finished.
	late := serve(t, func(c net.Conn) {
		b, _ := io.ReadAll(c)
		_, _ = io.WriteString(c, "got "+string(b))
	})
	// This one finishes first and still listens.
	heard := make(chan string, 1)
	early := serve(t, func(c net.Conn) {
		_, _ = io.WriteString(c, "hello")
		_ = c.(*net.TCPConn).CloseWrite()
		b, _ := io.ReadAll(c)
		heard <- string(b)
	})
	p := run(t, Config{Listeners: []Listener{inbound("late", late), inbound("early", early)}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))
	c := dialTLS(t, p.addr("late"), cc)
	if _, err := io.WriteString(c, "all"); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "got all" {
		t.Errorf("after our half-close: %q, %v", b, err)
	}
	p.next()

	c = dialTLS(t, p.addr("early"), cc)
	if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
		t.Errorf("until its half-close: %q, %v", b, err)
	}
	if _, err := io.WriteString(c, "and on"); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if got := <-heard; got != "and on" {
		t.Errorf("after its half-close the target heard %q", got)
	}
	if a := p.next(); a.Reason != "ended by the target" || a.Outcome != "success" {
		t.Errorf("access record %+v", a)
	}
}

// TestBreakOffIsPassedOn: a stream that was not finished must not look
// finished at the other end, whichever end broke it off and however.
func TestBreakOffIsPassedOn(t *testing.T) {
	ca := testca.New(t, "example.org")
	ended := make(chan error, 1)
	target := serve(t, func(c net.Conn) {
		buf := make([]byte, 5)
		if _, err := io.ReadFull(c, buf); err != nil {
			ended <- err
			return
		}
		if string(buf) == "break" {
			_ = c.(*net.TCPConn).SetLinger(0)
			return
		}
		_, _ = c.Write(buf)
		_, err := c.Read(buf)
		ended <- err
	})
	half := serve(t, func(c net.Conn) {
		_, _ = io.WriteString(c, "half an ans")
		_, _ = io.ReadAll(c)
		_ = c.(*net.TCPConn).SetLinger(0)
	})
	p := run(t, Config{Listeners: []Listener{inbound("orders", target), inbound("half", half)}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))

	t.Run("client resets", func(t *testing.T) {
		c := dialTLS(t, p.addr("orders"), cc)
		say(t, c, "hello")
		abort(c.NetConn())
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the target got %v, want a reset", err)
		}
		if a := p.next(); a.Reason != "client: connection reset" || a.Closed != "peer" {
			t.Errorf("access record %+v", a)
		}
	})
	t.Run("client ends without close_notify", func(t *testing.T) {
		c := dialTLS(t, p.addr("orders"), cc)
		say(t, c, "hello")
		_ = c.NetConn().Close()
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the target got %v, want a reset", err)
		}
		if a := p.next(); a.Reason != "client: ended without TLS close_notify" {
			t.Errorf("access record %+v", a)
		}
	})
	t.Run("target resets after the client has finished", func(t *testing.T) {
		c := dialTLS(t, p.addr("half"), cc)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client got %v, want a reset", err)
		}
		if a := p.next(); a.Reason != "target: connection reset" {
			t.Errorf("access record %+v", a)
		}
	})
	t.Run("target resets", func(t *testing.T) {
		c := dialTLS(t, p.addr("orders"), cc)
		if _, err := io.WriteString(c, "break"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the client got %v, want anything but an orderly end", err)
		}
		if a := p.next(); a.Reason != "target: connection reset" || a.Closed != "peer" {
			t.Errorf("access record %+v", a)
		}
	})
}

func TestTargetAnswersEarlyAndCloses(t *testing.T) {
	ca := testca.New(t, "example.org")
	target := serve(t, func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 10))
		_, _ = io.WriteString(c, "too large")
	})
	p := run(t, Config{Listeners: []Listener{inbound("orders", target)}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	if _, err := io.WriteString(c, "0123456789"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "too large" {
		t.Errorf("the early answer: %q, %v", b, err)
	}
	_ = c.Close()
	p.next()
}

func TestClientDoesNotTrustUs(t *testing.T) {
	ca, other := testca.New(t, "example.org"), testca.New(t, "example.org")
	p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "orders", Certificates: []tls.Certificate{ca.SVID("/web")}}
	cc.RootCAs.AddCert(other.Cert)
	if _, err := tls.Dial("tcp", p.addr("orders"), cc); err == nil {
		t.Fatal("the client trusts us")
	}
	if a := p.next(); !strings.HasPrefix(a.Reason, "the peer ended the handshake: ") || a.ServerName != "orders" {
		t.Errorf("access record %+v", a)
	}
	if got := p.metric("narthex_tls_handshakes_total", "orders", "peer_alert"); got != 1 {
		t.Errorf("handshakes ended by an alert: %v", got)
	}
}

func TestIntermediates(t *testing.T) {
	root := testca.New(t, "example.org")
	middle := root.Intermediate()
	p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: source(t, middle.SVID("/orders"), root)})
	cert := middle.SVID("/web")
	wantRefused(t, p, clientConfig(cert), "not signed by an authority in the bundle of example.org")
	cert.Certificate = append(cert.Certificate, middle.Cert.Raw)
	say(t, dialTLS(t, p.addr("orders"), clientConfig(cert)), "hello")
}

func TestMaxHandshakes(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.MaxHandshakes, in.Timeouts.Handshake = 1, 200*time.Millisecond
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	l := p.world.Load().named("orders")
	l.handshakes.force() // another one's handshake takes its time
	wantRefused(t, p, clientConfig(ca.SVID("/web")), "too many handshakes at once: no turn within 200ms, with 1 that compute at a time")
	l.handshakes.give()
	say(t, dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web"))), "hello")
}

func TestMaxConnections(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.MaxConnections = 1
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))
	first := dialTLS(t, p.addr("orders"), cc)
	say(t, first, "hello")
	second, err := net.Dial("tcp", p.addr("orders"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = second.Close() }()
	waiting := tls.Client(second, cc)
	done := make(chan error, 1)
	go func() { done <- waiting.Handshake() }()
	say(t, first, "the second waits")
	if n := p.Status().Listeners[0].Active; n != 1 {
		t.Errorf("%d connections active, limit 1", n)
	}
	_ = first.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	say(t, waiting, "its turn")
}

func TestBuffersGrowAndShrink(t *testing.T) {
	sizes := make(chan int, 64)
	src := &chunks{sizes: sizes, left: []int{4 << 10, 16 << 10, 64 << 10, 10, 10, 10}}
	ours, theirs := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, theirs) }()
	var n atomic.Uint64
	p := newInstruments(nil).of("x")
	forth := &stream{sleeper: sleeper{src: newBare(src)}, dst: halfPipe{ours}, flow: flow{&n, p.bytesIn}}
	if how, err := forth.pump(); how != copyEnded || err != nil {
		t.Errorf("%v, %v", how, err)
	}
	_ = ours.Close()
	_ = theirs.Close()
	close(sizes)
	var got []int
	for s := range sizes {
		got = append(got, s>>10)
	}
	want := []int{4, 16, 64, 64, 16, 4, 4}
	for i := range want {
		if i >= len(got) || got[i] != want[i] {
			t.Fatalf("buffers in KiB: %v, want %v", got, want)
		}
	}
}

// chunks is an end that yields reads of given lengths and notes the buffers
// it was given.
type chunks struct {
	end
	sizes chan int
	left  []int
}

func (c *chunks) Read(b []byte) (int, error) {
	c.sizes <- len(b)
	if len(c.left) == 0 {
		return 0, io.EOF
	}
	n := c.left[0]
	c.left = c.left[1:]
	_, _ = rand.Read(b[:n])
	return n, nil
}
