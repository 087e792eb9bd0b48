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

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestServicesThatHangUp: services close connections whenever they like, and
// say nothing of it. No client notices.
func TestServicesThatHangUp(t *testing.T) {
	t.Parallel()
	var dialled atomic.Int64
	p := newPair(t, serve(t, func(c net.Conn) {
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
		a, err := fetch(client, method, "http://"+p.entry+"/a", body)
		if err != nil || a.status != http.StatusOK || a.body != "ok\n" {
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
	p := newPair(t, address)
	client := clientOf(t, nil)
	ask := func(want int) error {
		a, err := fetch(client, http.MethodGet, "http://"+p.entry+"/bytes/3", nil)
		if err == nil && a.status != want {
			err = fmt.Errorf("status %d, want %d: %s", a.status, want, a.body)
		}
		return err
	}
	for range 3 {
		if err := ask(http.StatusBadGateway); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		server := nodeScript(t, "node server", "server.js", port)
		listens(t, server, address)
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
	service := newService(t)
	ca := newAuthority(t)
	n := newNode(t, "two", ca.leaf("/server"))
	address := n.inbound("two", service.address)
	n.listeners[0] = strings.Replace(n.listeners[0], fmt.Sprintf("target: %q", service.address), fmt.Sprintf("target: [%q, %q]", stage.FreeAddress(t), service.address), 1)
	client := ca.leaf("/client")
	n.rules(allow("client-may", client.id))
	n.start()
	for i := range 50 {
		method, body := http.MethodGet, io.Reader(nil)
		if i%2 > 0 {
			method, body = http.MethodPost, strings.NewReader("hello")
		}
		a, err := fetch(clientOf(t, client), method, "https://"+address+"/any", body)
		if err != nil || a.status != http.StatusOK {
			t.Errorf("%s %d: %+v, %v", method, i, a, err)
		}
	}
}
