package proxyproto

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"

	pires "github.com/pires/go-proxyproto"
	"github.com/pires/go-proxyproto/tlvparse"
)

func tcp(source, destination string) Header {
	return Header{Source: netip.MustParseAddrPort(source), Destination: netip.MustParseAddrPort(destination)}
}

// block is a header of version 2 with its length filled in.
func block(command, family byte, body ...[]byte) []byte {
	b := append([]byte(signatureV2), command, family)
	all := bytes.Join(body, nil)
	b = binary.BigEndian.AppendUint16(b, uint16(len(all)))
	return append(b, all...)
}

var (
	four  = []byte{192, 0, 2, 7, 198, 51, 100, 9, 0x1f, 0x90, 0x01, 0xbb}
	noop  = []byte{0x04, 0, 2, 9, 9}
	paths = append(append([]byte("/run/a.sock"), make([]byte, pathSize-11)...), append([]byte("/run/b.sock"), make([]byte, pathSize-11)...)...)
)

// summed puts a checksum into a header whose last TLV is one of zeros.
func summed(b []byte, wrong uint32) []byte {
	sum := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
	return binary.BigEndian.AppendUint32(b[:len(b)-4], sum+wrong)
}

var blankSum = []byte{0x03, 0, 4, 0, 0, 0, 0}

var good = map[string]struct {
	in   string
	want Header
}{
	"v1 TCP4":             {"PROXY TCP4 192.0.2.7 198.51.100.9 8080 443\r\n", tcp("192.0.2.7:8080", "198.51.100.9:443")},
	"v1 TCP6":             {"PROXY TCP6 2001:db8::7 2001:db8::9 8080 443\r\n", tcp("[2001:db8::7]:8080", "[2001:db8::9]:443")},
	"v1 TCP6, the long":   {"PROXY TCP6 2001:0db8:1111:2222:3333:4444:5555:6666 2001:0db8:1111:2222:3333:4444:5555:7777 65535 65535\r\n", tcp("[2001:db8:1111:2222:3333:4444:5555:6666]:65535", "[2001:db8:1111:2222:3333:4444:5555:7777]:65535")},
	"v1 TCP6, of IPv4":    {"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.9 8080 443\r\n", tcp("192.0.2.7:8080", "198.51.100.9:443")},
	"v1 UNKNOWN":          {"PROXY UNKNOWN\r\n", Header{}},
	"v1 UNKNOWN and more": {"PROXY UNKNOWN ffff::1 ::2 65535 0 what ever\r\n", Header{}},
	"v2 IPv4":             {string(block(commandProxy, tcp4, four)), tcp("192.0.2.7:8080", "198.51.100.9:443")},
	"v2 IPv4, TLVs":       {string(block(commandProxy, tcp4, four, noop, noop)), tcp("192.0.2.7:8080", "198.51.100.9:443")},
	"v2 IPv4, checksum":   {string(summed(block(commandProxy, tcp4, four, noop, blankSum), 0)), tcp("192.0.2.7:8080", "198.51.100.9:443")},
	"v2 IPv6": {
		string(block(commandProxy, tcp6, netip.MustParseAddr("2001:db8::7").AsSlice(), netip.MustParseAddr("2001:db8::9").AsSlice(), four[8:])),
		tcp("[2001:db8::7]:8080", "[2001:db8::9]:443"),
	},
	"v2 unix":             {string(block(commandProxy, unixStream, paths)), Header{Unix: true, SourcePath: "/run/a.sock", DestinationPath: "/run/b.sock"}},
	"v2 LOCAL":            {string(block(commandLocal, unspecified)), Header{}},
	"v2 LOCAL with block": {string(block(commandLocal, tcp4, four, noop)), Header{}},
	"v2 no addresses":     {string(block(commandProxy, unspecified, noop)), Header{}},
	"v2 of MaxSize":       {string(block(commandProxy, tcp4, four, []byte{0xE1, byte((MaxSize - headV2 - sizeIPv4 - 3) >> 8), byte((MaxSize - headV2 - sizeIPv4 - 3) & 0xff)}, make([]byte, MaxSize-headV2-sizeIPv4-3))), tcp("192.0.2.7:8080", "198.51.100.9:443")},
}

