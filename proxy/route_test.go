package proxy

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/narthex-id/narthex/proxy/policy"
)

func TestMatchName(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"db.example.org", "db.example.org", true},
		{"db.example.org", "db.example.or", false},
		{"db.example.org", "xdb.example.org", false},
		{"db.example.org", "", false},
		{"*.example.org", "a.example.org", true},
		{"*.example.org", "a.b.example.org", true},
		{"*.example.org", "example.org", false},
		{"*.example.org", ".example.org", false},
		{"*.example.org", "a..example.org", false},
		{"*.example.org", ".a.example.org", false},
		{"*.example.org", "aexample.org", false},
		{"*.example.org", "a.example.org.", false},
		{"*.example.org", invalidServerName, false},
		{"*.name", invalidServerName, false},
		{"*.example.org", "", false},
	} {
		if got := matchName(c.pattern, c.name); got != c.want {
			t.Errorf("%q takes %q: %v", c.pattern, c.name, got)
		}
	}
}

// FuzzRoutes: whatever name a client sends, a route takes it only if it is the
// route's name or truly below it.
func FuzzRoutes(f *testing.F) {
	for _, sni := range []string{"", "db.example.org", "DB.Example.ORG", "a.b.shop.example", "shop.example", "..shop.example", "xn--bcher-kva.shop.example", strings.Repeat("a", 300)} {
		f.Add(sni, "h2")
	}
	s := &settings{Listener: Listener{Routes: normalRoutes([]Route{
		{SNI: []string{"DB.example.org."}, Targets: []string{"db"}}, {SNI: []string{"*.shop.example"}, ALPN: []string{"h2"}, Targets: []string{"shop"}},
	})}}
	f.Fuzz(func(t *testing.T, sni, protocol string) {
		name := normalSNI(sni)
		got := s.targetsFor(bound{serverName: name, protocol: protocol})
		labels := strings.Split(strings.ToLower(sni), ".")
		whole := len(sni) <= maxServerName && !slices.Contains(labels, "") && hostName(sni) == sni
		var want []string
		switch {
		case whole && strings.EqualFold(sni, "db.example.org"):
			want = []string{"db"}
		case whole && protocol == "h2" && len(labels) > 2 && slices.Equal(labels[len(labels)-2:], []string{"shop", "example"}):
			want = []string{"shop"}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q, %q: %v, want %v", sni, protocol, got, want)
		}
	})
}

// saying is a service that says who it is.
func saying(text string) func(net.Conn) {
	return func(c net.Conn) { _, _ = io.WriteString(c, text); _, _ = io.Copy(io.Discard, c) }
}

// answerOf returns what the service a client came to says, or why there was none.
func answerOf(t testing.TB, addr string, cc *tls.Config) (word, protocol string, err error) {
	t.Helper()
	c, err := (&tls.Dialer{NetDialer: &net.Dialer{Timeout: patience}, Config: cc}).DialContext(context.Background(), "tcp", addr)
	if err != nil {
		return "", "", err
	}
	defer func() { _ = c.Close() }()
	b := make([]byte, 100)
	n, err := c.Read(b)
	return string(b[:n]), c.(*tls.Conn).ConnectionState().NegotiatedProtocol, err
}

