//go:build integration

package tcp_test

import (
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// door is an inbound listener with a service that answers lines, a client
// that may come in and one that may not.
type door struct {
	*node
	ca      *authority
	client  *svid
	service *service
	address string
}

// newDoor starts one; more is further YAML of its listener.
func newDoor(t *testing.T, more ...string) *door {
	t.Helper()
	d := &door{ca: newAuthority(t, "example.org"), service: serve(t, answerLines)}
	d.client = d.ca.leaf("/client")
	d.node = newNode(t, "door", d.ca.leaf("/server"), d.ca)
	d.address = d.inbound("door", d.service.address, more...)
	d.rules(d.clientMay())
	d.start()
	return d
}

func (d *door) clientMay() string { return allow("client-may", d.client.id) }

// with are the arguments that make openssl present s.
func with(s *svid, more ...string) []string {
	return append([]string{"-cert", s.certFile, "-key", s.keyFile, "-cert_chain", s.certFile}, more...)
}

// sClient runs `openssl s_client`, sends one line and returns all that openssl
// said until an answer came or the connection ended.
func sClient(t *testing.T, address string, args ...string) string {
	t.Helper()
	return stage.Talk(t, "openssl", append([]string{"s_client", "-connect", address, "-ign_eof"}, args...), answer, "olleh")
}

// sServer runs `openssl s_server -rev`, which answers each line with the same
// line backwards, and returns its address.
func sServer(t *testing.T, own *svid, args ...string) (*stage.Process, string) {
	t.Helper()
	address := stage.FreeAddress(t)
	p := stage.Start(t, "openssl s_server", "openssl", append(append([]string{"s_server", "-accept", address, "-rev"}, with(own)...), args...))
	p.Says(stage.Soon, "ACCEPT")
	return p, address
}
