//go:build integration

package http_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// lanes is how many requests of the table a proxy is given at the same time,
// each lane with a recorder of its own.
const lanes = 4

// caller is who every request of the table comes from.
const caller = "/client"

// strictProxies are what the table is about. Each waits two seconds for what
// a client has still to send, so that all of the table ends by itself.
var strictProxies = []struct {
	name  string
	start func(t *testing.T, services []string) (dials []func() (net.Conn, error))
}{
	{"nginx", strictNginx},
	{"haproxy", strictHAProxy},
	{"narthex", strictNarthex},
	{"narthex, outbound", strictOutbound}, // which is as strict, and not in the table
}

func plainly(addresses []string) (dials []func() (net.Conn, error)) {
	for _, address := range addresses {
		dials = append(dials, func() (net.Conn, error) { return net.DialTimeout("tcp", address, mesh.CallTime) })
	}
	return dials
}

func strictNginx(t *testing.T, services []string) []func() (net.Conn, error) {
	t.Helper()
	var servers strings.Builder
	var addresses []string
	for _, service := range services {
		address := stage.FreeAddress(t)
		addresses = append(addresses, address)
		fmt.Fprintf(&servers, `server { listen %s; location / { proxy_pass http://%s; } }
`, address, service)
	}
	p := stage.Nginx(t, fmt.Sprintf(`client_header_timeout 2s; client_body_timeout 2s; keepalive_timeout 2s; proxy_read_timeout 5s;
proxy_http_version 1.1; proxy_set_header Host $host; proxy_set_header Connection ""; proxy_set_header x-spiffe-id %s;
%s`, mesh.ID(caller), servers.String()))
	for _, address := range addresses {
		stage.Listens(t, p, address)
	}
	return plainly(addresses)
}

func strictHAProxy(t *testing.T, services []string) []func() (net.Conn, error) {
	t.Helper()
	var proxies strings.Builder
	var addresses []string
	for i, service := range services {
		address := stage.FreeAddress(t)
		addresses = append(addresses, address)
		fmt.Fprintf(&proxies, `listen lane%d
  bind %s
  http-request set-header x-spiffe-id %s
  server s %s
`, i, address, mesh.ID(caller), service)
	}
	p := stage.HAProxy(t, `defaults
  mode http
  timeout connect 5s
  timeout client 2s
  timeout http-request 2s
  timeout http-keep-alive 2s
  timeout server 5s
`+proxies.String())
	for _, address := range addresses {
		stage.Listens(t, p, address)
	}
	return plainly(addresses)
}

const (
	strictTimes    = "timeouts: {head: 2s, stall: 2s, idle: 2s}"
	strictIdentity = "identity_header: {name: x-spiffe-id, xfcc: sanitize}"
	strictVersions = "http: {versions: [http/1.1]}" // the preface of HTTP/2 is one of the requests
)

func strictNarthex(t *testing.T, services []string) (dials []func() (net.Conn, error)) {
	t.Helper()
	ca := mesh.NewAuthority(t)
	client := ca.Leaf(caller)
	n := mesh.NewNode(t, "strict", ca.Leaf("/server"))
	for i, service := range services {
		address := n.Inbound(fmt.Sprintf("lane%d", i), service, strictTimes, strictIdentity)
		dials = append(dials, func() (net.Conn, error) {
			return tls.DialWithDialer(&net.Dialer{Timeout: mesh.CallTime}, "tcp", address, client.Client())
		})
	}
	n.Rules(mesh.Allow("client-may", client.ID))
	n.Start()
	return dials
}

// strictOutbound is what a caller meets that speaks plaintext to an outbound
// listener. Behind it an inbound one takes what it passes on.
func strictOutbound(t *testing.T, services []string) []func() (net.Conn, error) {
	t.Helper()
	ca := mesh.NewAuthority(t)
	client, server := ca.Leaf(caller), ca.Leaf("/server")
	in, out := mesh.NewNode(t, "strict-in", server), mesh.NewNode(t, "strict-out", client)
	var addresses []string
	for i, service := range services {
		lane := fmt.Sprintf("lane%d", i)
		addresses = append(addresses, out.Outbound(lane, in.Inbound(lane, service, strictIdentity), server.ID, strictTimes, strictVersions))
	}
	for _, n := range []*mesh.Node{in, out} {
		n.Rules(mesh.Allow("client-may", client.ID))
		n.Start()
	}
	return plainly(addresses)
}

// verdict is what a proxy made of one request of the table.
type verdict struct {
	statuses []int // that the client got, interim ones left out
	seen     []request
	broken   string // what net/http says of bytes that were passed on
	last     bool   // the good request behind it was served
}

// meaning is the requests that were passed on, as whoever reads them
// understands them.
func (v *verdict) meaning() string {
	var all []string
	for _, r := range v.seen {
		host, _, _ := strings.Cut(strings.ToLower(r.host), ":")
		target := r.target
		if _, absolute, ok := strings.Cut(target, "://"); ok {
			target = absolute[strings.IndexByte(absolute, '/'):]
		}
		all = append(all, fmt.Sprintf("%s %s of %s with %q, whole %t", r.method, target, strings.TrimSuffix(host, "."), r.body, r.whole))
	}
	return strings.Join(all, "; ")
}

