package policy

import (
	"crypto/x509"
	"math/big"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestNormalHex(t *testing.T) {
	for in, want := range map[string]string{
		"1f": "1f", "1F": "1f", "001f": "1f", "00:1F": "1f", "0x1F": "1f", "0": "0", "00:00": "0", " a ": "a", "0:0a:0b": "a0b",
		"": "", "0x": "", ":1": "", "1:": "", "1::2": "", "g": "", "1 2": "", "-1": "", "é": "", "CN=a": "", strings.Repeat("1", maxIDLength+1): "",
	} {
		got, ok := normalHex(in)
		if got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v, want %q", in, got, ok, want)
		}
	}
}

func TestSerials(t *testing.T) {
	s := serials{}
	s.add(revocation{issuer: "aabb", serial: "1f"})
	s.add(revocation{issuer: "aab", serial: "b1f"})
	s.add(revocation{issuer: "1", serial: "0"})
	for _, tt := range []struct {
		issuer, serial string
		want           bool
	}{
		{"aabb", "1f", true},
		{"AA:BB", "00:1F", true},
		{"00aabb", "1F", true},
		{"aab", "B1F", true},
		{"1", "0", true},
		{"1", "00", true},
		{"aabb", "1f0", false},
		{"aabb", "1", false},
		{"aabb", "f", false},
		{"aab", "1f", false},
		{"", "1f", false},
		{"aabb", "", false},
		{"1", "1", false},
		{"aabb1f", "1f", false},
	} {
		if got := s.find(&Peer{Issuer: tt.issuer, Serial: tt.serial}) != nil; got != tt.want {
			t.Errorf("%s of %s: %v, want %v", tt.serial, tt.issuer, got, tt.want)
		}
	}
}

func TestPeerOf(t *testing.T) {
	id := spiffeid.RequireFromString(web)
	p := PeerOf(id, &x509.Certificate{SerialNumber: big.NewInt(0x0a1f), AuthorityKeyId: []byte{0, 0xab, 0xcd}})
	if p != (Peer{ID: id, Serial: "a1f", Issuer: "00abcd"}) || !p.Authenticated() {
		t.Errorf("%+v", p)
	}
	if (&Peer{Serial: "1"}).Authenticated() {
		t.Error("a peer without an ID is authenticated")
	}
}

func FuzzSerial(f *testing.F) {
	f.Add("00:1F", "1f")
	f.Add("0", "000")
	f.Add("x", "y")
	f.Fuzz(func(t *testing.T, a, b string) {
		normal, ok := normalHex(a)
		other, also := normalHex(b)
		if !ok || !also {
			return
		}
		b = strings.TrimPrefix(strings.ToLower(strings.TrimSpace(b)), "0x")
		if got, want := equalHex(normal, b), normal == other; got != want {
			t.Errorf("%q equals %q: %v, want %v", normal, b, got, want)
		}
		if normal == other && hashSerial(normal, normal) != hashSerial(b, b) {
			t.Errorf("%q and %q hash apart", normal, b)
		}
	})
}
