package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// shopRequest has a value for everything that a condition can read.
func shopRequest() *Request {
	return &Request{
		Listener:  "orders",
		Direction: Inbound,
		From:      Peer{ID: spiffeid.RequireFromString(web), Serial: "1f"},
		To:        Peer{ID: spiffeid.RequireFromString(orders), Serial: "2e"},
		Source:    netip.MustParseAddrPort("[::ffff:10.1.2.3]:5555"),
		Port:      8443,
		SNI:       "orders.shop.example",
		Time:      time.Date(2026, 3, 1, 5, 30, 15, 250e6, time.UTC), // a Sunday
		HTTP: &HTTP{
			Method: "GET",
			Host:   "orders:8080",
			Path:   "/v1/orders/7",
			Headers: []Header{
				{"accept", "*/*"},
				{"x-env", "prod"},
				{"x-role", "reader"},
				{"x-count", "12"},
				{"x-role", "admin"},
				{"cookie", ""},
			},
		},
	}
}

func mustCompile(t testing.TB, text string) *when {
	t.Helper()
	w, problem := compileWhen(text, place{"f.yaml", 1, 1})
	if problem != nil {
		t.Fatalf("%s: %v", text, problem)
	}
	return w
}

func TestWhenHolds(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"true",
		`from.id == "spiffe://example.org/ns/shop/sa/web"`,
		`from.trust_domain == "example.org" && from.path == "/ns/shop/sa/web"`,
		`from.authenticated && from.serial == "1f"`,
		`to.id == "spiffe://example.org/ns/shop/sa/orders"`,
		`to.trust_domain == from.trust_domain && to.path != from.path`,
		`to.authenticated && to.serial == "2e"`,
		`source.ip == "10.1.2.3" && source.port == 5555`,
		`connection.listener == "orders" && connection.direction == "inbound"`,
		`connection.sni.endsWith(".example") && connection.port == 8443`,
		`request.method == "GET" && request.host == "orders:8080"`,
		`request.path.startsWith("/v1/") && request.path.contains("orders")`,
		`time == request.time && time == timestamp("2026-03-01T05:30:15.250Z")`,
		`time > timestamp("2026-01-01T00:00:00+01:00") + duration("24h")`,
		`time - timestamp("2026-03-01T00:00:00Z") < duration("5h31m")`,
		`from.id.size() == 35 && size(from.path) == 15`,
		`!(from.path in ["/a", "/b"]) && from.trust_domain in ["example.org", to.id]`,
		`["/v1/", "/v2/"].exists(p, request.path.startsWith(p))`,
		`["GET", "HEAD"].exists_one(m, m == request.method)`,
		`(source.port % 2 == 1 ? "odd" : "even") == "odd"`,
		`"/ns/shop/" + "sa/web" == from.path`,
		`-source.port + 5555 * 2 / 2 == 0`,
		`{"web": 1, "api": 2}["web"] == 1`,
		"from.authenticated && // the peer\n  to.authenticated",
	} {
		holds, err := mustCompile(t, text).eval(shopRequest())
		if err != nil || !holds {
			t.Errorf("%s: %v, %v", text, holds, err)
		}
	}
}

// TestWhenNobody has peers without identity, and a connection of which nothing
// is known.
func TestWhenNobody(t *testing.T) {
	t.Parallel()
	plain := &Request{Direction: Outbound, From: Peer{Unauthenticated: true, ID: spiffeid.RequireFromString(web), Serial: "1f"}}
	for _, text := range []string{
		`!from.authenticated && from.id + from.trust_domain + from.path + from.serial == ""`,
		`!to.authenticated && to.id + to.trust_domain + to.path + to.serial == ""`,
		`source.ip == "" && source.port == 0`,
		`connection.sni == "" && connection.port == 0 && connection.direction == "outbound"`,
	} {
		if holds, err := mustCompile(t, text).eval(plain); err != nil || !holds {
			t.Errorf("%s: %v, %v", text, holds, err)
		}
	}
}