func (v *verdict) refused() bool {
	return !slices.ContainsFunc(v.seen, func(r request) bool { return r.whole }) && v.broken == ""
}

// String is how the table says it.
func (v *verdict) String() string {
	text := "passed"
	switch {
	case v.broken != "":
		return "passed, broken"
	case v.refused() && len(v.statuses) == 0:
		return "closed"
	case v.refused():
		text = fmt.Sprint(v.statuses[0])
		if v.last {
			text += ", goes on"
		}
		return text
	}
	if slices.ContainsFunc(v.seen, func(r request) bool { return strings.HasSuffix(r.target, "/hidden") }) {
		text += ", and the hidden one"
	}
	for _, r := range v.seen {
		for _, claim := range r.claims() {
			if name, value, _ := strings.Cut(claim, ": "); strings.Contains(value, liar) {
				return text + ", with `" + name + "`"
			}
		}
	}
	return text
}

// liar is who callers say they are and are not.
const liar = "spiffe://example.org/admin"

// claims are the fields and trailers of a request that a service may take for
// those that say who the caller is; x-forwarded-client-cert comes last.
func (r *request) claims() (all []string) {
	for _, fields := range []http.Header{r.header, r.trailer} {
		for name, values := range fields {
			switch strings.ReplaceAll(strings.ToLower(name), "_", "-") {
			case "x-spiffe-id", "x-forwarded-client-cert":
				for _, value := range values {
					all = append(all, strings.ToLower(name)+": "+value)
				}
			}
		}
	}
	slices.SortFunc(all, func(a, b string) int { return strings.Compare(b, a) })
	return all
}

// tag takes the place of {case} in the request of that number.
func tag(n int) string { return fmt.Sprintf("/~%04d", n) }

// tagIn returns the number of the request whose last tag is in text.
func tagIn(text string) (n int, ok bool) {
	at := strings.LastIndex(text, "/~")
	if at < 0 {
		return 0, false
	}
	_, err := fmt.Sscanf(text[at:], "/~%04d", &n)
	return n, err == nil
}

// try sends one request of the table, and the good one behind it, and reads
// to the end.
func try(dial func() (net.Conn, error), raw string) ([]int, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * mesh.CallTime))
	var g sync.WaitGroup
	g.Go(func() { _, _ = io.WriteString(c, raw) }) // whoever refuses need not read it all
	defer g.Wait()
	answers, err := io.ReadAll(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, fmt.Errorf("the connection is still open: %w", err)
	}
	return statuses(answers, strings.HasPrefix(raw, http.MethodHead)), nil
}

// statuses reads answers up to where they end or cannot be read.
func statuses(answers []byte, head bool) (all []int) {
	asked := &http.Request{Method: http.MethodGet}
	if head {
		asked.Method = http.MethodHead
	}
	for in := bufio.NewReader(bytes.NewReader(answers)); ; {
		resp, err := http.ReadResponse(in, asked)
		if err != nil {
			return all
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode >= 200 {
			all = append(all, resp.StatusCode)
		}
	}
}

// judge gives a proxy all of the table and returns its verdicts.
func judge(t *testing.T, all []odd, start func(*testing.T, []string) []func() (net.Conn, error)) []verdict {
	t.Helper()
	recorders := make([]*recorder, lanes)
	services := make([]string, lanes)
	for i := range recorders {
		recorders[i] = newRecorder(t)
		services[i] = recorders[i].address
	}
	dials := start(t, services)
	verdicts := make([]verdict, len(all))
	var g sync.WaitGroup
	for lane := range lanes {
		g.Go(func() {
			for n := lane; n < len(all); n += lanes {
				var err error
				if verdicts[n].statuses, err = try(dials[lane], strings.ReplaceAll(all[n].raw+last, "{case}", tag(n))); err != nil {
					t.Errorf("%s: %v", all[n].name, err)
				}
			}
		})
	}
	g.Wait()
	for _, r := range recorders {
		attribute(t, r.all(), verdicts)
	}
	for n := range verdicts {
		slices.SortFunc(verdicts[n].seen, func(a, b request) int { return a.number - b.number })
	}
	return verdicts
}

// attribute gives each request of the table what of it came to the service.
func attribute(t *testing.T, conns []recorded, verdicts []verdict) {
	t.Helper()
	for _, c := range conns {
		for _, r := range c.requests {
			n, ok := tagIn(r.target)
			if !ok {
				n, ok = tagIn(r.header.Get("N"))
			}
			switch {
			case !ok:
				t.Errorf("the service got %+v, which nothing of the table has sent", r)
			case strings.HasSuffix(r.target, "/last"):
				verdicts[n].last = true
			default:
				verdicts[n].seen = append(verdicts[n].seen, *r)
			}
		}
		if c.bad == "" {
			continue
		}
		if n, ok := tagIn(string(c.raw)); ok {
			verdicts[n].broken = c.bad
		} else {
			t.Errorf("the service got %.200q, which net/http does not read: %s", c.raw, c.bad)
		}
	}
}