// routed is an inbound listener with routes of every kind, and no target of
// its own unless one is added.
func routed(t testing.TB) Listener {
	in := inbound("front", "")
	in.Targets = nil
	in.ALPN = []string{"mqtt"}
	in.Routes = []Route{
		{SNI: []string{"db.example.org"}, ALPN: []string{"postgresql", "postgresql-old"}, Targets: []string{serve(t, saying("db"))}},
		{SNI: []string{"DB.example.org.", "*.Shop.example"}, Targets: []string{serve(t, saying("shop"))}},
		{ALPN: []string{"h2"}, Targets: []string{serve(t, saying("h2"))}},
	}
	return in
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	strict := routed(t)
	open := strict
	open.Name, open.Targets = "open", []string{serve(t, saying("own"))}
	p := run(t, Config{Listeners: []Listener{strict, open}, Policy: rulesOf(t, allowWeb), Identities: source(t, ca.SVID("/front"), ca)})
	cert := ca.SVID("/web")
	const none = "no route for server name"
	const alert = "tls: no application protocol"
	for _, c := range []struct {
		name     string
		sni      string
		offers   []string
		front    string // the answer, or why there is none
		open     string
		protocol string
	}{
		{"SNI and ALPN", "db.example.org", []string{"postgresql"}, "db", "db", "postgresql"},
		{"in another case", "Db.eXample.org", []string{"postgresql"}, "db", "db", "postgresql"},
		{"the server prefers", "db.example.org", []string{"postgresql-old", "postgresql"}, "db", "db", "postgresql"},
		{"the listener's come first", "db.example.org", []string{"postgresql", "mqtt"}, "shop", "shop", "mqtt"},
		{"SNI, no ALPN", "db.example.org", nil, "shop", "shop", ""},
		{"below a suffix", "a.b.shop.example", nil, "shop", "shop", ""},
		{"the suffix itself", "shop.example", nil, none, "own", ""},
		{"ALPN of another name's route", "a.shop.example", []string{"postgresql"}, alert, alert, ""},
		{"ALPN alone", "a.example.org", []string{"h2"}, "h2", "h2", "h2"},
		{"ALPN without SNI", "", []string{"http/1.1", "h2"}, "h2", "h2", "h2"},
		{"the listener's ALPN", "", []string{"mqtt"}, none, "own", "mqtt"},
		{"nothing", "", nil, none, "own", ""},
		{"unknown ALPN", "db.example.org", []string{"x", "y"}, alert, alert, ""},
		{"http/1.1 is not h2", "", []string{"http/1.1"}, alert, alert, ""},
	} {
		for listener, want := range map[string]string{"front": c.front, "open": c.open} {
			cc := clientConfig(cert)
			cc.ServerName, cc.NextProtos = c.sni, c.offers
			word, protocol, err := answerOf(t, p.addr(listener), cc)
			a := p.next()
			switch want {
			case none:
				if err == nil || !strings.HasPrefix(a.Reason, none) || a.Decision != "allow" || a.Outcome != "failure" || a.Destination != "" {
					t.Errorf("%s: %s: %q, %v; access record %+v", c.name, listener, word, err, a)
				}
			case alert:
				if err == nil || !strings.Contains(err.Error(), "no application protocol") || !strings.HasPrefix(a.Reason, "the client requested unsupported application protocols") {
					t.Errorf("%s: %s: %q, %v; access record %+v", c.name, listener, word, err, a)
				}
			default:
				if err != nil || word != want || protocol != c.protocol || a.Protocol != c.protocol || a.ServerName != c.sni {
					t.Errorf("%s: %s: came to %q by %q, %v; access record %+v", c.name, listener, word, protocol, err, a)
				}
			}
		}
	}
	if n := p.metric("narthex_tls_handshakes_total", "front,no_protocol"); n != 3 {
		t.Errorf("%v handshakes without a protocol in common", n)
	}
	if got := p.Status().Listeners; len(got[0].Targets) != 3 || len(got[1].Targets) != 4 {
		t.Errorf("status %+v", got)
	} else if a, b := got[0].Routes, got[1].Routes; len(a) < 2 || len(b) != len(a)+1 || a[0].Takes() != b[0].Takes() || a[0].Takes() == "the rest" || b[len(a)].Takes() != "the rest" {
		t.Errorf("routes %+v; and with a target of its own %+v", a, b)
	}
}

// TestRoutesTellStrangersNothing: who is not allowed hears the same whether
// there is a route or none.
func TestRoutesTellStrangersNothing(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	p := run(t, Config{Listeners: []Listener{routed(t)}, Policy: rulesOf(t, allowWeb), Identities: source(t, ca.SVID("/front"), ca)})
	for _, sni := range []string{"db.example.org", "nowhere.example.org"} {
		cc := clientConfig(ca.SVID("/stranger"))
		cc.ServerName = sni
		if word, _, err := answerOf(t, p.addr("front"), cc); err == nil {
			t.Errorf("%s: came to %q", sni, word)
		}
		if a := p.next(); a.Decision != "deny" || !strings.HasPrefix(a.Reason, "policy: ") {
			t.Errorf("%s: access record %+v", sni, a)
		}
	}
}

