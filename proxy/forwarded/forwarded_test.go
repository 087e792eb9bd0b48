package forwarded

import (
	"bytes"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/http1"
)

var (
	web     = spiffeid.RequireFromString("spiffe://example.org/web")
	gateway = spiffeid.RequireFromString("spiffe://example.org/gateway")
	orders  = spiffeid.RequireFromString("spiffe://example.org/orders")
	hash    = [32]byte{0xab, 31: 0xcd}
)

const (
	ours  = "By=spiffe://example.org/orders;Hash=ab000000000000000000000000000000000000000000000000000000000000cd;URI=spiffe://example.org/"
	trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
)

// sent returns the fields that a service gets for a request with those fields.
func sent(t testing.TB, s Settings, c Client, fields string) (string, error) {
	t.Helper()
	rules, err := Compile(s)
	if err != nil {
		t.Fatal(err)
	}
	var r http1.Request
	if n, err := r.Parse([]byte("GET / HTTP/1.1\r\nHost: Orders.example.org\r\n" + fields + "\r\n")); n == 0 || err != nil {
		t.Fatal(n, err)
	}
	var e http1.Edit
	id, _, err := rules.Maker(c).Edit(&r, &e, nil)
	if err != nil {
		return "", err
	}
	if !validID(id) {
		t.Errorf("id %q", id)
	}
	head, _, _ := strings.Cut(string(r.Append(nil, &e)), "\r\n\r\n")
	_, head, _ = strings.Cut(head, "\r\nhost: orders.example.org\r\n")
	return head, nil
}