func TestWhenHeaders(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		`"x-env" in request.headers`:                                true,
		`"x-none" in request.headers`:                               false,
		`has(request.headers.cookie)`:                               true,
		`has(request.headers.expect)`:                               false,
		`request.headers.cookie == [""]`:                            true,
		`request.headers["x-env"] == ["prod"]`:                      true,
		`["prod"] == request.headers["x-env"]`:                      true,
		`request.headers["x-role"] == ["reader", "admin"]`:          true,
		`request.headers["x-role"] == ["admin", "reader"]`:          false,
		`request.headers["x-role"] == ["reader"]`:                   false,
		`request.headers["x-role"][1] == "admin"`:                   true,
		`"admin" in request.headers["x-role"]`:                      true,
		`"root" in request.headers["x-role"]`:                       false,
		`request.headers["x-role"].all(r, r != "root")`:             true,
		`request.headers["x-role"].exists(r, r.contains("adm"))`:    true,
		`request.headers["x-role"].exists_one(r, r == "admin")`:     true,
		`request.headers["x-role"].size() == 2`:                     true,
		`request.headers.size() == 5 && size(request.headers) == 5`: true,
		`request.headers.exists(n, n.startsWith("x-r"))`:            true,
		`request.headers.exists_one(n, n == "x-role")`:              true,
		`request.headers.all(n, request.headers[n].size() < 3)`:     true,
		`request.headers.exists(n, request.headers[n].size() == 2)`: true,
		`int(request.headers["x-count"][0]) > 11`:                   true,
		`request.headers[connection.listener] == []`:                false, // fails
	} {
		holds, err := mustCompile(t, text).eval(shopRequest())
		if holds != want || (err != nil) != strings.Contains(text, "listener") {
			t.Errorf("%s: %v, %v", text, holds, err)
		}
	}
}

func TestWhenTime(t *testing.T) {
	t.Parallel()
	at := func(s string) time.Time {
		moment, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return moment
	}
	for _, test := range []struct{ text, at string }{
		{`time.getFullYear() == 2026 && time.getMonth() == 2 && time.getDate() == 1`, "2026-03-01T05:30:15Z"},
		{`time.getDayOfMonth() == 0 && time.getDayOfWeek() == 0 && time.getDayOfYear() == 59`, "2026-03-01T05:30:15Z"},
		{`time.getHours() == 5 && time.getMinutes() == 30 && time.getSeconds() == 15 && time.getMilliseconds() == 250`, "2026-03-01T05:30:15.25Z"},
		{`time.getHours("UTC") == 5 && time.getHours() == 5`, "2026-03-01T06:30:15+01:00"},
		{`time.getHours("+02:00") == 0 && time.getDate("+02:00") == 2`, "2026-03-01T22:00:00Z"},
		{`time.getHours("-03:30") == 18 && time.getMinutes("-03:30") == 30`, "2026-03-01T22:00:00Z"},
		// Daylight saving begins in Berlin at 01:00 UTC on March 29, and ends at
		// 01:00 UTC on October 25.
		{`time.getHours("Europe/Berlin") == 1`, "2026-03-29T00:59:59Z"},
		{`time.getHours("Europe/Berlin") == 3`, "2026-03-29T01:00:00Z"},
		{`time.getHours("Europe/Berlin") == 2`, "2026-10-25T00:59:59Z"},
		{`time.getHours("Europe/Berlin") == 2`, "2026-10-25T01:00:00Z"},
		{`time.getDayOfWeek("America/New_York") == 6 && time.getDayOfWeek() == 0`, "2026-03-01T02:00:00Z"},
		{`(time - timestamp("2026-03-01T00:00:00Z")).getHours() == 5`, "2026-03-01T05:30:15Z"},
		{`duration("90m").getMinutes() == 90 && duration("90m").getHours() == 1 && duration("1.5s").getMilliseconds() == 500 && duration("1m").getSeconds() == 60`, "2026-03-01T05:30:15Z"},
	} {
		w := mustCompile(t, test.text)
		if holds, err := w.eval(&Request{Time: at(test.at)}); err != nil || !holds {
			t.Errorf("%s at %s: %v, %v", test.text, test.at, holds, err)
		}
	}
}

