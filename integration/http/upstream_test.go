//go:build integration

package http_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestServicesThatHangUp: services close connections whenever they like, and
// say nothing of it. No client notices.
func TestServicesThatHangUp(t *testing.T) {
	t.Parallel()
	var dialled atomic.Int64
	p := mesh.NewPair(t, stage.Serve(t, func(c net.Conn) {
		dialled.Add(1)
		in := bufio.NewReader(c)
		for range 3 {
			req, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, req.Body)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
		}
	}))
	client := clientOf(t, nil)
	const times = 300
	for n := range times {
		method, body := http.MethodGet, io.Reader(nil)
		if n%5 == 0 {
			method, body = http.MethodPut, strings.NewReader("hello")
		}
		a, err := mesh.Fetch(client, method, "http://"+p.Entry+"/a", body)
		if err != nil || a.Status != http.StatusOK || a.Body != "ok\n" {
			t.Fatalf("%s %d: %+v, %v", method, n, a, err)
		}
	}
	if n := dialled.Load(); n < times/3 || n > times/2 {
		t.Errorf("%d connections for %d requests, three on each", n, times)
	}
}

// TestServiceAway: while the service is away callers are told so at once, and
// when it is back they are served.
func TestServiceAway(t *testing.T) {
	t.Parallel()
	address := stage.FreeAddress(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	p := mesh.NewPair(t, address)
	client := clientOf(t, nil)
	ask := func(want int) error {
		a, err := mesh.Fetch(client, http.MethodGet, "http://"+p.Entry+"/bytes/3", nil)
		if err == nil && a.Status != want {
			err = fmt.Errorf("status %d, want %d: %s", a.Status, want, a.Body)
		}
		return err
	}
	for range 3 {
		if err := ask(http.StatusBadGateway); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		server := stage.NodeScript(t, "node server", "server.js", port)
		stage.Listens(t, server, address)
		stage.Eventually(t, stage.Soon, "it is back", func() error { return ask(http.StatusOK) })
		for range 20 {
			if err := ask(http.StatusOK); err != nil {
				t.Error(err)
			}
		}
		server.Stop()
		if err := ask(http.StatusBadGateway); err != nil {
			t.Error(err)
		}
	}
}

// TestOneServiceOfTwo: callers are not told of the one that is away.
func TestOneServiceOfTwo(t *testing.T) {
	t.Parallel()
	service := mesh.NewService(t)
	ca := mesh.NewAuthority(t)
	n := mesh.NewNode(t, "two", ca.Leaf("/server"))
	address := n.Inbound("two", service.Address)
	n.Listeners[0] = strings.Replace(n.Listeners[0], fmt.Sprintf("target: %q", service.Address), fmt.Sprintf("target: [%q, %q]", stage.FreeAddress(t), service.Address), 1)
	client := ca.Leaf("/client")
	n.Rules(mesh.Allow("client-may", client.ID))
	n.Start()
	for i := range 50 {
		method, body := http.MethodGet, io.Reader(nil)
		if i%2 > 0 {
			method, body = http.MethodPost, strings.NewReader("hello")
		}
		a, err := mesh.Fetch(clientOf(t, client), method, "https://"+address+"/any", body)
		if err != nil || a.Status != http.StatusOK {
			t.Errorf("%s %d: %+v, %v", method, i, a, err)
		}
	}
}
