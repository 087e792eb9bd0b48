//go:build integration

package tcp_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// parameters are what openssl is told to offer or to take, and what is to
// come of it.
type parameters struct {
	args    string // of openssl
	rsa     bool   // the server's certificate has an RSA key
	version string // as recorded; empty: refused
	cipher  string // as recorded, where it matters
	reason  string // why it is refused
}

const noVersion, noCipher = "unsupported versions", "no cipher suite supported"

// ours are the versions, suites and groups that are taken.
var ours = []parameters{
	{args: "-tls1_3", version: "1.3"},
	{args: "-tls1_3 -ciphersuites TLS_AES_128_GCM_SHA256", version: "1.3", cipher: "TLS_AES_128_GCM_SHA256"},
	{args: "-tls1_3 -ciphersuites TLS_AES_256_GCM_SHA384", version: "1.3", cipher: "TLS_AES_256_GCM_SHA384"},
	{args: "-tls1_3 -ciphersuites TLS_CHACHA20_POLY1305_SHA256", version: "1.3", cipher: "TLS_CHACHA20_POLY1305_SHA256"},
	{args: "-tls1_3 -groups X25519", version: "1.3"},
	{args: "-tls1_3 -groups P-256", version: "1.3"},
	{args: "-tls1_2 -groups P-256", version: "1.2"},
	{args: "-tls1_2 -groups X25519:P-256", version: "1.2"},
	{args: "-tls1_2", version: "1.2"},
	{args: "-tls1_2 -cipher ECDHE-ECDSA-AES128-GCM-SHA256", version: "1.2", cipher: "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"},
	{args: "-tls1_2 -cipher ECDHE-ECDSA-AES256-GCM-SHA384", version: "1.2", cipher: "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"},
	{args: "-tls1_2 -cipher ECDHE-ECDSA-CHACHA20-POLY1305", version: "1.2", cipher: "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"},
	{args: "-tls1_2 -cipher ECDHE-RSA-AES128-GCM-SHA256", rsa: true, version: "1.2", cipher: "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"},
	{args: "-tls1_2 -cipher ECDHE-RSA-AES256-GCM-SHA384", rsa: true, version: "1.2", cipher: "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384"},
	{args: "-tls1_2 -cipher ECDHE-RSA-CHACHA20-POLY1305", rsa: true, version: "1.2", cipher: "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"},
}

// weak is what is refused: old versions, CBC, key exchange without forward
// secrecy, groups that are too small, no authentication.
var weak = []parameters{
	{args: "-tls1_1 -cipher DEFAULT@SECLEVEL=0", reason: noVersion},
	{args: "-tls1 -cipher DEFAULT@SECLEVEL=0", reason: noVersion},
	{args: "-tls1_2 -cipher ECDHE-ECDSA-AES128-SHA", reason: noCipher},
	{args: "-tls1_2 -cipher ECDHE-ECDSA-AES256-SHA384", reason: noCipher},
	{args: "-tls1_2 -cipher ECDHE-ECDSA-AES128-CCM", reason: noCipher},
	{args: "-tls1_2 -cipher ECDHE-RSA-AES128-SHA256", rsa: true, reason: noCipher},
	{args: "-tls1_2 -cipher DHE-RSA-AES128-GCM-SHA256", rsa: true, reason: noCipher},
	{args: "-tls1_2 -cipher AES128-GCM-SHA256", rsa: true, reason: noCipher},
	{args: "-tls1_2 -cipher AES256-SHA", rsa: true, reason: noCipher},
	{args: "-tls1_2 -cipher aNULL@SECLEVEL=0", reason: noCipher},
	{args: "-tls1_3 -groups ffdhe2048", reason: "no key exchanges supported by both client and server"},
}

// TestParametersInbound comes to inbound listeners with each.
func TestParametersInbound(t *testing.T) {
	t.Parallel()
	doors := map[bool]*door{false: newDoor(t), true: newDoor(t)}
	rsa := doors[true]
	rsa.present(rsa.ca.leafRSA("/server"))
	rsa.reload()
	for _, p := range append(append([]parameters{}, ours...), weak...) {
		t.Run(name(p.args), func(t *testing.T) {
			d := doors[p.rsa]
			skip := len(d.Records())
			out := sClient(t, d.address, with(d.client, strings.Fields(p.args)...)...)
			checkParameters(t, d.node, skip, p, strings.Contains(out, answer), out)
		})
	}
}

