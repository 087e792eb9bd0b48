//go:build integration

package tcp_test

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// calling answers each line with its own name before it.
func calling(name string) func(net.Conn) {
	return func(c net.Conn) {
		for lines := bufio.NewScanner(c); lines.Scan(); {
			if _, err := fmt.Fprintf(c, answer+"%s says %s\n", name, lines.Text()); err != nil {
				return
			}
		}
	}
}

// TestRoutes comes with openssl and gnutls to a listener that leads them by
// server name and protocol, one way through a socket that the sandbox has to
// let us reach.
func TestRoutes(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	client := ca.leaf("/client")
	bundle := filepath.Join(client.dir, "bundle.pem")
	stage.WriteFile(t, bundle, bundlePEM(ca), 0o644)
	socket := filepath.Join(stage.Folder(t, "shop"), "app.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, calling("shop"))
	n := newNode(t, "front", ca.leaf("/front"), ca)
	routes := fmt.Sprintf(`routes: [{sni: [db.example.org], alpn: [postgresql], target: %q}, {sni: ["*.shop.example"], target: %q}, {alpn: [h2], target: %q}]`,
		serve(t, calling("db")).address, "unix:"+socket, serve(t, calling("h2")).address)
	open := n.inbound("open", serve(t, calling("own")).address, routes)
	strict := n.inbound("strict", "", routes, "alpn: [http/1.1]")
	n.rules(allow("client-may", client.id))
	n.start()

	const alert = "no application protocol"
	for _, c := range []struct {
		address, name, protocol string
		who, agreed             string // who answers; empty: nobody
		reason                  string
	}{
		{open, "db.example.org", "postgresql", "db", "postgresql", ""},
		{open, "DB.Example.ORG", "postgresql", "db", "postgresql", ""},
		{open, "db.example.org", "", "own", "", ""},
		{open, "db.example.org", "x,postgresql,h2", "db", "postgresql", ""},
		{open, "a.b.shop.example", "", "shop", "", ""},
		{open, "a.b.shop.example", "h2", "shop", "h2", ""}, // the first route that matches
		{open, "shop.example", "h2", "h2", "h2", ""},
		{open, "", "h2", "h2", "h2", ""},
		{open, "", "", "own", "", ""},
		{open, "db.example.org", "x,y", "", "", alert},
		{strict, "nowhere.example.org", "http/1.1", "", "http/1.1", "no route for server name"},
		{strict, "nowhere.example.org", "", "", "", "no route for server name"},
		{strict, "nowhere.example.org", "postgresql", "", "", alert},
	} {
		skip := len(n.Records())
		args := with(client)
		if c.name != "" {
			args = append(args, "-servername", c.name)
		} else {
			args = append(args, "-noservername")
		}
		if c.protocol != "" {
			args = append(args, "-alpn", c.protocol)
		}
		out := sClient(t, c.address, args...)
		want := answer + c.who + " says hello"
		if answered := strings.Contains(out, answer); answered != (c.who != "") || answered && !strings.Contains(out, want) {
			t.Errorf("%+v: openssl says\n%s", c, out)
		}
		if agreed := strings.Contains(out, "ALPN protocol: "+c.agreed+"\n"); c.agreed != "" && !agreed {
			t.Errorf("%+v: openssl says\n%s", c, out)
		}
		if c.reason == alert {
			if !strings.Contains(out, "alert "+alert) {
				t.Errorf("%+v: no such alert:\n%s", c, out)
			}
			n.refused(skip, "the client requested unsupported application protocols")
		} else if c.reason != "" {
			a := n.Record(skip, c.reason, func(a telemetry.Access) bool { return strings.Contains(a.Reason, c.reason) })
			if a.Decision != "allow" || a.Outcome != "failure" || a.Destination != "" {
				t.Errorf("%+v: record %+v", c, a)
			}
		}
	}

	host, port, _ := net.SplitHostPort(open)
	for _, c := range []struct{ name, protocol, want string }{
		{"db.example.org", "postgresql", answer + "db says hello"},
		{"x.shop.example", "", answer + "shop says hello"},
		{"db.example.org", "x", "No supported application protocol"},
	} {
		args := []string{host, "--port", port, "--x509cafile", bundle, "--x509certfile", client.certFile, "--x509keyfile", client.keyFile, "--no-ca-verification", "--sni-hostname", c.name}
		if c.protocol != "" {
			args = append(args, "--alpn", c.protocol)
		}
		out := stage.Talk(t, "gnutls-cli", args, c.want) // which comes in pieces
		if !strings.Contains(out, c.want) {
			t.Errorf("%+v: gnutls says\n%s", c, out)
		}
	}
}

// dialAs connects as a client that asks for a server.
func dialAs(t *testing.T, address string, own *svid, serverName string) net.Conn {
	t.Helper()
	config := own.client()
	config.ServerName = serverName
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: callTime}, "tcp", address, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// askNamed sends a line, which the named service has to answer.
func askNamed(c net.Conn, name string) error {
	if err := c.SetDeadline(time.Now().Add(callTime)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return err
	}
	line, err := readLine(c)
	if want := answer + name + " says hello"; err == nil && line != want {
		return fmt.Errorf("answer %q, want %q", line, want)
	}
	return err
}

// TestRoutesReload: a reload that leads one name elsewhere ends its live
// connection, and not the other's.
func TestRoutesReload(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	client := ca.leaf("/client")
	n := newNode(t, "front", ca.leaf("/front"), ca)
	a, b, other := serve(t, calling("a")), serve(t, calling("b")), serve(t, calling("other"))
	routes := func(a string) string {
		return fmt.Sprintf(`routes: [{sni: [a.example], target: %q}, {sni: [b.example], target: %q}]`, a, b.address)
	}
	address := n.inbound("front", "", routes(a.address), "timeouts: {drain: 0s}")
	n.rules(allow("client-may", client.id))
	n.start()
	live := map[string]net.Conn{}
	for _, name := range []string{"a", "b"} {
		live[name] = dialAs(t, address, client, name+".example")
		if err := askNamed(live[name], name); err != nil {
			t.Fatal(err)
		}
	}
	i := slices.IndexFunc(n.listeners, func(l *listener) bool { return l.name == "front" })
	n.listeners[i].more[0] = routes(other.address)
	n.configure()
	n.reload()
	if err := askNamed(live["b"], "b"); err != nil {
		t.Errorf("whose route stayed: %v", err)
	}
	over(t, live["a"]) // whose route leads elsewhere
	if a := n.Record(0, "drained", func(a telemetry.Access) bool { return a.Closed == "drain" }); a.ServerName != "a.example" {
		t.Errorf("record: %+v", a)
	}
	if err := askNamed(dialAs(t, address, client, "a.example"), "other"); err != nil {
		t.Error(err)
	}
}
