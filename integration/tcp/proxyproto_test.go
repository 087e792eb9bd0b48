//go:build integration

package tcp_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	pires "github.com/pires/go-proxyproto"
	"github.com/pires/go-proxyproto/tlvparse"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// headerHaproxy starts an haproxy with these sections, which logs to its
// standard output.
func headerHaproxy(t *testing.T, sections string) *stage.Process {
	t.Helper()
	file := filepath.Join(stage.Folder(t, "haproxy"), "haproxy.cfg")
	stage.WriteFile(t, file, `
global
  maxconn 100
  log stdout format raw local0
defaults
  mode tcp
  log global
  timeout connect 5s
  timeout client 20s
  timeout server 20s
`+sections, 0o644)
	return stage.Start(t, "haproxy", "haproxy", []string{"-db", "-f", file})
}

// headerNginx starts an nginx with this stream section.
func headerNginx(t *testing.T, stream string) *stage.Process {
	t.Helper()
	dir := stage.Folder(t, "nginx")
	file := filepath.Join(dir, "nginx.conf")
	stage.WriteFile(t, file, fmt.Sprintf(`
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
master_process off;
pid %[1]s/pid;
error_log stderr info;
events {}
stream {
%[2]s
}
`, dir, stream), 0o644)
	return stage.Start(t, "nginx", "nginx", []string{"-p", dir, "-e", "stderr", "-c", file})
}

// listening waits until somebody listens at address.
func listening(t *testing.T, p *stage.Process, address string) {
	t.Helper()
	stage.Eventually(t, stage.Soon, p.Name+" listens", func() error {
		if err := p.Alive(); err != nil {
			t.Fatalf("%v\n%s", err, p.Said())
		}
		c, err := net.Dial("tcp", address)
		if err == nil {
			_ = c.Close()
		}
		return err
	})
}

// TestProxyHeaderToGo reads, with another implementation, all that a target
// is told about an openssl client.
func TestProxyHeaderToGo(t *testing.T) {
	t.Parallel()
	got := make(chan *pires.Header, 1)
	s := serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		h, err := pires.Read(r)
		if err != nil {
			t.Errorf("read the header: %v", err)
			return
		}
		got <- h
		line, _ := r.ReadString('\n')
		_, _ = io.WriteString(c, answer+line)
	})
	ca := newAuthority(t, "example.org")
	client := ca.leaf("/client")
	n := newNode(t, "door", ca.leaf("/server"), ca)
	address := n.inbound("door", s.address, "proxy_protocol: {send: v2}")
	n.rules(allow("client-may", client.id))
	n.start()
	for version, words := range map[string][2]string{
		"-tls1_3": {"TLSv1.3", "TLS_AES_128_GCM_SHA256"}, "-tls1_2": {"TLSv1.2", "ECDHE-ECDSA-AES128-GCM-SHA256"},
	} {
		suite := []string{"-ciphersuites", words[1]}
		if version == "-tls1_2" {
			suite = []string{"-cipher", words[1]}
		}
		out := sClient(t, address, with(client, append(suite, version, "-servername", "db.example.org", "-bind", "127.0.0.5")...)...)
		if !strings.Contains(out, answer+"hello") {
			t.Fatalf("not answered:\n%s", out)
		}
		h := <-got
		if source := h.SourceAddr.String(); !strings.HasPrefix(source, "127.0.0.5:") || h.DestinationAddr.String() != address {
			t.Errorf("%s to %s", source, h.DestinationAddr)
		}
		tlvs, err := h.TLVs()
		if err != nil {
			t.Fatal(err)
		}
		values := map[pires.PP2Type]string{}
		for _, v := range tlvs {
			values[v.Type] = string(v.Value)
			if v.Type != pires.PP2_TYPE_SSL {
				continue
			}
			ssl, err := tlvparse.SSL(v)
			if err != nil {
				t.Fatal(err)
			}
			said, _ := ssl.SSLVersion()
			cipher, _ := ssl.SSLCipher()
			if !ssl.ClientSSL() || !ssl.ClientCertConn() || !ssl.Verified() || said != words[0] || cipher != words[1] {
				t.Errorf("TLS: %+v", ssl)
			}
		}
		if values[pires.PP2_TYPE_AUTHORITY] != "db.example.org" || values[0xE5] != client.id || values[0xE6] != ca.id("/server") {
			t.Errorf("TLVs: %q", values)
		}
	}
}

