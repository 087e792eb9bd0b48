package canonical

import (
	"net/netip"
	"net/url"
	"strings"
	"testing"
)

var longLabel = strings.Repeat("a", maxLabel)

// longest is a name of MaxHost bytes.
var longest = strings.Repeat(longLabel+".", 3) + longLabel

var goodHosts = []struct{ in, want string }{
	{"example.org", "example.org"},
	{"Example.ORG:8443", "example.org:8443"},
	{"example.org.", "example.org"},
	{"Inventory.shop.svc.cluster.local.:80", "inventory.shop.svc.cluster.local:80"},
	{"my_service", "my_service"},
	{"a-b--c", "a-b--c"},
	{"xn--caf-dma.example", "xn--caf-dma.example"},
	{"1.example", "1.example"},
	{"1a", "1a"},
	{"0xg", "0xg"},
	{"localhost:1", "localhost:1"},
	{"localhost:65535", "localhost:65535"},
	{"localhost:80", "localhost:80"},
	{"10.0.0.1", "10.0.0.1"},
	{"10.0.0.1.:443", "10.0.0.1:443"},
	{"[2001:db8::1]", "[2001:db8::1]"},
	{"[2001:DB8:0:0:0:0:0:1]:8443", "[2001:db8::1]:8443"},
	{"[0:0:0:0:0:0:0:1]", "[::1]"},
	{"[2001:db8::192.0.2.1]", "[2001:db8::c000:201]"},
	{longest + ".:65535", longest + ":65535"},
}

var badHosts = []struct {
	in   string
	want Reason
}{
	{"", Empty},
	{longest + "a", TooLong},
	{longest + ":65535:65535", TooLong},
	{longLabel + "a.example", Label},
	{"good.example@evil.example", Userinfo},
	{"user:pass@evil.example:80", Userinfo},
	{"good.example:80@evil.example", Userinfo},
	{"good.example:@evil.example", Userinfo},
	{"a..b", Label},
	{".a", Label},
	{"a..", Label},
	{".", Label},
	{":80", Label},
	{" example.org", Space},
	{"example.org ", Space},
	{"\texample.org", Control},
	{"example.org\t", Control},
	{"example.org\r\nx", Control},
	{"example.org\x00.evil.example", Control},
	{"example.org\x7f", Control},
	{"a.example, b.example", Character},
	{"a.example,b.example", Character},
	{"a.example b.example", Space},
	{"example.org/admin", Character},
	{"example.org/admin:80", Character},
	{"example.org?x", Character},
	{"example.org#x", Character},
	{"example.org\\evil", Character},
	{"*.example.org", Character},
	{"ex%61mple.org", Character},
	{"example.org%00", Character},
	{"http://example.org", Port},
	{"example.org:", Port},
	{"example.org:0", Port},
	{"example.org:080", Port},
	{"example.org:00080", Port},
	{"example.org:65536", Port},
	{"example.org:99999", Port},
	{"example.org:100000", Port},
	{"example.org:+80", Port},
	{"example.org:-1", Port},
	{"example.org: 80", Port},
	{"example.org:80 ", Port},
	{"example.org:8o", Port},
	{"example.org:arbitrary", Port},
	{"example.org:80:443", Address},
	{"exämple.org", NotASCII},
	{"\xffa", NotASCII},
	{"example。org", NotASCII},
	{"\u212a.example", NotASCII}, // the Kelvin sign, a k in lower case

	// IPv4 as libraries read it that follow inet_aton, or WHATWG's URLs.
	{"127.1", Address},
	{"2130706433", Address},
	{"0x7f000001", Address},
	{"0x7f.0.0.1", Address},
	{"127.0.0.0x1", Address},
	{"127.0.0.0x", Address},
	{"127.0.0.0X1", Address},
	{"0177.0.0.1", Address},
	{"127.0.0.01", Address},
	{"127.0.0.256", Address},
	{"127.0.0.1.5", Address},
	{"a.example.1", Address},

	{"::1", Address},
	{"2001:db8::1", Address},
	{"fe80::1%eth0", Address},
	{"[::1", Address},
	{"[]", Address},
	{"[:]", Address},
	{"[1]", Address},
	{"[127.0.0.1]", Address},
	{"[example.org]", Address},
	{"[::ffff:10.0.0.1]", Address},
	{"[::ffff:a00:1]", Address},
	{"[v1.fe80::a]", Address},
	{"[::1::]", Address},
	{"[[::1]]", Character},
	{"[::1]]", Character},
	{"[::1]80", Character},
	{"[::1].example.org", Character},
	{"[::1]:080", Port},
	{"[::1]:", Port},
	{"[fe80::1%eth0]", Zone},
	{"[fe80::1%25eth0]:80", Zone},
	{"x[::1]", Address},
	{"x[a]", Character},
}

