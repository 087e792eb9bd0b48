package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	pires "github.com/pires/go-proxyproto"

	"github.com/narthex-id/narthex/proxy/proxyproto"
)

var (
	loopback  = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	elsewhere = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
)

// faraway is a client that only a header can name.
var faraway = proxyproto.Header{Source: netip.MustParseAddrPort("198.51.100.7:40001"), Destination: netip.MustParseAddrPort("203.0.113.9:443")}

// headed is a client whose connection begins with head, sent in pieces of the
// given size, or in one with the hello for 0.
type headed struct {
	net.Conn
	head  []byte
	piece int
}

func (h *headed) Write(b []byte) (int, error) {
	head := h.head
	h.head = nil
	if h.piece == 0 {
		n, err := h.Conn.Write(append(head, b...))
		return max(0, n-len(head)), err
	}
	for part := range slices.Chunk(head, h.piece) {
		if _, err := h.Conn.Write(part); err != nil {
			return 0, err
		}
	}
	return h.Conn.Write(b)
}

// dialHeaded connects with a header before the hello.
func dialHeaded(t testing.TB, network, addr string, head []byte, piece int, cc *tls.Config) *tls.Conn {
	t.Helper()
	raw, err := net.DialTimeout(network, addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	c := tls.Client(&headed{raw, head, piece}, cc)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// heads are a target that tells of each connection the header it began with,
// read by another implementation.
func heads(t testing.TB) (string, <-chan *pires.Header) {
	t.Helper()
	got := make(chan *pires.Header, 10)
	return serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		h, err := pires.Read(r)
		if err != nil {
			t.Errorf("the target reads the header: %v", err)
			return
		}
		got <- h
		_, _ = io.WriteString(c, "welcome\n") // the server speaks first
		_, _ = io.Copy(c, r)
	}), got
}

func welcomed(t testing.TB, c net.Conn) {
	t.Helper()
	line := make([]byte, len("welcome\n"))
	if _, err := io.ReadFull(c, line); err != nil || string(line) != "welcome\n" {
		t.Fatalf("the target's first words: %q, %v", line, err)
	}
}

// TestHeaderIn: who is trusted names the client, in the access log and to the
// target, however the header comes.
func TestHeaderIn(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	target, got := heads(t)
	in := inbound("orders", target)
	in.ProxyProtocol = ProxyProtocol{Send: proxyproto.V2, AcceptFrom: append(elsewhere, loopback...)}
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	six := proxyproto.Header{Source: netip.MustParseAddrPort("[2001:db8::7]:40001"), Destination: netip.MustParseAddrPort("[2001:db8::9]:443")}
	for name, c := range map[string]struct {
		head         []byte
		source, dest string // empty: those of the socket
	}{
		"v1":               {faraway.AppendV1(nil), "198.51.100.7:40001", "203.0.113.9:443"},
		"v1 IPv6":          {six.AppendV1(nil), "[2001:db8::7]:40001", "[2001:db8::9]:443"},
		"v1 UNKNOWN":       {[]byte("PROXY UNKNOWN\r\n"), "", ""},
		"v2":               {faraway.AppendV2(nil), "198.51.100.7:40001", "203.0.113.9:443"},
		"v2 IPv6 and TLVs": {six.AppendV2(nil, proxyproto.Authority("x"), proxyproto.PeerID("spiffe://example.org/liar")), "[2001:db8::7]:40001", "[2001:db8::9]:443"},
		"v2 LOCAL":         {new(proxyproto.Header).AppendV2(nil), "", ""},
	} {
		for _, piece := range []int{0, 1, 7} {
			t.Run(fmt.Sprintf("%s in pieces of %d", name, piece), func(t *testing.T) {
				conn := dialHeaded(t, "tcp", p.addr("orders"), c.head, piece, clientConfig(ca.SVID("/web")))
				own := conn.LocalAddr().String()
				if err := conn.Handshake(); err != nil {
					t.Fatal(err)
				}
				welcomed(t, conn)
				say(t, conn, "hello")
				_ = conn.Close()
				a, h := p.next(), <-got
				wantSource, wantDest := c.source, c.dest
				if wantSource == "" {
					wantSource, wantDest = own, p.addr("orders")
				}
				if a.Source != wantSource || a.Via != own || a.From != "spiffe://example.org/web" || a.Outcome != "success" {
					t.Errorf("access record %+v", a)
				}
				if h.SourceAddr.String() != wantSource || h.DestinationAddr.String() != wantDest {
					t.Errorf("the target was told of %v to %v", h.SourceAddr, h.DestinationAddr)
				}
				if id := tlvOf(t, h, proxyproto.TypePeerID); id != "spiffe://example.org/web" {
					t.Errorf("the target was told of %q", id)
				}
			})
		}
	}
}