// TestRead: exactly the header is taken, whether it comes whole or byte by
// byte, with something behind it or not.
func TestRead(t *testing.T) {
	t.Parallel()
	const behind = "\x16\x03\x01 the hello"
	for name, c := range good {
		for _, rest := range []string{"", behind} {
			whole := strings.NewReader(c.in + rest)
			slow := strings.NewReader(c.in + rest)
			for how, r := range map[string]io.Reader{"whole": whole, "byte by byte": iotest.OneByteReader(slow)} {
				got, err := Read(r)
				if err != nil || got != c.want {
					t.Errorf("%s, %s: %+v, %v; want %+v", name, how, got, err, c.want)
				}
				left, _ := io.ReadAll(r)
				if string(left) != rest {
					t.Errorf("%s, %s: %q is left; want %q", name, how, left, rest)
				}
			}
		}
	}
}

func TestReadBad(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ in, want string }{
		"nothing":                  {"", "EOF"},
		"TLS":                      {"\x16\x03\x01\x02\x00", "no PROXY header: the first bytes are 1603010200, as TLS begins"},
		"HTTP, one byte was right": {"PUT / HTTP/1.0\r\n", "no PROXY header: the first bytes are 505554202f204854"},
		"cut in the signature":     {"PROX", "ends after 4 bytes"},
		"cut in v1":                {"PROXY TCP4 192.0.2.7 198", "ends after 24 bytes"},
		"cut in v2":                {string(block(commandProxy, tcp4, four)[:20]), "ends after 20 bytes"},
		"cut in the head of v2":    {signatureV2 + "\x21\x11\x00", "ends after 15 bytes"},
		"v1 of 108 bytes":          {"PROXY UNKNOWN " + strings.Repeat("x", 92) + "\r\n", "no line end within 107 bytes"},
		"v1 LF alone":              {"PROXY TCP4 192.0.2.7 198.51.100.9 8080 443\n", "does not end with CR LF"},
		"v1 CR within":             {"PROXY UNKNOWN\rx\r\n", "does not end with CR LF"},
		"v1 two lines":             {"PROXY TCP4\r\n  xxxx\r\n", "does not end with CR LF"},
		"v1 signature, no space":   {"PROXYTCP4 192.0.2.7 198.51.100.9 8080 443\r\n", "no PROXY header"},
		"v1 UDP4":                  {"PROXY UDP4 192.0.2.7 198.51.100.9 8080 443\r\n", "neither TCP4, TCP6 nor UNKNOWN"},
		"v1 two spaces":            {"PROXY TCP4  192.0.2.7 198.51.100.9 8080 443\r\n", "got 6 words"},
		"v1 a word too many":       {"PROXY TCP4 192.0.2.7 198.51.100.9 8080 443 x\r\n", "got 6 words"},
		"v1 a word too few":        {"PROXY TCP4 192.0.2.7 198.51.100.9 8080\r\n", "got 4 words"},
		"v1 IPv6 in TCP4":          {"PROXY TCP4 2001:db8::7 198.51.100.9 8080 443\r\n", "no address of TCP4"},
		"v1 IPv4 in TCP6":          {"PROXY TCP6 192.0.2.7 2001:db8::9 8080 443\r\n", "no address of TCP6"},
		"v1 zone":                  {"PROXY TCP6 fe80::1%eth0 2001:db8::9 8080 443\r\n", "no address of TCP6"},
		"v1 leading zero":          {"PROXY TCP4 192.0.2.07 198.51.100.9 8080 443\r\n", "no address of TCP4"},
		"v1 port 65536":            {"PROXY TCP4 192.0.2.7 198.51.100.9 65536 443\r\n", "no port"},
		"v1 port 080":              {"PROXY TCP4 192.0.2.7 198.51.100.9 8080 080\r\n", "no port"},
		"v1 port +1":               {"PROXY TCP4 192.0.2.7 198.51.100.9 +1 443\r\n", "no port"},
		"v1 from nowhere":          {"PROXY TCP4 0.0.0.0 198.51.100.9 8080 443\r\n", "no address of one host"},
		"v1 from many":             {"PROXY TCP6 ff02::1 2001:db8::9 8080 443\r\n", "no address of one host"},
		"v2 of version 1":          {string(block(0x11, tcp4, four)), "version and command 0x11"},
		"v2 command 2":             {string(block(0x22, tcp4, four)), "version and command 0x22"},
		"v2 UDP":                   {string(block(commandProxy, 0x12, four)), "family and transport 0x12"},
		"v2 family 4":              {string(block(commandProxy, 0x41, four)), "family and transport 0x41"},
		"v2 too short":             {string(block(commandProxy, tcp6, four)), "12 bytes are too few"},
		"v2 from many":             {string(block(commandProxy, tcp4, []byte{239, 0, 0, 1}, four[4:])), "no address of one host"},
		"v2 TLV cut in its head":   {string(block(commandProxy, tcp4, four, noop, []byte{4, 0})), "the last 2 bytes are no TLV"},
		"v2 TLV too long":          {string(block(commandProxy, tcp4, four, []byte{4, 0, 3, 9, 9})), "TLV 0x04 of 3 bytes, of which 2 are there"},
		"v2 wrong checksum":        {string(summed(block(commandProxy, tcp4, four, noop, blankSum), 1)), "the checksum is wrong"},
		"v2 checksum of 2 bytes":   {string(block(commandProxy, tcp4, four, []byte{3, 0, 2, 9, 9})), "want one checksum"},
		"v2 two checksums":         {string(summed(block(commandProxy, tcp4, four, blankSum, blankSum), 0)), "want one checksum"},
		"v2 larger than MaxSize":   {signatureV2 + "\x21\x11\xff\xff", "a header of 65551 bytes"},
	} {
		for how, r := range map[string]io.Reader{"whole": strings.NewReader(c.in), "byte by byte": iotest.OneByteReader(strings.NewReader(c.in))} {
			got, err := Read(r)
			if err == nil {
				t.Errorf("%s, %s: no error, but %+v", name, how, got)
			} else if how == "whole" && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %q does not say %q", name, err, c.want)
			}
			if strings.HasPrefix(c.want, "no PROXY header") != errors.Is(err, ErrNone) {
				t.Errorf("%s, %s: %v", name, how, err)
			}
		}
	}
}

