package canonical

import (
	"strings"
	"testing"
)

// TestReasons: each has a code and a sentence of its own.
func TestReasons(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, r := range Reasons() {
		code, problem := r.String(), reasonWords[r].problem
		if code == "" || problem == "" || seen[code] || seen[problem] || strings.Trim(code, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
			t.Errorf("reason %d: %q, %q", r, code, problem)
		}
		seen[code], seen[problem] = true, true
	}
	for r, want := range map[Reason]string{DotSegment: "dot_segment", NotToken: "not_token", reasons: "unknown", 255: "unknown"} {
		if got := r.String(); got != want {
			t.Errorf("reason %d is %q; want %q", r, got, want)
		}
	}
	if text := (&Error{Part: PartPath, Reason: 255}).Error(); text != "path: unknown reason" {
		t.Error(text)
	}
}

func TestErrorText(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"/a/%2e%2e/b":                  `path: at "../b": a . or .. segment; send the path that it leads to`,
		"/a\x00\x1b[31m\r\n":           `path: at "\x00\x1b[31m\r\n": a control character`,
		"/é":                           `path: at "\u00e9": a byte that is not ASCII; percent-encode it, or use punycode for a host`,
		"/;" + strings.Repeat("x", 99): `path: at ";xxxxxxxxxxxxxxxxxxxxxxx"...: a semicolon, at which some services cut the segment off; leave it out`,
		"":                             "path: there is none",
	} {
		if _, err := Path(in, Options{}); err == nil || err.Error() != want {
			t.Errorf("%q: %v; want %s", in, err, want)
		}
	}
}

const typicalPath = "/api/v1/customers/48151623/orders/42"

// TestAllocations: what is canonical already costs no memory.
func TestAllocations(t *testing.T) {
	o := Options{EncodedSlash: true, EmptySegments: true}
	for name, f := range map[string]func() (string, error){
		"path":            func() (string, error) { return Path(typicalPath, Options{}) },
		"path, escapes":   func() (string, error) { return Path("/caf%C3%A9/a%20b//c%2Fd", o) },
		"pattern segment": func() (string, error) { return PatternSegment("caf%C3%A9") },
		"host":            func() (string, error) { return Host("inventory.shop.svc:8443") },
		"host, IPv4":      func() (string, error) { return Host("192.0.2.1:8443") },
		"host, IPv6":      func() (string, error) { return Host("[2001:db8::1]:8443") },
		"header name":     func() (string, error) { return HeaderName("x-request-id") },
		"header value":    func() (string, error) { return HeaderValue("\tgzip, br ") },
		"target": func() (string, error) {
			target, err := ParseTarget("GET", "http://example.org"+typicalPath, Options{})
			return target.Path, err
		},
		"authority": func() (string, error) {
			return Authority(Target{Host: "example.org"}, []string{"example.org"})
		},
	} {
		if n := testing.AllocsPerRun(100, func() {
			if _, err := f(); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// TestSameString: canonical input comes back as it is.
func TestSameString(t *testing.T) {
	t.Parallel()
	for _, in := range []string{typicalPath, "/", "/caf%C3%A9/a%20b"} {
		if got, err := Path(in, Options{}); err != nil || got != in {
			t.Errorf("%q became %q, %v", in, got, err)
		}
	}
}

func BenchmarkPath(b *testing.B) {
	for name, path := range map[string]string{
		"typical":   typicalPath,
		"gRPC":      "/shop.orders.v1.Orders/GetOrder",
		"escapes":   "/search/caf%C3%A9%20au%20lait",
		"respelled": "/users/jane%40example.org",
		"longest":   strings.Repeat("/"+strings.Repeat("a", MaxTarget/MaxSegments-1), MaxSegments),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Path(path, Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkTarget(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseTarget("GET", typicalPath+"?page=2", Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHost(b *testing.B) {
	for _, host := range []string{"inventory.shop.svc:8443", "192.0.2.1:8443", "[2001:db8::1]:8443"} {
		b.Run(host, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Host(host); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkHeader(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := HeaderName("x-request-id"); err != nil {
			b.Fatal(err)
		}
		if _, err := HeaderValue("2f1c9f6e-7d0c-4a57-9f0e-0f3f0f4f5a11"); err != nil {
			b.Fatal(err)
		}
	}
}
