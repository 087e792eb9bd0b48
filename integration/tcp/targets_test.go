//go:build integration

package tcp_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// newGuard prepares a door of one listener before several targets; nothing
// runs yet.
func newGuard(t *testing.T, bind, target string, more ...string) *door {
	t.Helper()
	d := &door{ca: newAuthority(t, "example.org"), address: bind}
	d.client = d.ca.leaf("/client")
	d.node = newNode(t, "guard", d.ca.leaf("/server"), d.ca)
	d.address = d.listen(&listener{name: "orders", bind: bind, target: target, more: more})
	d.rules(d.clientMay())
	return d
}

// endpoint returns what the status says of an address; the zero value where
// there is none.
func (n *node) endpoint(address string) telemetry.EndpointStatus {
	n.t.Helper()
	s, err := n.Status()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, e := range s.Proxy.Listeners[0].Endpoints {
		if e.Address == address {
			return e
		}
	}
	return telemetry.EndpointStatus{}
}

// names is a real DNS server on a loopback address of its own, with its hosts
// in a file.
type names struct {
	*stage.Process
	t                      *testing.T
	address, hosts, resolv string
}

func newNames(t *testing.T) *names {
	t.Helper()
	// The port is DNS's own, so the address is one that nobody else has.
	_, port, _ := net.SplitHostPort(stage.FreeAddress(t))
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.77.%d.%d", number>>8, number&0xff)
	dir := stage.Folder(t, "dns")
	n := &names{t: t, address: address, hosts: filepath.Join(dir, "hosts"), resolv: filepath.Join(dir, "resolv.conf")}
	stage.WriteFile(t, n.hosts, "", 0o644)
	stage.WriteFile(t, n.resolv, "nameserver "+address+"\noptions timeout:20 attempts:1\n", 0o644)
	n.start()
	return n
}

func (n *names) start() {
	n.t.Helper()
	n.Process = stage.Start(n.t, "dnsmasq", "dnsmasq", []string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--bind-interfaces", "--listen-address=" + n.address,
		"--no-resolv", "--no-hosts", "--addn-hosts=" + n.hosts, "--local=/test/", "--user=root", "--pid-file=", "--log-facility=-",
	})
	n.Says(stage.Soon, "started")
}

// say makes the name of the service resolve to these addresses, or be gone.
func (n *names) say(addresses ...string) {
	n.t.Helper()
	text := ""
	for _, a := range addresses {
		text += a + " orders.shop.test\n"
	}
	stage.WriteFile(n.t, n.hosts, text, 0o644)
	n.Signal(syscall.SIGHUP)
}

// TestNamesAreFollowed: a target's name is looked up again while the proxy
// runs. Connections stay, new ones go to the addresses there are, and DNS may
// be away.
func TestNamesAreFollowed(t *testing.T) {
	t.Parallel()
	dns := newNames(t)
	_, port, _ := net.SplitHostPort(stage.FreeAddress(t))
	ips := []string{"127.77.1.1", "127.77.1.2", "::1"}
	services := map[string]*service{}
	for _, ip := range ips {
		l, err := net.Listen("tcp", net.JoinHostPort(ip, port))
		if err != nil {
			t.Fatal(err)
		}
		services[ip] = serveOn(t, l, answerLines)
	}
	dns.say(ips[0], ips[1])
	d := newGuard(t, "", "orders.shop.test:"+port)
	d.how = append(d.how, stage.InNamespaces("mount --bind '"+dns.resolv+"' /etc/resolv.conf", "--mount"))
	d.start()
	dialled := func(calls int) (n [3]int64) {
		t.Helper()
		for i, ip := range ips {
			n[i] = -services[ip].dialled.Load()
		}
		for range calls {
			if err := d.passes("tcp", d.address); err != nil {
				t.Fatal(err)
			}
		}
		for i, ip := range ips {
			n[i] += services[ip].dialled.Load()
		}
		return n
	}
	if got := dialled(10); got != [3]int64{5, 5, 0} {
		t.Errorf("connections to the two addresses: %v", got)
	}
	stays, err := d.enter("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	defer stays.Close()
	if err := ask(stays, "before"); err != nil {
		t.Fatal(err)
	}
	dns.say(ips[2]) // IPv6 alone
	d.Becomes(stage.Soon, "the new address is in use", func(s telemetry.Status) bool {
		e := s.Proxy.Listeners[0].Endpoints
		return len(e) == 1 && e[0].Address == "[::1]:"+port
	})
	if got := dialled(10); got != [3]int64{0, 0, 10} {
		t.Errorf("connections to the new address: %v", got)
	}
	if err := ask(stays, "its address is gone from DNS"); err != nil {
		t.Errorf("a connection to an address that is gone from DNS: %v", err)
	}
	dns.Stop()
	d.Says(stage.Soon, "its last addresses are used until it resolves again")
	if got := dialled(10); got != [3]int64{0, 0, 10} {
		t.Errorf("connections while DNS is away: %v", got)
	}
	dns.start()
	dns.say() // the name is gone
	d.Says(stage.Soon, "name is gone: its last addresses are used for a while")
	if got := dialled(4); got != [3]int64{0, 0, 4} {
		t.Errorf("connections after the name is gone: %v", got)
	}
	dns.say(ips...)
	d.Becomes(stage.Soon, "three addresses are in use", func(s telemetry.Status) bool { return len(s.Proxy.Listeners[0].Endpoints) == 3 })
	if got := dialled(12); got != [3]int64{4, 4, 4} {
		t.Errorf("connections to three addresses: %v", got)
	}
	if n := d.Count("cannot look up a target"); n != 1 {
		t.Errorf("the log says %d times that DNS is away, want once", n)
	}
}

// mortal is a service that is killed and revived on its address.
type mortal struct {
	network, address string

	mu   sync.Mutex // guards the following
	l    net.Listener
	live map[net.Conn]bool
	g    sync.WaitGroup
}

func (m *mortal) revive() error {
	var lc net.ListenConfig
	l, err := lc.Listen(context.Background(), m.network, m.address)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.l, m.live = l, map[net.Conn]bool{}
	m.g.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			m.mu.Lock()
			m.live[c] = true
			m.mu.Unlock()
			m.g.Go(func() {
				answerLines(c)
				m.mu.Lock()
				delete(m.live, c)
				m.mu.Unlock()
				_ = c.Close()
			})
		}
	})
	return nil
}