// TestReadEndsAtOnce: what is no header is not waited for to the end.
func TestReadEndsAtOnce(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	defer func() { _ = ours.Close() }()
	go func() { _, _ = theirs.Write([]byte("G")) }()
	if _, err := Read(ours); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
}

// TestReadPassesErrorsOn: of the connection, which the caller knows.
func TestReadPassesErrorsOn(t *testing.T) {
	t.Parallel()
	for _, before := range []string{"", "PROXY TCP4 ", "PROXY TCP4 192.0.2.7 198.51", signatureV2 + "\x21\x11\x00\x0c\x01"} {
		if _, err := Read(io.MultiReader(strings.NewReader(before), iotest.ErrReader(net.ErrClosed))); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after %q: %v", before, err)
		}
	}
}

// TestWrittenForOthers: what we write another implementation reads.
func TestWrittenForOthers(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("p", pathSize)
	for name, h := range map[string]Header{
		"IPv4":  tcp("192.0.2.7:8080", "198.51.100.9:443"),
		"IPv6":  tcp("[2001:db8::7]:8080", "[2001:db8::9]:443"),
		"mixed": tcp("192.0.2.7:8080", "[2001:db8::9]:443"),
		"unix":  {Unix: true, SourcePath: "", DestinationPath: long},
		"local": {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v1, err := pires.Read(bufio.NewReader(bytes.NewReader(h.AppendV1(nil))))
			if err != nil {
				t.Fatal(err)
			}
			if want := h.Source.IsValid(); want != (v1.SourceAddr != nil) {
				t.Errorf("v1: %+v", v1)
			} else if want && (netipOf(v1.SourceAddr) != h.Source || netipOf(v1.DestinationAddr) != h.Destination) {
				t.Errorf("v1: %+v", v1)
			}
			v2, err := pires.Read(bufio.NewReader(bytes.NewReader(h.AppendV2(nil, Authority("db.example.org"), ALPN("postgresql"), ALPN(""), MutualTLS("TLSv1.3", "TLS_AES_128_GCM_SHA256"), PeerID("spiffe://example.org/web"), OwnID("spiffe://example.org/db")))))
			if err != nil {
				t.Fatal(err)
			}
			if h.Source.IsValid() && (netipOf(v2.SourceAddr) != h.Source || netipOf(v2.DestinationAddr) != h.Destination) {
				t.Errorf("v2: %+v", v2)
			}
			if h.Unix && v2.DestinationAddr.String() != h.DestinationPath {
				t.Errorf("v2: %+v", v2)
			}
			checkTheirTLVs(t, v2)
			for version, b := range map[string][]byte{"v1": h.AppendV1(nil), "v2": h.AppendV2(nil)} {
				want := h
				if version == "v1" && h.Unix {
					want = Header{}
				}
				if again, err := Read(bytes.NewReader(b)); err != nil || again != want {
					t.Errorf("%s, read back: %+v, %v", version, again, err)
				}
			}
		})
	}
}

