//go:build integration

package tcp_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// peerHost is a DNS name in the SVIDs of those tests: nginx and ghostunnel
// want one, we do not look at it.
const peerHost = "peer.example.org"

func named(c *x509.Certificate) { c.DNSNames = []string{peerHost} }

// end is one end of mutual TLS that is not ours.
type end struct {
	own      *svid
	bundle   string // file of the authorities it believes
	expect   string // SPIFFE ID of the other end, where it can look at that
	bind, to string
}

// proxies are the mutual TLS proxies that stand at the other end of ours:
// each as a server that asks for our certificate, and as a client that shows
// its own.
var proxies = []struct {
	name           string
	server, client func(t *testing.T, e end) *stage.Process
}{
	{
		"nginx",
		func(t *testing.T, e end) *stage.Process {
			return nginx(t, fmt.Sprintf(`listen %s ssl; ssl_certificate %s; ssl_certificate_key %s;
				ssl_client_certificate %s; ssl_verify_client on; ssl_verify_depth 3; proxy_pass %s;`, e.bind, e.own.certFile, e.own.keyFile, e.bundle, e.to))
		},
		func(t *testing.T, e end) *stage.Process {
			return nginx(t, fmt.Sprintf(`listen %s; proxy_ssl on; proxy_ssl_certificate %s; proxy_ssl_certificate_key %s;
				proxy_ssl_trusted_certificate %s; proxy_ssl_verify on; proxy_ssl_name %s; proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.2 TLSv1.3; proxy_pass %s;`,
				e.bind, e.own.certFile, e.own.keyFile, e.bundle, peerHost, e.to))
		},
	},
	{
		"haproxy",
		func(t *testing.T, e end) *stage.Process {
			return haproxy(t, fmt.Sprintf("bind %s ssl crt %s ca-file %s verify required\n  server s %s", e.bind, e.own.bothFile, e.bundle, e.to))
		},
		func(t *testing.T, e end) *stage.Process {
			return haproxy(t, fmt.Sprintf("bind %s\n  server s %s ssl crt %s ca-file %s verify required", e.bind, e.to, e.own.bothFile, e.bundle))
		},
	},
	{
		"ghostunnel",
		func(t *testing.T, e end) *stage.Process {
			return ghostunnel(t, "server", "--listen", e.bind, "--target", e.to, "--cert", e.own.certFile, "--key", e.own.keyFile, "--cacert", e.bundle, "--allow-uri", e.expect)
		},
		func(t *testing.T, e end) *stage.Process {
			return ghostunnel(t, "client", "--listen", e.bind, "--target", e.to, "--cert", e.own.certFile, "--key", e.own.keyFile, "--cacert", e.bundle, "--verify-uri", e.expect, "--override-server-name", peerHost)
		},
	},
}

func nginx(t *testing.T, server string) *stage.Process {
	t.Helper()
	dir := stage.Folder(t, "nginx")
	conf := filepath.Join(dir, "nginx.conf")
	stage.WriteFile(t, conf, fmt.Sprintf(`load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; user root; worker_processes 1; pid %[1]s/pid; error_log stderr info;
events {}
stream { proxy_connect_timeout 5s; server { %[2]s } }
`, dir, server), 0o644)
	return stage.Start(t, "nginx", "nginx", []string{"-c", conf, "-p", dir, "-e", "stderr"})
}

func haproxy(t *testing.T, listen string) *stage.Process {
	t.Helper()
	conf := filepath.Join(stage.Folder(t, "haproxy"), "haproxy.cfg")
	stage.WriteFile(t, conf, fmt.Sprintf(`global
  maxconn 1000
  log stderr format raw local0
defaults
  mode tcp
  log global
  option tcplog
  timeout connect 5s
  timeout client 1m
  timeout server 1m
listen it
  %s
`, listen), 0o644)
	return stage.Start(t, "haproxy", "haproxy", []string{"-db", "-f", conf})
}

var ghostunnelDir = sync.OnceValues(func() (string, error) { return stage.Tools("ghostunnel", "NARTHEX_GHOSTUNNEL", "ghostunnel") })