// TestProxyHeaderToHaproxy: an haproxy behind us takes our header, and hands
// on what it says.
func TestProxyHeaderToHaproxy(t *testing.T) {
	t.Parallel()
	s := serve(t, answerLines)
	behind := stage.FreeAddress(t)
	h := headerHaproxy(t, fmt.Sprintf(`
frontend behind
  bind %s accept-proxy
  log-format "from=%%ci to=%%fi:%%fp authority=%%[fc_pp_authority]"
  default_backend service
backend service
  server service %s
`, behind, s.address))
	listening(t, h, behind)
	for _, version := range []string{"v1", "v2"} {
		ca := newAuthority(t, "example.org")
		client := ca.leaf("/client")
		n := newNode(t, "door", ca.leaf("/server"), ca)
		address := n.inbound("door", behind, "proxy_protocol: {send: "+version+"}")
		n.rules(allow("client-may", client.id))
		n.start()
		if out := sClient(t, address, with(client, "-servername", "db.example.org", "-bind", "127.0.0.5")...); !strings.Contains(out, answer) {
			t.Fatalf("not answered:\n%s", out)
		}
		authority := map[string]string{"v1": "-", "v2": "db.example.org"}[version]
		h.Says(stage.Soon, fmt.Sprintf("from=127.0.0.5 to=%s authority=%s", address, authority))
	}
}

// TestProxyHeaderToNginx: an nginx behind us, which speaks first.
func TestProxyHeaderToNginx(t *testing.T) {
	t.Parallel()
	behind := stage.FreeAddress(t)
	x := headerNginx(t, fmt.Sprintf(`server { listen %s proxy_protocol; return "%s$proxy_protocol_addr to $proxy_protocol_server_port\n"; }`, behind, answer))
	listening(t, x, behind)
	ca := newAuthority(t, "example.org")
	client := ca.leaf("/client")
	n := newNode(t, "door", ca.leaf("/server"), ca)
	address := n.inbound("door", behind, "proxy_protocol: {send: v1}")
	n.rules(allow("client-may", client.id))
	n.start()
	_, port, _ := net.SplitHostPort(address)
	if out := sClient(t, address, with(client, "-bind", "127.0.0.5")...); !strings.Contains(out, answer+"127.0.0.5 to "+port) {
		t.Errorf("nginx said:\n%s", out)
	}
}

