//go:build integration

package http2_test

import (
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

var (
	specTotal  = regexp.MustCompile(`(\d+) tests, \d+ passed, (\d+) skipped, \d+ failed`)
	specFailed = regexp.MustCompile(`× \d+: (.*)`)
)

// notOurs is the one case that does not hold where callers may speak HTTP/1.1
// in plaintext, too: an invalid preface is a bad request of that, and is told
// so before the connection ends.
const notOurs = "Sends invalid connection preface"

// TestH2spec: all of h2spec's cases, the strict ones too, hold of those whom
// callers come to. When it has gone nothing is left of it.
func TestH2spec(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		way  way
		all  bool
		more []string
		lets []string // that fail
	}{
		{name: "haproxy"},
		{name: "inbound", way: way{in: true}},
		{name: "inbound, by HTTP/2", way: way{in: true}, all: true},
		{name: "outbound", way: way{out: true}, lets: []string{notOurs}},
		{name: "outbound, HTTP/2 alone", way: way{out: true}, more: []string{"http: {versions: [h2]}"}},
		{name: "both", way: way{in: true, out: true}, lets: []string{notOurs}},
		{name: "both, by HTTP/2 alone", way: way{in: true, out: true}, all: true, more: []string{"http: {versions: [h2]}"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			service := mesh.NewService(t).Address
			if c.name == "haproxy" { // net/http does not pass
				service = haproxyFront(t, service)
			}
			r := c.way.open(t, far{address: service, all: c.all}, c.more...)
			host, port, err := net.SplitHostPort(r.plain(t))
			if err != nil {
				t.Fatal(err)
			}
			said, err := stage.Tell(t, filepath.Join(h2specTools, "h2spec"), "--strict", "-h", host, "-p", port, "-P", "/bytes/4096", "-o", "5")
			counts := specTotal.FindStringSubmatch(said)
			if counts == nil || counts[1] != "146" || counts[2] != "0" {
				t.Fatalf("h2spec does not run all of its 146 cases: %v\n%s", err, said)
			}
			_, failures, _ := strings.Cut(said, "Failures:")
			var failed []string
			for _, f := range specFailed.FindAllStringSubmatch(failures, -1) {
				failed = append(failed, f[1])
			}
			if !slices.Equal(failed, c.lets) {
				t.Errorf("h2spec: %q fail, want %q\n%s", failed, c.lets, failures)
			}
			for _, n := range r.nodes() {
				stage.Eventually(t, stage.Soon, n.Name+" has nobody left", func() error {
					if live := n.Live(); live > 0 && n.Name != "in" || live > 1 { // which the outbound one may keep
						return fmt.Errorf("%d connections are open", live)
					}
					return nil
				})
			}
		})
	}
}

// haproxyFront speaks HTTP/2 with prior knowledge in front of a service.
func haproxyFront(t *testing.T, service string) (address string) {
	t.Helper()
	address = stage.FreeAddress(t)
	p := stage.HAProxy(t, fmt.Sprintf(`defaults
  mode http
  timeout connect 5s
  timeout client 10s
  timeout http-request 5s
  timeout server 10s
listen front
  bind %s proto h2
  server s %s
`, address, service))
	stage.Listens(t, p, address)
	return address
}