func tlvOf(t testing.TB, h *pires.Header, kind byte) string {
	t.Helper()
	tlvs, err := h.TLVs()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range tlvs {
		if byte(v.Type) == kind {
			return string(v.Value)
		}
	}
	return ""
}

// TestHeaderRefused: who must send a header and does not is refused, and so is
// who may not and does.
func TestHeaderRefused(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	trusting, strict := inbound("trusting", serve(t, echo)), inbound("strict", serve(t, echo))
	trusting.ProxyProtocol.AcceptFrom, strict.ProxyProtocol.AcceptFrom = loopback, elsewhere
	hurried := trusting
	hurried.Name, hurried.Timeouts.Handshake = "hurried", 100*time.Millisecond
	p := run(t, Config{Listeners: []Listener{trusting, hurried, strict}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	hello := string(clientHello(t))
	for name, c := range map[string]struct {
		listener, sends string
		leaves          bool
		want            string
	}{
		"no header":             {"trusting", hello, false, "must send a PROXY header: no PROXY header: the first bytes are 160301"},
		"bad header":            {"trusting", "PROXY TCP4 198.51.100.7 203.0.113.9 40001 x\r\n" + hello, false, `destination: "x" is no port`},
		"half a header":         {"trusting", "PROXY TCP4 198.51", true, "the PROXY header ends after 17 bytes"},
		"a header and a halt":   {"hurried", "PROXY TCP4 198.51", false, "sent no PROXY header within 100ms"},
		"nothing":               {"hurried", "", false, "sent no PROXY header within 100ms"},
		"nothing, and leaves":   {"trusting", "", true, "left without a PROXY header"},
		"two headers":           {"trusting", strings.Repeat("PROXY UNKNOWN\r\n", 2) + hello, false, "not a TLS client: its first bytes are 50524f5859"},
		"header of a stranger":  {"strict", "PROXY UNKNOWN\r\n" + hello, false, "not a TLS client: its first bytes are 50524f5859"},
		"header of a stranger2": {"strict", string(faraway.AppendV2(nil)) + hello, false, "not a TLS client: its first bytes are 0d0a0d0a00"},
	} {
		conn, err := net.DialTimeout("tcp", p.addr(c.listener), patience)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, c.sends); err != nil && c.listener != "hurried" {
			t.Fatal(err) // who is hurried may be gone
		}
		if c.leaves {
			_ = conn.(*net.TCPConn).CloseWrite()
		}
		a := p.next()
		if !strings.Contains(a.Reason, c.want) || a.Outcome != "failure" || a.Decision != "" || a.Source != conn.LocalAddr().String() {
			t.Errorf("%s: access record %+v", name, a)
		}
		_ = conn.Close()
	}
	if n := p.metric("narthex_tls_handshakes_total", "trusting,not_tls"); n != 1 { // the second header
		t.Errorf("%v handshakes of what sent no header", n)
	}
}

// clientHello is the first flight of a TLS client.
func clientHello(t testing.TB) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	defer func() { _ = ours.Close() }()
	go func() { _ = tls.Client(theirs, clientConfig()).Handshake(); _ = theirs.Close() }()
	b := make([]byte, 4096)
	n, err := ours.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// TestHeaderSilentMakesRoom: who owes a header is silent, on an outbound
// listener too.
func TestHeaderSilentMakesRoom(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	server := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	out := outbound(t, "out", server.addr("orders"), "spiffe://example.org/orders")
	out.ProxyProtocol.AcceptFrom, out.MaxConnections = loopback, 1
	p := run(t, Config{Listeners: []Listener{out}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/web"), ca)})
	silent, err := net.Dial("tcp", p.addr("out"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	p.until("it is accepted", func() bool { return p.Status().Listeners[0].Active == 1 })
	c, err := net.Dial("tcp", p.addr("out"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(faraway.AppendV1(nil)); err != nil {
		t.Fatal(err)
	}
	say(t, c, "hello")
	if a := p.next(); a.Source != silent.LocalAddr().String() || a.Outcome != "failure" {
		t.Errorf("access record %+v", a)
	}
}

// TestHeaderOut: what the target of an inbound listener is told.
func TestHeaderOut(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	for _, version := range []proxyproto.Version{proxyproto.V1, proxyproto.V2} {
		t.Run(version.String(), func(t *testing.T) {
			t.Parallel()
			target, got := heads(t)
			in := inbound("orders", target)
			in.ProxyProtocol.Send = version
			p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
			cc := clientConfig(ca.SVID("/web"))
			cc.ServerName, cc.MaxVersion = "db.example.org", tls.VersionTLS12
			c := dialTLS(t, p.addr("orders"), cc)
			welcomed(t, c)
			say(t, c, "hello")
			h := <-got
			if h.SourceAddr.String() != c.LocalAddr().String() || h.DestinationAddr.String() != p.addr("orders") {
				t.Errorf("told of %v to %v", h.SourceAddr, h.DestinationAddr)
			}
			if version == proxyproto.V1 {
				return
			}
			for kind, want := range map[byte]string{
				0x02: "db.example.org", 0x01: "", 0xE5: "spiffe://example.org/web", 0xE6: "spiffe://example.org/orders",
				0x20: "\x07\x00\x00\x00\x00\x21\x00\x07TLSv1.2\x23\x00\x1dECDHE-ECDSA-AES128-GCM-SHA256",
			} {
				if v := tlvOf(t, h, kind); v != want {
					t.Errorf("TLV %#x is %q, want %q", kind, v, want)
				}
			}
		})
	}
}

// TestHeaderThroughBoth: an outbound listener names its caller before TLS, and
// the inbound one at the far end takes that for the source.
func TestHeaderThroughBoth(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	target, got := heads(t)
	in := inbound("inventory", target)
	in.ProxyProtocol = ProxyProtocol{Send: proxyproto.V1, AcceptFrom: loopback}
	server := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/inventory"), ca)})
	tcp := outbound(t, "tcp", server.addr("inventory"), "spiffe://example.org/inventory")
	unix := tcp
	unix.Name, unix.Bind = "unix", "unix:"+dir+"/out.sock"
	tcp.ProxyProtocol = ProxyProtocol{Send: proxyproto.V1, AcceptFrom: loopback}
	unix.ProxyProtocol = ProxyProtocol{Send: proxyproto.V2, AcceptUnix: true}
	client := run(t, Config{Listeners: []Listener{tcp, unix}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/web"), ca)})
	path := append([]byte("/run/caller.sock"), make([]byte, 108-16)...)
	fromUnix := append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x31\x00\xd8"), append(path, path...)...)
	for name, c := range map[string]struct {
		network, addr, source string
		head                  []byte
	}{
		"tcp":       {"tcp", client.addr("tcp"), "198.51.100.7:40001", faraway.AppendV2(nil)},
		"unix":      {"unix", dir + "/out.sock", "198.51.100.7:40001", faraway.AppendV1(nil)},
		"unix unix": {"unix", dir + "/out.sock", "unix:/run/caller.sock", fromUnix},
	} {
		conn, err := net.DialTimeout(c.network, c.addr, patience)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := conn.Write(c.head); err != nil {
			t.Fatal(err)
		}
		welcomed(t, conn)
		say(t, conn, "hello")
		_ = conn.Close()
		h := <-got
		if a, b := client.next(), server.next(); a.Source != c.source || b.Source != c.source || a.Via == "" || b.Via == "" {
			t.Errorf("%s: access records %+v\n%+v", name, a, b)
		}
		if strings.HasPrefix(c.source, "unix:") != (h.SourceAddr == nil) || h.SourceAddr != nil && h.SourceAddr.String() != c.source {
			t.Errorf("%s: the target was told of %v", name, h.SourceAddr)
		}
	}
	// Without a header, the socket itself is named.
	c := client.config
	c.Listeners[1].ProxyProtocol.AcceptUnix = false
	if _, err := client.Apply(c); err != nil {
		t.Fatal(err)
	}
	conn, err := net.DialTimeout("unix", dir+"/out.sock", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	welcomed(t, conn)
	_ = conn.Close()
	if a := server.next(); a.Source != "unix:" {
		t.Errorf("access record %+v", a)
	}
}

// TestAcceptFromChanges: live connections whose source was the word of
// somebody who is not trusted any more are closed, others stay.
func TestAcceptFromChanges(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.ProxyProtocol.AcceptFrom = loopback
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))
	live := dialHeaded(t, "tcp", p.addr("orders"), faraway.AppendV1(nil), 0, cc)
	say(t, live, "hello")
	c := p.config
	c.Listeners = []Listener{in}
	c.Listeners[0].ProxyProtocol.AcceptFrom = append(elsewhere, loopback...)
	if a, err := p.Apply(c); err != nil || a.Asked != 1 || a.Closed != 0 {
		t.Fatalf("%+v, %v", a, err)
	}
	say(t, live, "still there")
	half, err := net.Dial("tcp", p.addr("orders")) // its header is there, its hello is not
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = half.Close() }()
	_ = half.SetDeadline(time.Now().Add(patience))
	if _, err := half.Write(faraway.AppendV1(nil)); err != nil {
		t.Fatal(err)
	}
	p.until("its header is read", func() bool {
		for _, c := range p.table.of(nil) {
			c.mu.Lock()
			read := c.phase == opening && c.header != nil
			c.mu.Unlock()
			if read {
				return true
			}
		}
		return false
	})
	c.Listeners = []Listener{in}
	c.Listeners[0].ProxyProtocol.AcceptFrom = elsewhere
	if a, err := p.Apply(c); err != nil || a.Asked != 1 || a.Closed != 1 {
		t.Fatalf("%+v, %v", a, err)
	}
	gone(t, live)
	if a := p.next(); a.Closed != "policy" || !strings.Contains(a.Reason, "its source 198.51.100.7:40001 is the word of 127.0.0.1:") {
		t.Errorf("access record %+v", a)
	}
	_ = tls.Client(half, cc).Handshake()
	if a := p.next(); a.Reason != "the listener's accept_from changed while the handshake was going on" {
		t.Errorf("access record %+v", a)
	}
	plain := dialTLS(t, p.addr("orders"), cc)
	say(t, plain, "no header needed")
	c.Listeners = []Listener{in}
	if a, err := p.Apply(c); err != nil || a.Asked != 1 || a.Closed != 0 {
		t.Fatalf("%+v, %v", a, err)
	}
	say(t, plain, "still there")
}

func TestProxyProtocolChecked(t *testing.T) {
	t.Parallel()
	for _, p := range []ProxyProtocol{
		{Send: 3},
		{Send: -1},
		{AcceptFrom: []netip.Prefix{{}}},
		{AcceptFrom: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}},
		{AcceptFrom: []netip.Prefix{netip.MustParsePrefix("::ffff:10.0.0.0/104")}},
	} {
		if checkProxyProtocol(p) == nil {
			t.Errorf("%+v is taken", p)
		}
	}
}

// TestSourceOfMappedAddress: an IPv4 client of an IPv6 socket is in its IPv4
// network.
func TestSourceOfMappedAddress(t *testing.T) {
	t.Parallel()
	p := ProxyProtocol{AcceptFrom: loopback}
	l, err := net.Listen("tcp", "[::]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	client, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", l.Addr().(*net.TCPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if !p.trusts(c) {
		t.Errorf("%s is not trusted", c.RemoteAddr())
	}
	conn := &conn{down: c.(end)}
	if o := conn.origin(); !o.Source.Addr().Is4() || !bytes.HasPrefix(o.AppendV1(nil), []byte("PROXY TCP4 127.0.0.1 127.0.0.1 ")) {
		t.Errorf("%s", o.AppendV1(nil))
	}
}

// Clients that are refused for their header are waited for no more: what is
// kept of them would never be given back, and stand for clients that could make
// room for others.
func TestRefusedHeadersAreNotWaitedFor(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.ProxyProtocol.AcceptFrom = loopback
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	for _, head := range []string{"", "GET / HTTP/1.1\r\n\r\n", "PROXY TCP4 1.2.3.4"} {
		c, err := net.Dial("tcp", p.addr("orders"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, head)
		_ = c.Close()
		if a := p.next(); a.Outcome != "failure" {
			t.Errorf("%q: %+v", head, a)
		}
	}
	l := p.world.Load().named("orders")
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := l.silent.Len(); n > 0 {
		t.Errorf("%d clients that are gone are waited for", n)
	}
}