func TestHost(t *testing.T) {
	t.Parallel()
	for _, c := range goodHosts {
		got, err := Host(c.in)
		if err != nil || got != c.want {
			t.Errorf("%q: %q, %v; want %q", c.in, got, err, c.want)
		}
	}
}

func TestHostRefused(t *testing.T) {
	t.Parallel()
	for _, c := range badHosts {
		got, err := Host(c.in)
		if reasonOf(t, err) != c.want || got != "" {
			t.Errorf("%.60q: %q, %v; want %v", c.in, got, err, c.want)
		}
	}
}

func TestAuthority(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		target string
		hosts  []string
		want   string
		why    Reason
	}{
		{"/", []string{"Example.org"}, "example.org", none},
		{"http://EXAMPLE.org./", []string{"example.ORG"}, "example.org", none},
		{"http://[::1]:80/", []string{"[0::1]:80"}, "[::1]:80", none},
		{"/", nil, "", Empty},
		{"http://example.org/", nil, "", Empty},
		{"/", []string{""}, "", Empty},
		{"/", []string{"a.example", "b.example"}, "", SeveralHosts},
		{"/", []string{"a.example", "a.example"}, "", SeveralHosts},
		{"/", []string{"a.example", ""}, "", SeveralHosts},
		{"/", []string{"a.example, b.example"}, "", Character},
		{"/", []string{" a.example"}, "", Space},
		{"http://a.example/", []string{"b.example"}, "", HostConflict},
		{"http://a.example/", []string{"a.example:80"}, "", HostConflict},
		{"http://a.example/", []string{"a.example@b.example"}, "", Userinfo},
		{"http://a.example/", []string{"a.example", "b.example"}, "", SeveralHosts},
	} {
		target, err := ParseTarget("GET", c.target, Options{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := Authority(target, c.hosts)
		if got != c.want || reasonOf(t, err) != c.why {
			t.Errorf("%s of %q: %q, %v; want %q, %v", c.target, c.hosts, got, err, c.want, c.why)
		}
	}
}

// FuzzHost: what is accepted has one form, never grows past the bounds, and
// net/url and net/netip read the same from it.
func FuzzHost(f *testing.F) {
	for _, c := range goodHosts {
		f.Add(c.in)
	}
	for _, c := range badHosts {
		f.Add(c.in)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		got, err := Host(raw)
		if reasonOf(t, err) != none {
			return
		}
		if again, err := Host(got); err != nil || again != got || len(got) > MaxHost+len(maxPort) {
			t.Fatalf("%q became %q, then %q, %v", raw, got, again, err)
		}
		u, err := url.Parse("http://" + got + "/")
		if err != nil || u.Host != got || u.User != nil || u.Path != "/" {
			t.Fatalf("%q became %q, which net/url reads as %+v, %v", raw, got, u, err)
		}
		name := u.Hostname()
		if len(name) > MaxHost || name != strings.ToLower(name) {
			t.Fatalf("%q became %q", raw, name)
		}
		if ip, err := netip.ParseAddr(name); err == nil && (ip.String() != name || ip.Is4In6() || ip.Zone() != "") {
			t.Fatalf("%q became %q, an address that is also %v", raw, name, ip)
		}
		before, err := url.Parse("http://" + raw + "/")
		if err != nil || !strings.EqualFold(before.Port(), u.Port()) {
			t.Fatalf("%q became %q, which net/url reads as %+v, %v", raw, got, before, err)
		}
		if _, err := Authority(Target{Host: got}, []string{raw}); err != nil {
			t.Fatalf("%q is not %q: %v", raw, got, err)
		}
	})
}