// TestParametersOutbound goes to servers that take each, and nothing else.
func TestParametersOutbound(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	servers := map[bool]*svid{false: ca.leaf("/server"), true: ca.leafRSA("/server")}
	n := newNode(t, "out", ca.leaf("/client"), ca)
	n.rules(allow("all", ca.id("/client")))
	all := append(append([]parameters{}, ours...), weak...)
	addresses := make([]string, len(all))
	for i, p := range all {
		// openssl as a server says which refusal it is by an alert.
		if all[i].reason != "" {
			all[i].reason = "handshake failure"
		}
		if strings.HasPrefix(p.args, "-tls1 ") || strings.HasPrefix(p.args, "-tls1_1 ") {
			all[i].reason = "protocol version"
		}
		_, target := sServer(t, servers[p.rsa], append(strings.Fields(p.args), "-Verify", "1", "-CAfile", n.file("example.org.bundle"), "-verify_return_error")...)
		addresses[i] = n.outbound(fmt.Sprintf("out-%d", i), target, ca.id("/server"))
	}
	n.start()
	for i, p := range all {
		t.Run(name(p.args), func(t *testing.T) {
			skip := len(n.Records())
			line, err := say(addresses[i], "hello")
			checkParameters(t, n, skip, p, line == "olleh", fmt.Sprint(line, err))
		})
	}
}

func name(args string) string { return strings.ReplaceAll(strings.TrimPrefix(args, "-"), " ", ",") }

func checkParameters(t *testing.T, n *node, skip int, p parameters, answered bool, said string) {
	t.Helper()
	if answered != (p.version != "") {
		t.Fatalf("answered: %t; it said:\n%s", answered, said)
	}
	if !answered {
		a := n.Record(skip, "refused", func(a telemetry.Access) bool { return a.Outcome == "failure" })
		if !strings.Contains(a.Reason, p.reason) {
			t.Errorf("the reason is %q, want one with %q", a.Reason, p.reason)
		}
		return
	}
	a := n.Record(skip, "allowed", func(a telemetry.Access) bool { return a.Decision == "allow" })
	if a.TLSVersion != p.version || (p.cipher != "" && a.Cipher != p.cipher) {
		t.Errorf("the record has TLS %s and %s, want %s and %s", a.TLSVersion, a.Cipher, p.version, p.cipher)
	}
}

// TestPostQuantum sees that both directions prefer a key exchange that a
// quantum computer does not break later, and take an older one from those who
// have no other. This openssl has none, so Go's is the peer.
func TestPostQuantum(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	for _, c := range []struct{ offered, taken []tls.CurveID }{
		{nil, []tls.CurveID{tls.X25519MLKEM768}},
		{[]tls.CurveID{tls.X25519, tls.X25519MLKEM768}, []tls.CurveID{tls.X25519MLKEM768}},
		{[]tls.CurveID{tls.X25519}, []tls.CurveID{tls.X25519}},
		{[]tls.CurveID{tls.CurveP256}, []tls.CurveID{tls.CurveP256}},
	} {
		config := d.client.client()
		config.CurvePreferences = c.offered
		conn, err := tls.Dial("tcp", d.address, config)
		if err != nil {
			t.Fatalf("offered %v: %v", c.offered, err)
		}
		if got := conn.ConnectionState().CurveID; got != c.taken[0] {
			t.Errorf("offered %v, taken %v, want %v", c.offered, got, c.taken)
		}
		if err := ask(conn, "hello"); err != nil {
			t.Errorf("offered %v: %v", c.offered, err)
		}
		conn.Close()
	}

	first := make(chan tls.CurveID, 1)
	config := d.ca.leaf("/far").server()
	config.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		first <- h.SupportedCurves[0]
		return nil, nil
	}
	far := serveTLS(t, config, answerLines)
	out := newNode(t, "out", d.client, d.ca)
	out.rules(allow("all", d.client.id))
	address := out.outbound("out", far.address, d.ca.id("/far"))
	out.start()
	if err := call(address); err != nil {
		t.Fatal(err)
	}
	if got := <-first; got != tls.X25519MLKEM768 {
		t.Errorf("outbound, the first group offered is %v, want %v", got, tls.X25519MLKEM768)
	}
}

// serveTLS answers each connection after its handshake.
func serveTLS(t *testing.T, config *tls.Config, handle func(net.Conn)) *service {
	t.Helper()
	return serve(t, func(c net.Conn) {
		secured := tls.Server(c, config)
		if secured.Handshake() == nil {
			handle(secured)
			secured.Close()
		}
	})
}