func ghostunnel(t *testing.T, args ...string) *stage.Process {
	t.Helper()
	dir, err := ghostunnelDir()
	if err != nil {
		t.Fatal(err)
	}
	return stage.Start(t, "ghostunnel "+args[0], filepath.Join(dir, "ghostunnel"), args)
}

// TestPeerServers goes through an outbound listener to others' servers.
func TestPeerServers(t *testing.T) {
	t.Parallel()
	for _, p := range proxies {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			ca, other := newAuthority(t, "example.org"), newAuthority(t, "example.org")
			client, service := ca.leaf("/client"), serve(t, echo)
			n := newNode(t, "out", client, ca)
			n.rules(allow("all", client.id))
			right := end{own: ca.intermediate().leaf("/server", named), bundle: n.file("example.org.bundle"), expect: client.id, bind: stage.FreeAddress(t), to: service.address}
			wrong := right
			wrong.own, wrong.bind = other.leaf("/server", named), stage.FreeAddress(t)
			picky := right // it does not believe us
			picky.bind, picky.bundle = stage.FreeAddress(t), filepath.Join(stage.Folder(t, "other"), "bundle.pem")
			stage.WriteFile(t, picky.bundle, bundlePEM(other), 0o644)
			addresses := make([]string, 3)
			for i, e := range []end{right, wrong, picky} {
				listens(t, p.server(t, e), e.bind)
				addresses[i] = n.outbound(fmt.Sprintf("out-%d", i), e.bind, ca.id("/server"))
			}
			n.start()
			carries(t, addresses[0])
			n.Record(0, "allowed", func(a telemetry.Access) bool { return a.To == ca.id("/server") && a.Decision == "allow" })
			dialled := service.dialled.Load()
			if line, err := say(addresses[1], "hello"); line != "" || !isReset(err) {
				t.Errorf("from a server of another authority: %q, %v", line, err)
			}
			n.refused(0, "not signed by an authority")
			if line, err := say(addresses[2], "hello"); line != "" {
				t.Errorf("a server that does not believe us answered: %q, %v", line, err)
			}
			if now := service.dialled.Load(); now != dialled {
				t.Error("the service behind was dialled")
			}
		})
	}
}

// TestPeerClients comes from others' clients to an inbound listener.
func TestPeerClients(t *testing.T) {
	t.Parallel()
	for _, p := range proxies {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			ca, other := newAuthority(t, "example.org"), newAuthority(t, "example.org")
			service := serve(t, echo)
			n := newNode(t, "in", ca.leaf("/server", named), ca)
			address := n.inbound("in", service.address)
			client := ca.intermediate().leaf("/client")
			n.rules(allow("client-may", client.id))
			n.start()
			right := end{own: client, bundle: n.file("example.org.bundle"), expect: ca.id("/server"), bind: stage.FreeAddress(t), to: address}
			wrong := right
			wrong.own, wrong.bind = other.leaf("/client"), stage.FreeAddress(t)
			unruly := right
			unruly.own, unruly.bind = ca.leaf("/visitor"), stage.FreeAddress(t)
			for _, e := range []end{right, wrong, unruly} {
				listens(t, p.client(t, e), e.bind)
			}
			carries(t, right.bind)
			n.Record(0, "allowed", func(a telemetry.Access) bool { return a.From == client.id && a.Decision == "allow" })
			// What was needed to see that they listen may still be under way.
			stage.Eventually(t, stage.Soon, "nobody is there", func() error {
				if live := n.live(); live > 0 {
					return fmt.Errorf("%d are", live)
				}
				return nil
			})
			dialled := service.dialled.Load()
			for _, e := range []end{wrong, unruly} {
				if line, err := say(e.bind, "hello"); line != "" {
					t.Errorf("%s got an answer: %q, %v", e.own.id, line, err)
				}
			}
			n.refused(0, "not signed by an authority")
			n.refused(0, "no rule allows")
			if now := service.dialled.Load(); now != dialled {
				t.Error("the service was dialled")
			}
		})
	}
}

// carries moves much by address, which leads to an echo, and compares it.
func carries(t *testing.T, address string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var g sync.WaitGroup
	for range 3 {
		g.Go(func() {
			if err := bulk(ctx, address, 16<<20); err != nil {
				t.Errorf("%s: %v", strings.TrimPrefix(t.Name(), "Test"), err)
			}
		})
	}
	g.Wait()
}