var uuid = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`)

func TestFields(t *testing.T) {
	t.Parallel()
	client := Client{ID: web, Hash: hash, Own: orders, Source: netip.MustParseAddr("::ffff:10.0.0.7"), TLS: true}
	trusted := client
	trusted.ID = gateway
	quiet := Settings{Origin: Untouched}
	identity := Settings{Origin: Untouched, IdentityHeader: "x-spiffe-id", XFCC: Sanitize}
	appends := Settings{Origin: Untouched, XFCC: Append, Trusted: []spiffeid.ID{gateway}}
	forwards := Settings{Origin: Untouched, XFCC: Forward, Trusted: []spiffeid.ID{gateway}}
	const id = "x-request-id: UUID"
	for _, test := range []struct {
		name     string
		settings Settings
		client   Client
		fields   []string
		want     []string
	}{
		{"nothing", quiet, client, nil, []string{id}},
		{"spoof of the usual name", Settings{Origin: Untouched, IdentityHeader: "x-who"}, client, []string{"x-spiffe-id: a"}, []string{"x-who: spiffe://example.org/web", id}},
		{"identity", identity, client, nil, []string{"x-spiffe-id: spiffe://example.org/web", "x-forwarded-client-cert: " + ours + "web", id}},
		{"spoofs", identity, client, []string{"X-SPIFFE-ID: a", "x_spiffe_id: a", "X-Spiffe_Id: a", "X-Forwarded-Client-Cert: By=a", "x_forwarded_client_cert: By=a"}, []string{"x-spiffe-id: spiffe://example.org/web", "x-forwarded-client-cert: " + ours + "web", id}},
		{"spoofs by other names", Settings{}, client, []string{"Client-Cert: a", "client_cert_chain: a", "X-Real-IP: 1.2.3.4", "X-Forwarded-Ssl: on"}, []string{id, "x-forwarded-for: 10.0.0.7", "x-forwarded-proto: https", "x-forwarded-host: orders.example.org"}},
		{"other paths and methods", quiet, client, []string{"X-Original-URL: /admin", "X-Rewrite-URL: /admin", "X-HTTP-Method-Override: DELETE", "x_http_method: DELETE"}, []string{id}},
		{"spoofs without ours", quiet, client, []string{"X-Forwarded-Client-Cert: By=a"}, []string{id}},
		{"plaintext", identity, Client{Own: orders}, []string{"x-spiffe-id: spiffe://example.org/web"}, []string{id}},
		{"append of a stranger", appends, client, []string{"x-forwarded-client-cert: By=a;URI=b"}, []string{"x-forwarded-client-cert: " + ours + "web", id}},
		{"append", appends, trusted, []string{`x-forwarded-client-cert: By=a;Subject="CN=x,O=\"y\"";URI=b`}, []string{id, `x-forwarded-client-cert: By=a;Subject="CN=x,O=\"y\"";URI=b,` + ours + "gateway"}},
		{"append to two", appends, trusted, []string{"x-forwarded-client-cert: By=a", "x-forwarded-client-cert: By=b"}, []string{id, "x-forwarded-client-cert: By=a, By=b," + ours + "gateway"}},
		{"append to none", appends, trusted, nil, []string{id, "x-forwarded-client-cert: " + ours + "gateway"}},
		{"forward", forwards, trusted, []string{"x-forwarded-client-cert: By=a"}, []string{id, "x-forwarded-client-cert: By=a"}},
		{"forward of a stranger", forwards, client, []string{"x-forwarded-client-cert: By=a"}, []string{"x-forwarded-client-cert: " + ours + "web", id}},
		{"origin", Settings{}, client, []string{"x-forwarded-for: 1.2.3.4", "Forwarded: for=1.2.3.4", "x-forwarded-port: 1", "x_forwarded_host: evil"}, []string{id, "x-forwarded-for: 10.0.0.7", "x-forwarded-proto: https", "x-forwarded-host: orders.example.org"}},
		{"origin behind", Settings{Origin: Behind}, client, []string{"x-forwarded-for: 1.2.3.4", "x-forwarded-for: 5.6.7.8"}, []string{id, "x-forwarded-for: 1.2.3.4, 5.6.7.8, 10.0.0.7", "x-forwarded-proto: https", "x-forwarded-host: orders.example.org"}},
		{"origin of a socket", Settings{}, Client{}, nil, []string{id, "x-forwarded-for: unknown", "x-forwarded-proto: http", "x-forwarded-host: orders.example.org"}},
		{"origin untouched", quiet, client, []string{"x-forwarded-for: 1.2.3.4"}, []string{"x-forwarded-for: 1.2.3.4", id}},
		{"id kept", quiet, client, []string{"X-Request-ID: abc-1"}, []string{"x-request-id: abc-1"}},
		{"id of odd bytes", quiet, client, []string{"X-Request-ID: a,b"}, []string{id}},
		{"two ids", quiet, client, []string{"X-Request-ID: a", "x-request-id: b"}, []string{id}},
		{"long id", quiet, client, []string{"X-Request-ID: " + strings.Repeat("a", 129)}, []string{id}},
		{"another name", Settings{Origin: Untouched, RequestID: "x-b3"}, client, []string{"x-request-id: a"}, []string{"x-request-id: a", "x-b3: UUID"}},
		{"trace", quiet, client, []string{"traceparent: " + trace, "tracestate: a=b"}, []string{"traceparent: " + trace, "tracestate: a=b", id}},
		{"bad trace", quiet, client, []string{"traceparent: 00-x", "tracestate: a=b"}, []string{id}},
		{"two traces", quiet, client, []string{"traceparent: " + trace, "traceparent: " + trace}, []string{id}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fields := ""
			for _, f := range test.fields {
				fields += f + "\r\n"
			}
			got, err := sent(t, test.settings, test.client, fields)
			if err != nil {
				t.Fatal(err)
			}
			if lines := strings.Split(uuid.ReplaceAllString(got, "UUID"), "\r\n"); !slices.Equal(lines, test.want) {
				t.Errorf("got  %q\nwant %q", lines, test.want)
			}
		})
	}
}

func TestXFCCRefused(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"a", "By", "By=", "by=a", "By=a;", "By=a,", ",By=a", `By="a`, `By="a"b`, `By=a"b`, `By="a\"`, "Evil=a", "By=a b", "By=a;;URI=b", `By="a\\";URI=b`} {
		got, err := sent(t, Settings{XFCC: Append, Trusted: []spiffeid.ID{gateway}}, Client{ID: gateway, Own: orders}, "x-forwarded-client-cert: "+value+"\r\n")
		if err == nil {
			t.Errorf("%q was passed on as %q", value, got)
		}
	}
}

