package extauthz

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/policy"
)

const (
	web    = "spiffe://example.org/ns/shop/sa/web"
	orders = "spiffe://example.org/ns/shop/sa/orders"
)

func at(ip string, port uint32) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: ip, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port},
	}}}
}

// envoys is a question as Envoy asks it, which edits change.
func envoys(edits ...func(*auth.AttributeContext)) *auth.CheckRequest {
	a := &auth.AttributeContext{
		Source:      &auth.AttributeContext_Peer{Address: at("10.1.2.3", 40000), Principal: web},
		Destination: &auth.AttributeContext_Peer{Address: at("10.9.9.9", 8443), Principal: orders},
		Request: &auth.AttributeContext_Request{Http: &auth.AttributeContext_HttpRequest{
			Id: "7", Method: "GET", Host: "orders.shop:8443", Path: "/v1/orders?limit=5", Scheme: "https", Protocol: "HTTP/2",
			Headers: map[string]string{
				":method": "GET", ":path": "/v1/orders?limit=5", ":authority": "orders.shop:8443", ":scheme": "https",
				"x-request-id": "2f6d", "x-env": "prod", "content-length": "0",
			},
		}},
		TlsSession: &auth.AttributeContext_TLSSession{Sni: "orders.shop"},
	}
	for _, edit := range edits {
		edit(a)
	}
	return &auth.CheckRequest{Attributes: a}
}

// of edits what is said of the HTTP request.
func of(edit func(*auth.AttributeContext_HttpRequest)) func(*auth.AttributeContext) {
	return func(a *auth.AttributeContext) { edit(a.Request.Http) }
}

func raw(lines ...string) func(*auth.AttributeContext) {
	return of(func(h *auth.AttributeContext_HttpRequest) {
		h.Headers, h.HeaderMap = nil, &core.HeaderMap{}
		for _, l := range lines {
			name, value, _ := strings.Cut(l, "=")
			h.HeaderMap.Headers = append(h.HeaderMap.Headers, &core.HeaderValue{Key: name, RawValue: []byte(value)})
		}
	})
}

func header(name, value string) func(*auth.AttributeContext) {
	return of(func(h *auth.AttributeContext_HttpRequest) { h.Headers[name] = value })
}

func path(p string) func(*auth.AttributeContext) {
	return of(func(h *auth.AttributeContext_HttpRequest) { h.Path = p })
}

func host(name string) func(*auth.AttributeContext) {
	return of(func(h *auth.AttributeContext_HttpRequest) { h.Host = name })
}

func method(m string) func(*auth.AttributeContext) {
	return of(func(h *auth.AttributeContext_HttpRequest) { h.Method = m })
}

// describe says what rules are asked, in a line.
func describe(q *question) string {
	var fields []string
	for _, h := range q.HTTP.Headers {
		fields = append(fields, h.Name+"="+h.Value)
	}
	slices.Sort(fields)
	return fmt.Sprintf("%s %s%s from %s at %s to %s at %d sni %s [%s]",
		q.HTTP.Method, q.HTTP.Host, q.HTTP.Path, q.From.ID, q.Source, q.To.ID, q.Port, q.SNI, strings.Join(fields, " "))
}