func TestWhenNetwork(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		from, network, want string
	}{
		{"10.1.2.3", "10.0.0.0/8", "true"},
		{"11.1.2.3", "10.0.0.0/8", "false"},
		{"::ffff:10.1.2.3", "10.0.0.0/8", "true"},
		{"fe80::1%eth0", "fe80::/10", "true"},
		{"2001:db8::1", "2001:db8::/32", "true"},
		{"2001:db8::1", "10.0.0.0/8", "false"},
		{"10.1.2.3", "10.1.2.3", "true"},
		{"10.1.2.4", "10.1.2.3", "false"},
		{"", "10.0.0.0/8", `false, inNetwork: "" is no address`},
	} {
		q := &Request{}
		if test.from != "" {
			q.Source = netip.AddrPortFrom(netip.MustParseAddr(test.from), 1)
		}
		holds, err := mustCompile(t, fmt.Sprintf("inNetwork(source.ip, %q)", test.network)).eval(q)
		got := fmt.Sprint(holds)
		if err != nil {
			got += ", " + err.Error()
		}
		if got != test.want {
			t.Errorf("%s in %s: %s, want %s", test.from, test.network, got, test.want)
		}
	}
}

// TestWhenUses says which conditions need HTTP, and which change with time.
func TestWhenUses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"true":                                      "",
		"from.authenticated":                        "",
		"time.getHours() < 6":                       "time",
		"request.time.getHours() < 6":               "time",
		`request.path == "/"`:                       "http",
		`request.headers.all(n, n != "a")`:          "http",
		`has(request.headers.a)`:                    "http",
		`request.path == "/" && time.getDate() > 1`: "http time",
		`["a"].exists(x, x == request.method)`:      "http",
	} {
		w := mustCompile(t, text)
		var uses []string
		if w.usesHTTP {
			uses = append(uses, "http")
		}
		if w.usesTime {
			uses = append(uses, "time")
		}
		if got := strings.Join(uses, " "); got != want {
			t.Errorf("%s uses %q, want %q", text, got, want)
		}
		if _, err := w.eval(&Request{}); w.usesHTTP && err == nil {
			t.Errorf("%s holds without HTTP", text)
		}
	}
}

// TestWhenFails evaluates what is good when it is loaded and fails with the
// request.
func TestWhenFails(t *testing.T) {
	t.Parallel()
	many := make([]Header, mostHeaderLines+1)
	for _, test := range []struct {
		text   string
		change func(*Request)
		want   string
	}{
		{`request.headers["x-none"][0] == "a"`, nil, "no such key: x-none"},
		{`request.headers.none == ["a"]`, nil, "no such key: none"},
		{`request.headers["x-env"][1] == "a"`, nil, "index out of bounds: 1"},
		{`request.headers["x-env"][-1] == "a"`, nil, "index out of bounds: -1"},
		{`request.headers["x-env"][source.port] == "a"`, nil, "index out of bounds: 5555"},
		{`request.headers[from.id][0] == "a"`, nil, "no such key: " + web},
		{`int(request.headers["x-env"][0]) == 1`, nil, "type conversion error from 'string' to 'int'"},
		{`10 / (source.port - 5555) == 1`, nil, "division by zero"},
		{`9223372036854775807 + source.port == 1`, nil, "integer overflow"},
		{`inNetwork(from.id, "10.0.0.0/8")`, nil, `inNetwork: "` + web + `" is no address`},
		{`request.path == "/"`, func(q *Request) { q.HTTP = nil }, "the HTTP request is not visible"},
		{`request.path == "/"`, func(q *Request) { q.HTTP.Path = strings.Repeat("/", mostPath+1) }, "the path has more than 8192 bytes"},
		{`request.path == "/"`, func(q *Request) { q.HTTP.Host = strings.Repeat("a", mostHost+1) }, "the host has more than 512 bytes"},
		{`request.path == "/"`, func(q *Request) { q.HTTP.Method = strings.Repeat("A", mostMethod+1) }, "the method has more than 64 bytes"},
		{`has(request.headers.a)`, func(q *Request) { q.HTTP.Headers = many }, "more than 128 header lines"},
		{`has(request.headers.a)`, func(q *Request) { q.HTTP.Headers[0].Value = strings.Repeat("a", mostHeaderValue+1) }, "a header has more than 16384 bytes"},
		{`has(request.headers.a)`, func(q *Request) {
			for i := range q.HTTP.Headers {
				q.HTTP.Headers[i].Value = strings.Repeat("a", mostHeaderValue)
			}
		}, "the headers have more than 65536 bytes"},
	} {
		q := shopRequest()
		if test.change != nil {
			test.change(q)
		}
		holds, err := mustCompile(t, test.text).eval(q)
		if holds || err == nil || err.Error() != test.want {
			t.Errorf("%s: %v, %v, want %s", test.text, holds, err, test.want)
		}
	}
	// What is not read does not count.
	q := shopRequest()
	q.HTTP.Headers = many
	if holds, err := mustCompile(t, `request.method == "GET"`).eval(q); err != nil || !holds {
		t.Errorf("%v, %v", holds, err)
	}
	// As in CEL, what is certain without the part that fails holds.
	if holds, err := mustCompile(t, `request.headers["x-none"][0] == "a" || from.authenticated`).eval(shopRequest()); err != nil || !holds {
		t.Errorf("%v, %v", holds, err)
	}
}