// kill ends the service as SIGKILL ends a process: its socket and its
// connections are gone at once.
func (m *mortal) kill() {
	_ = m.l.Close()
	m.mu.Lock()
	for c := range m.live {
		_ = c.Close()
	}
	m.mu.Unlock()
	m.g.Wait()
}

// TestTargetsDieUnderLoad: of three targets, two TCP and one Unix, one after
// the other is killed and revived while clients come without pause. No
// connection is refused for want of a target, and no more are lost than were
// being served.
func TestTargetsDieUnderLoad(t *testing.T) {
	t.Parallel()
	services := []*mortal{
		{network: "tcp", address: stage.FreeAddress(t)},
		{network: "tcp", address: stage.FreeAddress(t)},
		{network: "unix", address: filepath.Join(stage.Folder(t, "app"), "app.sock")},
	}
	var targets []string
	for _, s := range services {
		if err := s.revive(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.kill)
		if s.network == "unix" {
			targets = append(targets, "unix:"+s.address)
		} else {
			targets = append(targets, s.address)
		}
	}
	for _, balance := range []string{"round_robin", "least_connections"} {
		t.Run(balance, func(t *testing.T) {
			d := newGuard(t, "", "["+strings.Join(targets, ", ")+"]",
				"upstream: {balance: "+balance+", ejection: {after: 3, for: 500ms}, health: {interval: 300ms, timeout: 300ms}}")
			d.start()
			const clients = 6
			c := &crowd{stop: make(chan struct{})}
			for range clients {
				c.comes(d, "tcp", d.address)
			}
			kills := 0
			for range 2 {
				for _, s := range services {
					time.Sleep(300 * time.Millisecond)
					s.kill()
					kills++
					time.Sleep(700 * time.Millisecond)
					if err := s.revive(); err != nil {
						t.Fatal(err)
					}
				}
			}
			d.Becomes(stage.Soon, "all targets are healthy again", func(s telemetry.Status) bool {
				for _, e := range s.Proxy.Listeners[0].Endpoints {
					if !e.Healthy {
						return false
					}
				}
				return true
			})
			c.leave()
			if failed := c.failed.Load(); failed > int64(kills*clients) || c.came.Load() < 100 {
				t.Errorf("%d of %d calls failed over %d kills; the first: %v", failed, c.came.Load(), kills, c.first.Load())
			}
			t.Logf("%d calls, %d lost with a killed target", c.came.Load(), c.failed.Load())
			for _, r := range d.Records() {
				if strings.HasPrefix(r.Reason, "target: dial") || strings.HasPrefix(r.Reason, "target: none") {
					t.Errorf("a connection was refused for want of a target: %s", r.Reason)
				}
			}
			if failures := d.Metric(`narthex_upstream_connect_failures_total{listener="orders"}`); failures == 0 {
				t.Error("no connect failed while targets were dead")
			}
			if healthy := d.Metric(`narthex_upstream_healthy{listener="orders"}`); healthy != 3 {
				t.Errorf("%v targets are healthy, want 3", healthy)
			}
		})
	}
}

// TestSwallowingTarget: one of two targets is a host that swallows what it is sent.
// Every connection comes to the other one within the connect timeout, and after
// three that waited for the first none is led there.
func TestSwallowingTarget(t *testing.T) {
	t.Parallel()
	dir := stage.Folder(t, "hole")
	l, err := net.Listen("unix", filepath.Join(dir, "app.sock"))
	if err != nil {
		t.Fatal(err)
	}
	app := serveOn(t, l, answerLines)
	const hole = "10.77.0.9:8080"
	bind := filepath.Join(dir, "in.sock")
	d := newGuard(t, "unix:"+bind, fmt.Sprintf("[%q, %q]", hole, "unix:"+l.Addr().String()),
		"timeouts: {connect: 4s}", "upstream: {ejection: {after: 3, for: 1m}}")
	d.how = append(d.how, stage.InNamespaces(`ip link set lo up
ip link add hole type veth peer name far
ip address add 10.77.0.1/24 dev hole
ip link set hole up
ip link set far up
ip neighbour add 10.77.0.9 lladdr 02:00:00:00:00:09 dev hole nud permanent`, "--net"))
	d.start()
	for range 20 {
		if err := d.passes("unix", bind); err != nil {
			t.Fatalf("a call: %v", err)
		}
	}
	if n := app.dialled.Load(); n != 20 {
		t.Errorf("%d of 20 calls came through", n)
	}
	if e := d.endpoint(hole); e.Healthy || e.Failed != 3 || !strings.Contains(e.Problem, "no answer within 2s") {
		t.Errorf("the black hole's status: %+v", e)
	}
	if got := d.Metric(`narthex_upstream_ejections_total{listener="orders"}`); got != 1 {
		t.Errorf("%v ejections, want 1", got)
	}
}