func TestRead(t *testing.T) {
	t.Parallel()
	const ends = " from " + web + " at 10.1.2.3:40000 to " + orders + " at 8443 sni orders.shop "
	for name, c := range map[string]struct {
		edit func(*auth.AttributeContext)
		want string
	}{
		"as it is":          {func(*auth.AttributeContext) {}, "GET orders.shop:8443/v1/orders" + ends + "[x-env=prod x-request-id=2f6d]"},
		"without a query":   {path("/v1/orders"), "GET orders.shop:8443/v1/orders" + ends + "[x-env=prod x-request-id=2f6d]"},
		"OPTIONS *":         {func(a *auth.AttributeContext) { a.Request.Http.Method, a.Request.Http.Path = "OPTIONS", "*" }, "OPTIONS orders.shop:8443*" + ends + "[x-env=prod x-request-id=2f6d]"},
		"a host in capital": {host("Orders.Shop"), "GET orders.shop/v1/orders" + ends + "[x-env=prod x-request-id=2f6d]"},
		"joined lines":      {header("x-env", "prod, test"), "GET orders.shop:8443/v1/orders" + ends + "[x-env=prod x-env=prod, test x-env=test x-request-id=2f6d]"},
		"raw lines":         {raw(":path=/x", "x-env=prod", "x-env=a,b", "X-Big=1", "host=other"), "GET orders.shop:8443/v1/orders" + ends + "[x-big=1 x-env=a,b x-env=prod]"},
		"bytes above ASCII": {raw("x-name=caf\xe9"), "GET orders.shop:8443/v1/orders" + ends + "[x-name=caf\xe9]"},
		"a mapped address": {
			func(a *auth.AttributeContext) { a.Source.Address = at("::ffff:10.1.2.3", 40000) },
			"GET orders.shop:8443/v1/orders" + ends + "[x-env=prod x-request-id=2f6d]",
		},
		"a Unix socket": {func(a *auth.AttributeContext) {
			a.Source.Address = &core.Address{Address: &core.Address_Pipe{Pipe: &core.Pipe{Path: "/run/x.sock"}}}
			a.TlsSession = nil
		}, "GET orders.shop:8443/v1/orders from " + web + " at invalid AddrPort to " + orders + " at 8443 sni  [x-env=prod x-request-id=2f6d]"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := &question{}
			if wrong := q.read(envoys(c.edit)); wrong != nil {
				t.Fatal(wrong.status, wrong.err)
			}
			if got := describe(q); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			if !q.HTTP.NoProof || q.Direction != policy.Inbound {
				t.Error("it is no inbound request without proof of whom it speaks for")
			}
		})
	}
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		edit   func(*auth.AttributeContext)
		status int
		why    string
	}{
		"nothing":             {func(a *auth.AttributeContext) { proto.Reset(a) }, 400, "no HTTP request"},
		"no method":           {method(""), 400, "method"},
		"lower case":          {method("get"), 400, "lower case"},
		"TRACE":               {method("TRACE"), 405, "TRACE"},
		"CONNECT":             {method("CONNECT"), 400, "CONNECT"},
		"no path":             {path(""), 400, "target"},
		"a URL":               {path("http://orders.shop/v1"), 400, "one spelling"},
		"dots":                {path("/v1/../admin"), 400, ". or .. segment"},
		"an escaped letter":   {path("/v1/%61dmin"), 400, `one spelling is "/v1/admin"`},
		"small hexadecimal":   {path("/caf%c3%a9"), 400, "one spelling"},
		"an escaped slash":    {path("/v1%2Fadmin"), 400, "encoded slash"},
		"two slashes":         {path("//v1"), 400, "empty segment"},
		"a semicolon":         {path("/v1;x/admin"), 400, "semicolon"},
		"a fragment":          {path("/v1#x"), 400, "path"},
		"a long path":         {path("/" + strings.Repeat("a", canonical.MaxTarget)), 400, "too long"},
		"no host":             {host(""), 400, "host"},
		"a dot at the end":    {host("orders.shop."), 400, "one spelling is orders.shop"},
		"a user":              {host("a@orders.shop"), 400, "user"},
		"a bad name":          {header("x env", "1"), 400, "header name"},
		"a control":           {header("x-env", "a\x00b"), 400, "control"},
		"a long value":        {header("x-env", strings.Repeat("a", canonical.MaxHeaderValue+1)), 400, "too long"},
		"many parts":          {header("x-env", strings.Repeat("a,", maxFields)), 431, "more than 128 fields"},
		"a large head":        {raw(slices.Repeat([]string{"x-env=" + strings.Repeat("a", 16_000)}, 5)...), 431, "larger than 65536 bytes"},
		"many lines":          {raw(slices.Repeat([]string{"x-env=a"}, maxFields+1)...), 431, "more than 128 fields"},
		"a strange SNI":       {func(a *auth.AttributeContext) { a.TlsSession.Sni = "a b" }, 400, "sni"},
		"no source":           {func(a *auth.AttributeContext) { a.Source = nil }, 403, "source.principal"},
		"no address":          {func(a *auth.AttributeContext) { a.Source.Address = nil }, 403, "source.address"},
		"a name":              {func(a *auth.AttributeContext) { a.Source.Address = at("web.shop", 1) }, 403, "no IP address"},
		"a large port":        {func(a *auth.AttributeContext) { a.Destination.Address = at("10.0.0.1", 65536) }, 403, "destination.address"},
		"nobody":              {func(a *auth.AttributeContext) { a.Source.Principal = "" }, 403, "source.principal is empty"},
		"a DNS name":          {func(a *auth.AttributeContext) { a.Source.Principal = "web.shop" }, 403, `source.principal "web.shop" is no SPIFFE ID`},
		"a subject":           {func(a *auth.AttributeContext) { a.Source.Principal = "CN=web,O=shop" }, 403, "no SPIFFE ID"},
		"two SANs":            {func(a *auth.AttributeContext) { a.Source.Principal = web + "," + orders }, 403, "no SPIFFE ID"},
		"to nobody":           {func(a *auth.AttributeContext) { a.Destination.Principal = "" }, 403, "destination.principal is empty"},
		"to somebody strange": {func(a *auth.AttributeContext) { a.Destination.Principal = strings.Repeat("x", 5000) }, 403, "no SPIFFE ID"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := &question{}
			wrong := q.read(envoys(c.edit))
			if wrong == nil {
				t.Fatalf("is read as %s", describe(q))
			}
			if wrong.status != c.status || !strings.Contains(wrong.err.Error(), c.why) {
				t.Errorf("%d %v, want %d with %q", wrong.status, wrong.err, c.status, c.why)
			}
			if len(wrong.err.Error()) > 400 {
				t.Errorf("the error has %d bytes", len(wrong.err.Error()))
			}
		})
	}
}

