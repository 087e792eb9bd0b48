package policy

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ask is a request that tables write down by what is not usual in it. The usual
// one goes from web to orders, at the inbound end of listener orders, from
// 10.1.2.3 to port 8443 for orders.example.org, on Thursday 1 January 2026 at
// noon.
type ask struct{ Request }

// tcp is the usual request where HTTP is not visible.
func tcp() ask {
	q := request(web, orders)
	q.Source, q.Port, q.SNI = netip.MustParseAddrPort("10.1.2.3:40000"), 8443, "orders.example.org"
	q.Time = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	return ask{q}
}

// do is the usual request to shop.example.
func do(method, path string) ask {
	a := tcp()
	a.HTTP = &HTTP{Method: method, Host: "shop.example", Path: path}
	return a
}

func get(path string) ask { return do("GET", path) }

// call is a gRPC call.
func call(path string) ask {
	return do("POST", path).header("content-type", "application/grpc")
}

func (a ask) on(listener string) ask { a.Listener = listener; return a }
func (a ask) outbound() ask          { a.Direction = Outbound; return a }
func (a ask) port(n uint16) ask      { a.Port = n; return a }
func (a ask) sni(name string) ask    { a.SNI = name; return a }
func (a ask) nobody() ask            { a.From = Peer{}; return a }
func (a ask) plaintext() ask         { a.From = Peer{Unauthenticated: true}; return a }
func (a ask) toNobody() ask          { a.To = Peer{}; return a }
func (a ask) noSource() ask          { a.Source = netip.AddrPort{}; return a }

func (a ask) from(id string) ask { a.From.ID = spiffeid.RequireFromString(id); return a }
func (a ask) to(id string) ask   { a.To.ID = spiffeid.RequireFromString(id); return a }

func (a ask) serial(s string) ask { a.From.Serial, a.To.Serial = s, s; return a }

func (a ask) source(address string) ask {
	a.Source = netip.AddrPortFrom(netip.MustParseAddr(address), a.Source.Port())
	return a
}

func (a ask) sourcePort(n uint16) ask {
	a.Source = netip.AddrPortFrom(a.Source.Addr(), n)
	return a
}

// at sets the time, as RFC 3339 writes it.
func (a ask) at(t string) ask {
	var err error
	if a.Time, err = time.Parse(time.RFC3339, t); err != nil {
		panic(err)
	}
	return a
}

func (a ask) host(h string) ask {
	http := *a.HTTP
	http.Host = h
	a.HTTP = &http
	return a
}

// header adds a field line.
func (a ask) header(name, value string) ask {
	http := *a.HTTP
	http.Headers = append(slices.Clip(http.Headers), Header{name, value})
	a.HTTP = &http
	return a
}

// matches says of which effect rules match a request.
type matches uint8

const (
	neither matches = iota
	allows          // an allow alone
	denies          // a deny alone
	both
)

func (m matches) String() string {
	return [...]string{"neither matches", "the allow matches", "the deny matches", "both match"}[m]
}

// conditionTest is what a rule may ask for, and the requests that meet it.
type conditionTest struct {
	name, keys string // YAML, a key a line, beside id, effect and from
	cases      []conditionCase
}

type conditionCase struct {
	ask  ask
	want matches
}

// everybody is who the rules of the tables are for, if they do not say.
const everybody = "from: [unauthenticated, 'spiffe://example.org/**', 'spiffe://partner.example/**', 'spiffe://a.org/**']"

// run tries the condition in an allow and in a deny, both enforced and in
// shadow.
func (c *conditionTest) run(t *testing.T) {
	keys := strings.ReplaceAll(c.keys, "\n", "\n  ")
	from := "\n  " + everybody
	const base = "groups: {partners: ['spiffe://partner.example/**']}\nrules:\n- id: base\n  effect: allow\n  on: [elsewhere]\n  from: [group:partners]\n"
	rule := func(id, effect, keys string) string {
		return "- id: " + id + "\n  effect: " + effect + keys + "\n"
	}
	allowKeys := "\n  " + keys
	if !strings.Contains(keys, "from: [") {
		allowKeys = from + allowKeys
	}
	all := rule("all", "allow", from)
	allow := evaluatorsOf(t, base+rule("a", "allow", allowKeys))
	deny := evaluatorsOf(t, base+all+rule("d", "deny", "\n  "+keys))
	shadowAllow := evaluatorsOf(t, base+rule("a", "allow", "\n  shadow: true"+allowKeys))
	shadowDeny := evaluatorsOf(t, base+all+rule("d", "deny", "\n  shadow: true\n  "+keys))
	for _, tt := range c.cases {
		q := &tt.ask.Request
		for i := range min(len(allow), len(deny), len(shadowAllow), len(shadowDeny)) {
			var got matches
			if d := allow[i].decide(q); d.Reason == AllowRule && d.Rule == "a" {
				got |= allows
			}
			if d := deny[i].decide(q); d.Reason == DenyRule && d.Rule == "d" {
				got |= denies
			}
			if got != tt.want {
				t.Errorf("%s: %s: %v, want that %v", allow[i].name, described(q), got, tt.want)
			}
			if d := shadowAllow[i].decide(q); d.Allow || slices.Equal(d.Shadow, []string{"a"}) != (tt.want&allows != 0) {
				t.Errorf("%s: %s: shadow allow: %+v, want that %v", allow[i].name, described(q), d, tt.want)
			}
			if d := shadowDeny[i].decide(q); d.Reason == DenyRule || d.Allow && slices.Equal(d.Shadow, []string{"d"}) != (tt.want&denies != 0) {
				t.Errorf("%s: %s: shadow deny: %+v, want that %v", allow[i].name, described(q), d, tt.want)
			}
		}
	}
}