func checkTheirTLVs(t *testing.T, h *pires.Header) {
	t.Helper()
	tlvs, err := h.TLVs()
	if err != nil || len(tlvs) != 5 {
		t.Fatalf("%d TLVs, %v", len(tlvs), err)
	}
	for i, want := range []struct {
		kind  pires.PP2Type
		value string
	}{{pires.PP2_TYPE_AUTHORITY, "db.example.org"}, {pires.PP2_TYPE_ALPN, "postgresql"}, {pires.PP2_TYPE_SSL, ""}, {0xE5, "spiffe://example.org/web"}, {0xE6, "spiffe://example.org/db"}} {
		if tlvs[i].Type != want.kind || want.value != "" && string(tlvs[i].Value) != want.value {
			t.Errorf("TLV %d is %#x %q, want %#x %q", i, tlvs[i].Type, tlvs[i].Value, want.kind, want.value)
		}
	}
	ssl, err := tlvparse.SSL(tlvs[2])
	if err != nil {
		t.Fatal(err)
	}
	version, _ := ssl.SSLVersion()
	cipher, _ := ssl.SSLCipher()
	if !ssl.ClientSSL() || !ssl.ClientCertConn() || !ssl.ClientCertSess() || !ssl.Verified() || version != "TLSv1.3" || cipher != "TLS_AES_128_GCM_SHA256" {
		t.Errorf("%+v", ssl)
	}
}

func netipOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

func TestVersion(t *testing.T) {
	t.Parallel()
	for _, v := range []Version{Off, V1, V2} {
		var back Version
		if err := back.UnmarshalText([]byte(v.String())); err != nil || back != v {
			t.Errorf("%v: %v, %v", v, back, err)
		}
	}
	if err := new(Version).UnmarshalText([]byte("2")); err == nil {
		t.Error("2 is a version")
	}
}

// FuzzRead: whatever comes, no more than the header is taken, it reads the
// same in pieces, what is understood reads the same after it was written
// again, and another implementation understands it likewise.
func FuzzRead(f *testing.F) {
	for _, c := range good {
		f.Add([]byte(c.in))
		f.Add([]byte(c.in + "\x16\x03\x01"))
	}
	f.Add([]byte("PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n"))
	f.Add(summed(block(commandProxy, tcp4, four, noop, blankSum), 1))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		h, err := Read(r)
		used := len(in) - r.Len()
		slowly, slowErr := Read(iotest.OneByteReader(bytes.NewReader(in)))
		if slowly != h || (err == nil) != (slowErr == nil) {
			t.Fatalf("%+v, %v; in pieces %+v, %v", h, err, slowly, slowErr)
		}
		if used > MaxSize {
			t.Fatalf("%d bytes taken", used)
		}
		if err != nil {
			if h != (Header{}) && h.Source.IsValid() && checkAddresses(h) == nil {
				t.Fatalf("%+v beside %v", h, err)
			}
			return
		}
		again, err := Read(bytes.NewReader(h.AppendV2(nil, PeerID("spiffe://example.org/web"))))
		if err != nil || again != h {
			t.Fatalf("%+v became %+v, %v", h, again, err)
		}
		if h.Unix || !h.Source.IsValid() || used > 4096 {
			return
		}
		theirs, err := pires.Read(bufio.NewReaderSize(bytes.NewReader(in[:used]), used))
		if err != nil {
			t.Fatalf("%+v, but another says %v", h, err)
		}
		if netipOf(theirs.SourceAddr) != h.Source || netipOf(theirs.DestinationAddr) != h.Destination {
			t.Fatalf("%+v, but another says %v to %v", h, theirs.SourceAddr, theirs.DestinationAddr)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	for _, name := range []string{"v1 TCP4", "v2 IPv4, TLVs"} {
		b.Run(name, func(b *testing.B) {
			in := []byte(good[name].in)
			r := bytes.NewReader(in)
			b.ReportAllocs()
			for b.Loop() {
				r.Reset(in)
				if _, err := Read(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