func TestReadCertificate(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	svid := ca.SVID(strings.TrimPrefix(web, "spiffe://example.org"))
	encoded := func(text []byte) func(*auth.AttributeContext) {
		return func(a *auth.AttributeContext) { a.Source.Certificate = url.PathEscape(string(text)) }
	}
	q := &question{}
	if wrong := q.read(envoys(encoded(testca.CertPEM(svid.Leaf.Raw)))); wrong != nil {
		t.Fatal(wrong.err)
	}
	if q.From != policy.PeerOf(q.From.ID, svid.Leaf) || q.From.ID.String() != web {
		t.Errorf("it is from %+v", q.From)
	}
	for name, edit := range map[string]func(*auth.AttributeContext){
		"of another":       encoded(testca.CertPEM(ca.SVID("/other").Leaf.Raw)),
		"of an authority":  encoded(testca.CertPEM(ca.Cert.Raw)),
		"a key":            encoded(testca.KeyPEM(t, svid)),
		"no DER":           encoded(testca.CertPEM([]byte("x"))),
		"no PEM":           encoded([]byte("x")),
		"not encoded well": func(a *auth.AttributeContext) { a.Source.Certificate = "%zz" },
	} {
		if wrong := new(question).read(envoys(edit)); wrong == nil || wrong.status != http.StatusForbidden || !strings.Contains(wrong.err.Error(), "source.certificate") {
			t.Errorf("%s: %+v", name, wrong)
		}
	}
}

// TestJoined holds what a client gains by sending a field twice, where Envoy
// joins the two: nothing.
func TestJoined(t *testing.T) {
	t.Parallel()
	rules, err := policy.Parse("rules.yaml", []byte(`version: 1
rules:
  - {id: prod, effect: allow, from: ["`+web+`"], http: {headers: {x-env: [prod]}}}
  - {id: no-debug, effect: deny, http: {headers: {x-debug: ["1"]}}}
`))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		edits []func(*auth.AttributeContext)
		allow bool
	}{
		"one value":                {nil, true},
		"another beside it":        {[]func(*auth.AttributeContext){header("x-env", "prod,test")}, false},
		"what is denied":           {[]func(*auth.AttributeContext){header("x-debug", "1")}, false},
		"what is denied, repeated": {[]func(*auth.AttributeContext){header("x-debug", "0,1")}, false},
		"with a space":             {[]func(*auth.AttributeContext){header("x-debug", "1, 0")}, false},
	} {
		q := &question{}
		if wrong := q.read(envoys(c.edits...)); wrong != nil {
			t.Fatal(name, wrong.err)
		}
		var d policy.Decision
		if rules.Decide(&q.Request, &d); d.Allow != c.allow {
			t.Errorf("%s: allowed: %t", name, d.Allow)
		}
	}
}

// FuzzRead feeds what could come over the wire. What is read is canonical, and
// what Envoy would forward.
func FuzzRead(f *testing.F) {
	for _, edit := range []func(*auth.AttributeContext){
		func(*auth.AttributeContext) {}, raw("x-env=prod", "x-env=test"), path("/v1/../x"), header("x-a", "1,2"),
		func(a *auth.AttributeContext) { a.Source.Principal = "" },
		func(a *auth.AttributeContext) {
			a.Source.Certificate = "-----BEGIN%20CERTIFICATE-----%0AMAA%3D%0A-----END%20CERTIFICATE-----%0A"
		},
	} {
		b, err := proto.Marshal(envoys(edit))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var sent auth.CheckRequest
		if proto.Unmarshal(b, &sent) != nil {
			return
		}
		q := &question{}
		wrong := q.read(&sent)
		answer := refuses(http.StatusForbidden, requestID(q, sent.GetAttributes().GetRequest().GetHttp().GetId()), "", q.http.GRPC())
		if _, err := proto.Marshal(answer); err != nil {
			t.Fatal(err)
		}
		if wrong != nil {
			if wrong.status < 400 || len(wrong.err.Error()) > 1000 {
				t.Fatal(wrong.status, wrong.err)
			}
			return
		}
		if q.From.ID.IsZero() || q.To.ID.IsZero() || len(q.HTTP.Headers) > maxFields {
			t.Fatal(describe(q))
		}
		forwarded, _, _ := strings.Cut(sent.Attributes.Request.Http.Path, "?")
		if again, err := canonical.Path(q.HTTP.Path, canonical.Options{}); q.HTTP.Path != forwarded || q.HTTP.Path != "*" && (err != nil || again != q.HTTP.Path) {
			t.Fatalf("path %q of %q", q.HTTP.Path, sent.Attributes.Request.Http.Path)
		}
		for _, h := range q.HTTP.Headers {
			if name, err := canonical.HeaderName(h.Name); err != nil || name != h.Name {
				t.Fatalf("header %q", h.Name)
			}
		}
	})
}
