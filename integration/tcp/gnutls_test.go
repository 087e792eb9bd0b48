//go:build integration

package tcp_test

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// gnutls is the other TLS library that much of a Linux system speaks. It has
// opinions of its own: it offers what openssl does not, and reads the standards
// again.

// gnutlsClient runs gnutls-cli, sends one line and returns all it said until
// an answer came or the connection ended.
func gnutlsClient(t *testing.T, address, priority string, own *svid, args ...string) string {
	t.Helper()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	args = append([]string{"--insecure", "--no-ca-verification", "--priority", priority, "-p", port, host}, args...)
	if own != nil {
		args = append(args, "--x509certfile", own.certFile, "--x509keyfile", own.keyFile)
	}
	return stage.Talk(t, "gnutls-cli", args, answer)
}

// only is a priority of one version and what else is said.
func only(version, more string) string { return "NORMAL:-VERS-ALL:+VERS-TLS" + version + more }

func TestGnuTLSInbound(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	impostor := newAuthority(t, "example.org").leaf("/client")
	const rehandshake = "--rehandshake"
	for _, c := range []struct {
		name, priority string
		own            *svid
		version        string // empty: refused
		reason         string
	}{
		{"tls13", only("1.3", ""), d.client, "1.3", ""},
		{"tls12", only("1.2", ""), d.client, "1.2", ""},
		{"x25519", only("1.3", ":-GROUP-ALL:+GROUP-X25519"), d.client, "1.3", ""},
		{"p256", only("1.3", ":-GROUP-ALL:+GROUP-SECP256R1"), d.client, "1.3", ""},
		{"chacha20", only("1.2", ":-CIPHER-ALL:+CHACHA20-POLY1305"), d.client, "1.2", ""},
		{"tls11", only("1.1", ""), d.client, "", noVersion},
		{"cbc", only("1.2", ":-CIPHER-ALL:+AES-128-CBC"), d.client, "", noCipher},
		{"ccm", only("1.2", ":-CIPHER-ALL:+AES-128-CCM"), d.client, "", noCipher},
		{"no-forward-secrecy", only("1.2", ":-KX-ALL:+RSA"), d.client, "", noCipher},
		{"ffdhe", only("1.3", ":-GROUP-ALL:+GROUP-FFDHE2048"), d.client, "", "no key exchanges supported"},
		{"no-certificate-13", only("1.3", ""), nil, "", "the client sent no certificate"},
		{"no-certificate-12", only("1.2", ""), nil, "", "the client sent no certificate"},
		{"wrong-chain", only("1.3", ""), impostor, "", "not signed by an authority"},
		{"visitor", only("1.3", ""), d.ca.leaf("/visitor"), "", "no rule allows"},
	} {
		t.Run(c.name, func(t *testing.T) {
			skip := len(d.Records())
			out := gnutlsClient(t, d.address, c.priority, c.own)
			checkParameters(t, d.node, skip, parameters{version: c.version, reason: c.reason}, strings.Contains(out, answer), out)
		})
	}
	t.Run("resumption", func(t *testing.T) {
		for _, version := range []string{"1.2", "1.3"} {
			out := gnutlsClient(t, d.address, only(version, ""), d.client, "--resume")
			if strings.Contains(out, "This is a resumed session") || !strings.Contains(out, answer) {
				t.Errorf("TLS %s:\n%s", version, out)
			}
		}
	})
	t.Run("renegotiation", func(t *testing.T) {
		skip := len(d.Records())
		if out := gnutlsClient(t, d.address, only("1.2", ""), d.client, rehandshake); strings.Contains(out, "ReHandshake was completed") {
			t.Errorf("it was renegotiated:\n%s", out)
		}
		d.Record(skip, "ended", func(a telemetry.Access) bool { return a.Decision == "allow" && a.BytesIn == 0 })
	})
}

func TestGnuTLSOutbound(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	own, impostor := ca.leaf("/server"), newAuthority(t, "example.org").leaf("/server")
	n := newNode(t, "out", ca.leaf("/client"), ca)
	n.rules(allow("all", ca.id("/client")))
	cases := []struct {
		name, priority string
		own            *svid
		version        string // empty: refused
		reason         string
	}{
		{"tls13", only("1.3", ""), own, "1.3", ""},
		{"tls12", only("1.2", ""), own, "1.2", ""},
		{"chacha20", only("1.2", ":-CIPHER-ALL:+CHACHA20-POLY1305"), own, "1.2", ""},
		{"tls11", only("1.1", ""), own, "", "the peer ended the handshake"},
		{"cbc", only("1.2", ":-CIPHER-ALL:+AES-128-CBC"), own, "", "the peer ended the handshake"},
		{"wrong-chain", only("1.3", ""), impostor, "", "not signed by an authority"},
		{"another-service", only("1.3", ""), ca.leaf("/other"), "", "not who `expect` names"},
	}
	addresses := make([]string, len(cases))
	for i, c := range cases {
		target := stage.FreeAddress(t)
		_, port, err := net.SplitHostPort(target)
		if err != nil {
			t.Fatal(err)
		}
		server := stage.Start(t, "gnutls-serv", "gnutls-serv", []string{
			"--echo", "--port", port, "--priority", c.priority, "--x509certfile", c.own.certFile, "--x509keyfile", c.own.keyFile,
			"--require-client-cert", "--verify-client-cert", "--x509cafile", n.file("example.org.bundle"),
		})
		listens(t, server, target)
		addresses[i] = n.outbound(fmt.Sprintf("out-%d", i), target, ca.id("/server"))
	}
	n.start()
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			skip := len(n.Records())
			line, err := say(addresses[i], "hello")
			checkParameters(t, n, skip, parameters{version: c.version, reason: c.reason}, line == "hello", fmt.Sprint(line, err))
		})
	}
}

// listens waits until a process takes connections.
func listens(t *testing.T, p *stage.Process, address string) {
	t.Helper()
	stage.Eventually(t, stage.Soon, p.Name+" listens", func() error {
		if err := p.Alive(); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", address)
		if err != nil {
			return err
		}
		return c.Close()
	})
}