func TestWhenConcurrent(t *testing.T) {
	t.Parallel()
	texts := []string{
		`request.headers["x-role"].exists(r, r.contains("adm")) && time.getHours("Europe/Berlin") == 6`,
		`inNetwork(source.ip, "10.0.0.0/8") && from.path.startsWith("/ns/shop/")`,
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 50 {
				for _, text := range texts {
					w, problem := compileWhen(text, place{})
					if problem != nil {
						t.Error(problem)
						return
					}
					if holds, err := w.eval(shopRequest()); err != nil || !holds {
						t.Errorf("%s: %v, %v", text, holds, err)
					}
				}
			}
		})
	}
	w := mustCompile(t, texts[0])
	for range 8 {
		group.Go(func() {
			q := shopRequest()
			for range 200 {
				if holds, err := w.eval(q); err != nil || !holds {
					t.Errorf("%v, %v", holds, err)
				}
			}
		})
	}
	group.Wait()
}

// TestWhens compiles equal texts once.
func TestWhens(t *testing.T) {
	t.Parallel()
	all := whens{known: map[string]*when{}}
	a, _ := all.compile("from.authenticated", place{"f", 1, 1})
	b, _ := all.compile("from.authenticated", place{"f", 2, 1})
	c, _ := all.compile("to.authenticated", place{"f", 3, 1})
	if a == nil || a != b || a == c || len(all.known) != 2 {
		t.Errorf("%p, %p, %p of %d", a, b, c, len(all.known))
	}
	for line := range 2 { // an error has the place of each
		if _, problem := all.compile("nobody", place{"f", line, 1}); problem == nil || problem.Line != line {
			t.Errorf("%v in line %d", problem, line)
		}
	}
	all.size = maxWhens - 10
	if _, problem := all.compile("to.authenticated", place{"f", 4, 1}); problem != nil {
		t.Errorf("one that is there already: %v", problem)
	}
	if _, problem := all.compile("!to.authenticated", place{"f", 5, 1}); problem == nil || problem.Error() != "f:5:1: the conditions of all rules, those that are alike once, have more than 1024 KiB together" {
		t.Errorf("%v beyond the bound", problem)
	}
}