func TestTraces(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]bool{
		trace: true, "01" + trace[2:] + "-more": true, "01" + trace[2:]: true,
		"": false, trace + "-more": false, "ff" + trace[2:]: false, strings.ToUpper(trace): false, "01" + trace[2:] + "more": false,
		"00-00000000000000000000000000000000-b7ad6b7169203331-01": false, "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01": false,
		trace[:54] + "g": false, strings.Replace(trace, "-", "_", 1): false,
	} {
		if validTrace(value) != want {
			t.Errorf("%q: want %v", value, want)
		}
	}
}

func TestSettingsRefused(t *testing.T) {
	t.Parallel()
	for _, s := range []Settings{{IdentityHeader: "X-Spiffe-Id"}, {IdentityHeader: "a b"}, {IdentityHeader: "x-request-id"}, {IdentityHeader: "x-forwarded-for"}, {RequestID: "forwarded"}, {XFCC: 9}, {Origin: 9}} {
		if _, err := Compile(s); err == nil {
			t.Errorf("%+v was accepted", s)
		}
	}
}

func TestEditDoesNotAllocate(t *testing.T) {
	rules, err := Compile(Settings{IdentityHeader: "x-spiffe-id", XFCC: Sanitize})
	if err != nil {
		t.Fatal(err)
	}
	m := rules.Maker(Client{ID: web, Own: orders, TLS: true})
	var r http1.Request
	head := []byte("GET / HTTP/1.1\r\nHost: x\r\ntraceparent: " + trace + "\r\nx-forwarded-for: 1.2.3.4\r\n\r\n")
	if _, err := r.Parse(head); err != nil {
		t.Fatal(err)
	}
	var e http1.Edit
	notes := make([]byte, 0, 256)
	if n := testing.AllocsPerRun(1000, func() {
		e.Append = e.Append[:0]
		if _, notes, err = m.Edit(&r, &e, notes[:0]); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkEdit(b *testing.B) {
	rules, err := Compile(Settings{IdentityHeader: "x-spiffe-id", XFCC: Sanitize})
	if err != nil {
		b.Fatal(err)
	}
	m := rules.Maker(Client{ID: web, Own: orders, TLS: true})
	var r http1.Request
	if _, err := r.Parse([]byte("GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: a\r\nAccept: */*\r\n\r\n")); err != nil {
		b.Fatal(err)
	}
	var e http1.Edit
	var notes []byte
	b.ReportAllocs()
	for b.Loop() {
		e.Append = e.Append[:0]
		_, notes, _ = m.Edit(&r, &e, notes[:0])
	}
}

// FuzzXFCC: whatever a trusted peer sends, behind it our element is one of its
// own to a reader that knows quotes, and to one that does not.
func FuzzXFCC(f *testing.F) {
	for _, s := range []string{"By=a;URI=b", `By=a;Subject="CN=\"x\",O=y";URI=b, By=c`, `By="a\\"`, `By="a`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		if !validXFCC(value) {
			return
		}
		if bytes.Contains(value, []byte(`\\"`)) {
			t.Fatalf("%q has two ends", value)
		}
		joined := append(bytes.Clone(value), fmt.Sprintf(",%sgateway", ours)...)
		if !validXFCC(joined) {
			t.Fatalf("%q is good, and %q is not", value, joined)
		}
		open := false
		for i := 0; i < len(value); i++ {
			switch {
			case value[i] == '\\' && open:
				i++
			case value[i] == '"':
				open = !open
			}
		}
		if open {
			t.Fatalf("a quote stays open in %q", value)
		}
	})
}