// TestRoutesChange: connections whose route leads elsewhere drain, those of
// other routes stay, and a handshake that began before is refused.
func TestRoutesChange(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := routed(t)
	in.Timeouts.Drain = -1
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/front"), ca)})
	connect := func(sni string) *tls.Conn {
		cc := clientConfig(ca.SVID("/web"))
		cc.ServerName = sni
		c := dialTLS(t, p.addr("front"), cc)
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	apply := func(change func(*Listener)) Applied {
		t.Helper()
		c := p.config
		next := in
		next.Routes = slices.Clone(in.Routes)
		change(&next)
		c.Listeners = []Listener{next}
		a, err := p.Apply(c)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	other := serve(t, saying("other"))
	db, shop := connect("db.example.org"), connect("a.shop.example")

	apply(func(l *Listener) { l.Routes[2].Targets, l.Targets = []string{other}, []string{other} })
	apply(func(l *Listener) { l.Routes[1].Targets = append([]string{other}, l.Routes[1].Targets...) })
	if n := p.Status().Listeners[0].Active; n != 2 {
		t.Fatalf("%d of 2 live, though their target is still their route's", n)
	}
	// A new first route takes one of the two.
	apply(func(l *Listener) {
		l.Routes = append([]Route{{SNI: []string{"db.example.org"}, Targets: []string{other}}}, l.Routes...)
	})
	gone(t, db)
	if a := p.next(); a.Closed != "drain" || a.Reason != "its listener has another target, "+other || a.ServerName != "db.example.org" {
		t.Errorf("access record %+v", a)
	}
	// The other's route goes, and nothing takes its place.
	apply(func(l *Listener) { l.Routes = l.Routes[:1] })
	gone(t, shop)
	if a := p.next(); a.Closed != "drain" || a.Reason != "its listener has no target for it any more" {
		t.Errorf("access record %+v", a)
	}
}

// TestServerName: what an outbound listener asks for, and that connections
// that asked for something else drain.
func TestServerName(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	server := run(t, Config{Listeners: []Listener{routed(t)}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/front"), ca)})
	out := outbound(t, "out", server.addr("front"), "spiffe://example.org/front")
	out.ServerName, out.ALPN, out.Timeouts.Drain = "DB.example.org.", []string{"x", "postgresql"}, -1
	client := run(t, Config{Listeners: []Listener{out}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/web"), ca)})
	c, err := net.Dial("tcp", client.addr("out"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	word := make([]byte, 2)
	if _, err := io.ReadFull(c, word); err != nil || string(word) != "db" {
		t.Fatalf("came to %q, %v", word, err)
	}
	next := client.config
	out.ServerName = ""
	next.Listeners = []Listener{out}
	if _, err := client.Apply(next); err != nil {
		t.Fatal(err)
	}
	gone(t, c)
	if a := client.next(); a.Closed != "drain" || a.ServerName != "db.example.org" || a.Protocol != "postgresql" || a.Reason != "its listener asks for another server name" {
		t.Errorf("access record %+v", a)
	}
}

func TestRoutesThatCannotBe(t *testing.T) {
	t.Parallel()
	to := []string{"127.0.0.1:1"}
	name := func(s ...string) Listener { return Listener{Routes: []Route{{SNI: s, Targets: to}}} }
	many := Route{Targets: to}
	for range maxNames + 1 {
		many.SNI = append(many.SNI, "a")
	}
	for what, c := range map[string]struct {
		l        Listener
		outbound bool
		want     string
	}{
		"server name inbound":  {l: Listener{ServerName: "a"}, want: "server_name is for outbound"},
		"routes outbound":      {l: name("a"), outbound: true, want: "routes are for inbound"},
		"an address":           {l: name("127.0.0.1"), want: `"127.0.0.1" is no host name`},
		"a star":               {l: name("*"), want: `"*" is no host name`},
		"a star within":        {l: name("a.*.b"), want: "is no host name"},
		"half a star":          {l: name("*a.b"), want: "is no host name"},
		"empty label":          {l: name("a..b"), want: "is no host name"},
		"empty":                {l: name(""), want: "is no host name"},
		"no name":              {l: Listener{Routes: []Route{{Targets: to}}}, want: "needs sni or alpn"},
		"no target":            {l: Listener{Routes: []Route{{SNI: []string{"a"}}}}, want: "route 1: target: is missing"},
		"protocol":             {l: Listener{ALPN: []string{"h2", ""}}, want: "1 to 255 bytes"},
		"protocol twice":       {l: Listener{ALPN: []string{"h2", "h2"}}, want: "twice"},
		"protocol too long":    {l: Listener{Routes: []Route{{ALPN: []string{noneOfThem}, Targets: to}}}, want: "1 to 255 bytes"},
		"too many":             {l: Listener{Routes: make([]Route, maxRoutes+1)}, want: "too many"},
		"too many names":       {l: Listener{Routes: []Route{many}}, want: "too many"},
		"wildcard server name": {l: Listener{ServerName: "*.a"}, outbound: true, want: "is no host name"},
	} {
		if err := checkRoutes(c.l, !c.outbound); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", what, err, c.want)
		}
	}
	l := name("a", "*.b.", "xn--bcher-kva.example")
	l.Name, l.Bind, l.Direction = "a", "127.0.0.1:1", policy.Inbound
	if err := checkListener(l); err != nil {
		t.Error(err)
	}
}