// TestProxyHeaderFromHaproxy: behind an haproxy the client is whom it names,
// in every form it can; its health checks are let be, and whoever comes
// around it is who they are.
func TestProxyHeaderFromHaproxy(t *testing.T) {
	t.Parallel()
	d := newDoor(t, "proxy_protocol: {accept_from: [127.0.0.9]}")
	for how, source := range map[string]string{
		"send-proxy":    "127.0.0.5:",
		"send-proxy-v2": "127.0.0.5:",
		"send-proxy-v2 check check-send-proxy inter 100ms proxy-v2-options crc32c,authority,unique-id": "127.0.0.5:",
		"": "127.0.0.9:", // no header: refused
	} {
		front := stage.FreeAddress(t)
		h := headerHaproxy(t, fmt.Sprintf(`
listen front
  bind %s
  unique-id-format %%{+X}o%%ci:%%cp
  server narthex %s source 127.0.0.9 %s
`, front, d.address, how))
		listening(t, h, front)
		skip := len(d.Records())
		out := sClient(t, front, with(d.client, "-bind", "127.0.0.5", "-servername", "db.example.org")...)
		if answered := strings.Contains(out, answer); answered != (how != "") {
			t.Errorf("%q: answered: %v:\n%s", how, answered, out)
		}
		a := d.Record(skip, how, func(a telemetry.Access) bool {
			if how == "" {
				return strings.Contains(a.Reason, "must send a PROXY header")
			}
			return strings.HasPrefix(a.Source, source) && a.Decision != ""
		})
		if how == "" {
			if !strings.HasPrefix(a.Source, source) {
				t.Errorf("record: %+v", a)
			}
		} else if !strings.HasPrefix(a.Via, "127.0.0.9:") || a.From != d.client.id {
			t.Errorf("%s: record: %+v", how, a)
		}
		if strings.Contains(h.Said(), "DOWN") {
			t.Errorf("haproxy takes us for down:\n%s", h.Said())
		}
		h.Stop()
	}
	skip := len(d.Records())
	if out := sClient(t, d.address, with(d.client, "-bind", "127.0.0.5")...); !strings.Contains(out, answer) {
		t.Errorf("who comes around haproxy is not answered:\n%s", out)
	}
	if a := d.Record(skip, "around", func(a telemetry.Access) bool { return a.Decision == "allow" }); a.Via != "" || !strings.HasPrefix(a.Source, "127.0.0.5:") {
		t.Errorf("record: %+v", a)
	}
}

// TestProxyHeaderBeforeTLS: the header of an outbound listener stands where
// haproxy, nginx and our own inbound listener look for it.
func TestProxyHeaderBeforeTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	server := ca.leaf("/server")
	bundle := filepath.Join(server.dir, "bundle.pem")
	stage.WriteFile(t, bundle, bundlePEM(ca), 0o644)
	s := serve(t, answerLines)

	viaHaproxy, viaNginx := stage.FreeAddress(t), stage.FreeAddress(t)
	h := headerHaproxy(t, fmt.Sprintf(`
frontend terminates
  bind %s accept-proxy ssl crt %s ca-file %s verify required
  log-format "from=%%ci"
  default_backend service
backend service
  server service %s
`, viaHaproxy, server.bothFile, bundle, s.address))
	x := headerNginx(t, fmt.Sprintf(`
server {
  listen %s ssl proxy_protocol;
  ssl_certificate %s;
  ssl_certificate_key %s;
  ssl_client_certificate %s;
  ssl_verify_client on;
  return "%s$proxy_protocol_addr\n";
}`, viaNginx, server.certFile, server.keyFile, bundle, answer))
	listening(t, h, viaHaproxy)
	listening(t, x, viaNginx)

	far := newNode(t, "far", server, ca)
	viaUs := far.inbound("terminates", s.address, "proxy_protocol: {accept_from: [127.0.0.0/8]}")
	near := newNode(t, "near", ca.leaf("/client"), ca)
	fromHaproxy := near.outbound("to-haproxy", viaHaproxy, server.id, "proxy_protocol: {send: v2}")
	fromNginx := near.outbound("to-nginx", viaNginx, server.id, "proxy_protocol: {send: v2}")
	fromUs := near.outbound("to-us", viaUs, server.id, "proxy_protocol: {send: v1}")
	for _, n := range []*node{far, near} {
		n.rules(allow("client-may", ca.id("/client")))
		n.start()
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 5)}}
	for name, address := range map[string]string{"haproxy": fromHaproxy, "nginx": fromNginx, "us": fromUs} {
		c, err := dialer.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		if name == "nginx" {
			if line, err := readLine(c); err != nil || line != answer+"127.0.0.5" {
				t.Errorf("nginx said %q, %v", line, err)
			}
		} else if err := ask(c, "hello"); err != nil {
			t.Errorf("through %s: %v", name, err)
		}
		_ = c.Close()
	}
	h.Says(stage.Soon, "from=127.0.0.5")
	far.Record(0, "named by the near end", func(a telemetry.Access) bool {
		return strings.HasPrefix(a.Source, "127.0.0.5:") && strings.HasPrefix(a.Via, "127.0.0.1:") && a.Decision == "allow"
	})
}