// TestWhenTimeBound evaluates the dearest of what is accepted.
func TestWhenTimeBound(t *testing.T) {
	t.Parallel()
	q := shopRequest()
	q.HTTP.Path = strings.Repeat("a", mostPath)
	full := func(name func(int) string) {
		q.HTTP.Headers = nil
		for i := range mostHeaderLines {
			line := Header{Name: name(i)}
			line.Value = strings.Repeat("a", mostHeaderBytes/mostHeaderLines-len(line.Name))
			q.HTTP.Headers = append(q.HTTP.Headers, line)
		}
	}
	texts := []string{
		`request.headers.all(n, request.headers[n].all(v, !v.contains("aaaaaaab")))`,
		`request.headers.all(n, n.size() < 100) && request.headers.exists(n, request.headers[n].exists(v, v.endsWith("ab")))`,
		`!(` + strings.Repeat(`request.path.contains("aaaaaaab") || `, 59) + `false)`,
		`request.headers["x"].all(v, request.headers[v].all(w, !w.contains("aaaaaaab")))`,
	}
	for _, name := range []func(int) string{func(i int) string { return fmt.Sprint("x", i) }, func(int) string { return "x" }} {
		full(name)
		for _, text := range texts {
			w := mustCompile(t, text)
			began := time.Now()
			_, err := w.eval(q)
			if took := time.Since(began); took > time.Second { // a millisecond on an idle machine
				t.Errorf("%s: %v, %v", clip(text), took, err)
			}
		}
	}
	// One whose estimate rests on a mean: lines that name each other.
	for i := range q.HTTP.Headers {
		q.HTTP.Headers[i].Value = "x"
	}
	q.HTTP.Headers[0].Value = strings.Repeat("a", mostHeaderValue)
	if _, err := mustCompile(t, texts[3]).eval(q); err == nil || err.Error() != "the evaluation takes more than 50000 steps" {
		t.Errorf("the evaluation is not bounded: %v", err)
	}
}

func BenchmarkWhen(b *testing.B) {
	q := shopRequest()
	for _, text := range []string{
		`from.trust_domain == "example.org"`,
		`request.time.getHours("UTC") < 6`,
		`request.time.getHours("Europe/Berlin") < 6`,
		`"prod" in request.headers["x-env"] && from.path.startsWith("/ns/shop/")`,
		`inNetwork(source.ip, "10.0.0.0/8")`,
		`["/v1/", "/v2/", "/v3/"].exists(p, request.path.startsWith(p))`,
		`request.headers.exists(n, n == "x-role")`,
		`request.headers["x-role"].exists(v, v.contains("adm"))`, // bounded while it runs
		`request.headers["x-none"][0] == "a"`,                    // fails
	} {
		w := mustCompile(b, text)
		b.Run(text, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, _ = w.eval(q)
			}
		})
	}
	b.Run("compile", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			mustCompile(b, `"prod" in request.headers["x-env"] && from.path.startsWith("/ns/shop/")`)
		}
	})
}

// FuzzWhen compiles anything, and asks what is accepted about a few requests.
func FuzzWhen(f *testing.F) {
	for _, text := range []string{
		`request.time.getHours("Europe/Berlin") < 6`,
		`"prod" in request.headers["x-env"] && from.path.startsWith("/ns/shop/")`,
		`request.headers.all(n, request.headers[n].exists_one(v, v.size() > int("3")))`,
		`inNetwork(source.ip, "10.0.0.0/8") || has(request.headers.cookie)`,
		`time - timestamp("2026-01-01T00:00:00Z") > duration("1h") ? 1 % 2 == 1 : -1 < 2`,
		`{"a": [1, 2]}["a"][0] == 1 && !("b" in {"b": 1})`,
		"a.b.c(\n// x\n'\\u00e9', b\"x\", 1u, 1.5e3, null, r'''x''')",
	} {
		f.Add(text)
	}
	random := rand.New(rand.NewPCG(1, 1))
	empty, full := &Request{HTTP: &HTTP{}}, shopRequest()
	for i := range mostHeaderLines - len(full.HTTP.Headers) {
		full.HTTP.Headers = append(full.HTTP.Headers, Header{fmt.Sprint("x", i%64), strings.Repeat("a", random.IntN(500))})
	}
	f.Fuzz(func(t *testing.T, text string) {
		began := time.Now()
		w, problem := compileWhen(text, place{"f", 7, 3})
		if problem != nil {
			if w != nil || problem.Line < 7 || problem.Line > 7+strings.Count(text, "\n") || problem.Column < 1 || len(problem.Msg) > 1024 || problem.Msg == "" {
				t.Fatalf("%q: %v", text, problem)
			}
			return
		}
		for _, q := range []*Request{empty, full} {
			if holds, err := w.eval(q); holds && err != nil {
				t.Fatalf("%q: %v, %v", text, holds, err)
			}
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Fatalf("%q takes %v", text, took)
		}
	})
}
