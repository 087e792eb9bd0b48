//go:build integration

package tcp_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// network is two hosts and the cable between them: network namespaces with a
// veth pair. Near is where the proxy is.
type network struct {
	t         *testing.T
	near, far *machine
}

// machine is one network namespace.
type machine struct {
	t      *testing.T
	name   string
	device string
	ip     string
}

var networks atomic.Int32

func newNetwork(t *testing.T) *network {
	t.Helper()
	n, pid := networks.Add(1), os.Getpid()
	w := &network{t: t}
	w.near = &machine{t, fmt.Sprintf("nx-%d-%d-near", pid, n), fmt.Sprintf("nxa%d-%d", pid%100000, n), "10.77.0.1"}
	w.far = &machine{t, fmt.Sprintf("nx-%d-%d-far", pid, n), fmt.Sprintf("nxb%d-%d", pid%100000, n), "10.77.0.2"}
	for _, m := range []*machine{w.near, w.far} {
		stage.Must(t, "ip", "netns", "add", m.name)
		remove := func() { _, _ = exec.Command("ip", "netns", "del", m.name).Output() }
		stage.WhenInterrupted(remove)
		t.Cleanup(remove)
	}
	stage.Must(t, "ip", "link", "add", w.near.device, "netns", w.near.name, "type", "veth", "peer", "name", w.far.device, "netns", w.far.name)
	for _, m := range []*machine{w.near, w.far} {
		m.runs("ip", "addr", "add", m.ip+"/24", "dev", m.device)
		m.runs("ip", "link", "set", m.device, "up")
		m.runs("ip", "link", "set", "lo", "up")
	}
	return w
}

// enter makes a command run on the host.
func (m *machine) enter(cmd *exec.Cmd) {
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		m.t.Fatal(err)
	}
	cmd.Args = append([]string{"nsenter", "--net=/run/netns/" + m.name, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = nsenter
}

// runs runs a command on the host that has to succeed.
func (m *machine) runs(program string, args ...string) {
	m.t.Helper()
	stage.Must(m.t, "nsenter", append([]string{"--net=/run/netns/" + m.name, program}, args...)...)
}

// vanishes takes the host off the network without a word: packets to and from
// it are lost.
func (m *machine) vanishes() {
	m.t.Helper()
	m.runs("iptables", "-I", "INPUT", "-i", m.device, "-j", "DROP")
	m.runs("iptables", "-I", "OUTPUT", "-o", m.device, "-j", "DROP")
}

// loses makes the host lose a share of the packets that come to it.
func (m *machine) loses(share string) {
	m.t.Helper()
	m.runs("iptables", "-I", "INPUT", "-i", m.device, "-m", "statistic", "--mode", "random", "--probability", share, "-j", "DROP")
}

// lost fails the test unless packets were lost on the way here.
func (m *machine) lost(t *testing.T) {
	t.Helper()
	out := stage.Must(t, "nsenter", "--net=/run/netns/"+m.name, "iptables", "-L", "INPUT", "-v", "-x", "-n")
	for line := range strings.SplitSeq(out, "\n") {
		var packets int
		if n, _ := fmt.Sscan(line, &packets); n == 1 && strings.Contains(line, "DROP") {
			if t.Logf("%s lost %d packets", m.ip, packets); packets > 0 {
				return
			}
		}
	}
	t.Errorf("no packet was lost:\n%s", out)
}

// do runs f on the host: sockets it makes are the host's for good.
func (m *machine) do(f func() error) error {
	done := make(chan error)
	go func() {
		// The thread is not given back: it ends with this goroutine.
		runtime.LockOSThread()
		done <- m.enterThread(f)
	}()
	return <-done
}

func (m *machine) enterThread(f func() error) error {
	ns, err := os.Open("/run/netns/" + m.name)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", m.name, err)
	}
	return f()
}

// dial connects from the host.
func (m *machine) dial(address string) (c net.Conn, err error) {
	err = m.do(func() error {
		c, err = net.DialTimeout("tcp", address, callTime)
		return err
	})
	return c, err
}

// serve answers connections on the host; port 0 on loopback takes a free one.
func (m *machine) serve(address string, handle func(net.Conn)) *service {
	m.t.Helper()
	var l net.Listener
	if err := m.do(func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
		m.t.Fatal(err)
	}
	return serveOn(m.t, l, handle)
}

// inboundAcross starts a proxy on the near host, before a service of it, for
// clients of the far one.
func (w *network) inboundAcross(service *service, more ...string) (n *node, ca *authority, address string) {
	w.t.Helper()
	ca = newAuthority(w.t, "example.org")
	n = newNode(w.t, "in", ca.leaf("/server"), ca)
	n.how = append(n.how, w.near.enter)
	address = w.near.ip + ":8443"
	n.listen(&listener{name: "in", bind: address, target: service.address, more: more})
	n.rules(allow("all", ca.id("/client")))
	n.start()
	return n, ca, address
}

// outboundAcross starts a proxy on the near host, for a target on the far one.
func (w *network) outboundAcross(ca *authority, target string, more ...string) (n *node, address string) {
	w.t.Helper()
	n = newNode(w.t, "out", ca.leaf("/client"), ca)
	n.how = append(n.how, w.near.enter)
	address = n.outbound("out", target, ca.id("/server"), more...)
	n.rules(allow("all", ca.id("/client")))
	n.start()
	return n, address
}

// secured dials from the host and does the handshake.
func (m *machine) secured(address string, own *svid) (*tls.Conn, error) {
	raw, err := m.dial(address)
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, own.client())
	if err := c.Handshake(); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// TestFarHostLost takes the far host away in the midst of connections: of one
// that is silent, of one on which we are sending, and of one with an idle
// timeout and nothing to send.
func TestFarHostLost(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		more    string
		talking bool
		within  time.Duration
	}{
		{"silent", "timeouts: {idle: 0s}", false, 150 * time.Second},
		{"talking", "timeouts: {idle: 20s}", true, 25 * time.Second},
		{"idle", "timeouts: {idle: 3s}", false, 4 * time.Second},
	} {
		service := func(conn net.Conn) {
			if _, err := readLine(conn); err != nil {
				return
			}
			for c.talking {
				if _, err := io.WriteString(conn, "still there?\n"); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond) // the pace at which it talks
			}
			_, _ = io.WriteString(conn, "good morning\n")
			_, _ = io.ReadAll(conn)
		}
		t.Run(c.name+"-client", func(t *testing.T) {
			t.Parallel()
			w := newNetwork(t)
			n, ca, address := w.inboundAcross(w.near.serve("127.0.0.1:0", service), c.more)
			conn, err := w.far.secured(address, ca.leaf("/client"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, "hello\n"); err != nil {
				t.Fatal(err)
			}
			if _, err := readLine(conn); err != nil {
				t.Fatal(err)
			}
			w.lost(n, c.within)
		})
		t.Run(c.name+"-target", func(t *testing.T) {
			t.Parallel()
			w, ca := newNetwork(t), newAuthority(t, "example.org")
			config := ca.leaf("/server").server()
			far := w.far.serve(w.far.ip+":8443", func(conn net.Conn) {
				secured := tls.Server(conn, config)
				if line, err := readLine(secured); err == nil {
					_, _ = fmt.Fprintln(secured, line)
					_, _ = io.Copy(io.Discard, secured)
				}
			})
			n, address := w.outboundAcross(ca, far.address, c.more)
			conn, err := w.near.dial(address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, "hello\n"); err != nil {
				t.Fatal(err)
			}
			if _, err := readLine(conn); err != nil {
				t.Fatal(err)
			}
			end := make(chan error, 1) // as the caller learns of it
			go func() {
				if !c.talking {
					_, err := io.ReadAll(conn)
					end <- err
					return
				}
				_, err := io.WriteString(conn, "still there?\n")
				for ; err == nil; _, err = io.WriteString(conn, "still there?\n") {
					time.Sleep(100 * time.Millisecond) // the pace at which it talks
				}
				end <- err
			}()
			w.lost(n, c.within)
			select {
			case err := <-end:
				if !isReset(err) {
					t.Errorf("the caller was told %v, want a reset", err)
				}
			case <-time.After(callTime):
				t.Error("the caller was told nothing")
			}
		})
	}
}

// lost takes the far host away and waits until n's connection has ended.
func (w *network) lost(n *node, within time.Duration) {
	w.t.Helper()
	w.near.acknowledged(n) // or it would be sent again, which is another way to notice
	w.far.vanishes()
	began := time.Now()
	stage.Eventually(w.t, within+stage.Soon, "the connection has ended", func() error {
		if live := n.live(); live > 0 {
			return fmt.Errorf("%d live after %s", live, time.Since(began).Round(time.Second))
		}
		return nil
	})
	took := time.Since(began)
	w.t.Logf("ended after %s", took.Round(time.Millisecond))
	a := n.Record(0, "ended", func(a telemetry.Access) bool { return a.Closed != "" })
	w.t.Logf("closed by %s: %s", a.Closed, a.Reason)
	if a.Closed != "peer" || a.Reason == "" {
		w.t.Errorf("record: %+v", a)
	}
}

// acknowledged waits until the far host has all that was sent to it from m, where
// n runs: until no connection to it has anything in its queue (tx_queue of
// /proc/net/tcp, bytes that were not acknowledged).
func (m *machine) acknowledged(n *node) {
	m.t.Helper()
	stage.Eventually(m.t, stage.Soon, "all that was sent is acknowledged", func() error {
		table, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", n.PID()))
		if err != nil {
			return err
		}
		for line := range strings.SplitSeq(string(table), "\n") {
			// sl, local and remote address, state (01: established), tx:rx queue.
			f := strings.Fields(line)
			if len(f) > 4 && f[3] == "01" && !strings.HasPrefix(f[4], "00000000:") {
				return fmt.Errorf("%s to %s has %s in its queues", f[1], f[2], f[4])
			}
		}
		return nil
	})
}

// TestPatience has a peer that lives and takes nothing for longer than a
// minute. It gets all there is when it goes on.
func TestPatience(t *testing.T) {
	t.Parallel()
	const pause, size = 75 * time.Second, 32 << 20
	block := make([]byte, size)
	t.Run("client", func(t *testing.T) {
		t.Parallel()
		w := newNetwork(t)
		_, ca, address := w.inboundAcross(w.near.serve("127.0.0.1:0", func(c net.Conn) { _, _ = c.Write(block) }))
		conn, err := w.far.secured(address, ca.leaf("/client"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		time.Sleep(pause) // how long nothing is taken is what is tested
		if n, err := io.Copy(io.Discard, conn); n != size || err != nil {
			t.Errorf("%d of %d bytes came, %v", n, size, err)
		}
	})
	t.Run("target", func(t *testing.T) {
		t.Parallel()
		w, ca := newNetwork(t), newAuthority(t, "example.org")
		config := ca.leaf("/server").server()
		came := make(chan int64, 1)
		far := w.far.serve(w.far.ip+":8443", func(conn net.Conn) {
			secured := tls.Server(conn, config)
			if secured.Handshake() == nil {
				time.Sleep(pause) // as above
				n, _ := io.Copy(io.Discard, secured)
				came <- n
			}
		})
		_, address := w.outboundAcross(ca, far.address)
		conn, err := w.near.dial(address)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(block); err != nil {
			t.Errorf("the caller: %v", err)
		}
		conn.Close()
		if n := <-came; n != size {
			t.Errorf("%d of %d bytes came", n, size)
		}
	})
}

// TestBlackHole dials a host that answers nothing.
func TestBlackHole(t *testing.T) {
	t.Parallel()
	w, ca := newNetwork(t), newAuthority(t, "example.org")
	n, address := w.outboundAcross(ca, w.far.ip+":8443", "timeouts: {connect: 1s}")
	w.far.vanishes()
	began := time.Now()
	conn, err := w.near.dial(address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(callTime)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conn); !isReset(err) {
		t.Errorf("the caller read %v, want a reset", err)
	}
	if took := time.Since(began); took < 900*time.Millisecond || took > stage.Soon {
		t.Errorf("it took %s, want 1s", took)
	}
	n.refused(0, "1s")
}

// TestLossyNetwork moves much over a network that loses one packet of a
// hundred each way.
func TestLossyNetwork(t *testing.T) {
	t.Parallel()
	w := newNetwork(t)
	service := w.near.serve("127.0.0.1:0", echo)
	_, ca, address := w.inboundAcross(service)
	client := ca.leaf("/client")
	w.far.loses("0.01")
	w.near.loses("0.01")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var g sync.WaitGroup
	defer func() { w.far.lost(t) }()
	for range 2 {
		g.Go(func() {
			conn, err := w.far.secured(address, client)
			if err != nil {
				t.Error(err)
				return
			}
			if err := bulkOn(ctx, conn, 64<<20); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
}

// TestSlowPeers has clients that take what they asked for by the byte. Memory
// stays bounded, and nobody else is slowed down.
func TestSlowPeers(t *testing.T) {
	t.Parallel()
	const slow = 200
	block := []byte(strings.Repeat("much ", 1<<18))
	service := serve(t, func(c net.Conn) {
		line, err := readLine(c)
		for err == nil && line == "much" {
			_, err = c.Write(block)
		}
		if err == nil {
			_, _ = fmt.Fprintln(c, answer+line)
		}
	})
	ca := newAuthority(t, "example.org")
	n := newNode(t, "in", ca.leaf("/server"), ca)
	address := n.inbound("in", service.address)
	client := ca.leaf("/client")
	n.rules(allow("all", client.id))
	n.start()
	before := stage.RSS(t, n.PID())
	ctx, stop := context.WithCancel(t.Context())
	var g sync.WaitGroup
	defer g.Wait()
	defer stop()
	for range slow {
		raw := dial(t, address)
		if err := raw.SetReadBuffer(4096); err != nil {
			t.Fatal(err)
		}
		c := tls.Client(raw, client.client())
		if _, err := io.WriteString(c, "much\n"); err != nil {
			t.Fatal(err)
		}
		g.Go(func() {
			// A byte at a time, at the pace of somebody slow.
			for one := make([]byte, 1); ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
				if _, err := c.Read(one); err != nil {
					t.Errorf("a slow client: %v", err)
					return
				}
			}
			raw.Close()
		})
	}
	var worst time.Duration
	for range 100 {
		began := time.Now()
		if err := askTLS(address, client); err != nil {
			t.Fatal(err)
		}
		worst = max(worst, time.Since(began))
	}
	grown := stage.RSS(t, n.PID()) - before
	t.Logf("%d slow clients: %d KiB each, the slowest of 100 others took %s", slow, grown/slow/1024, worst)
	if grown > slow*256<<10 {
		t.Errorf("memory grew by %d KiB for each slow client", grown/slow/1024)
	}
	if worst > callTime {
		t.Errorf("another client waited for %s", worst)
	}
	stop()
	g.Wait()
	n.quiet()
}

// TestResetStorm breaks off thousands of connections in every phase.
func TestResetStorm(t *testing.T) {
	t.Parallel()
	const storm = 3000
	d := newDoor(t)
	for range 50 { // what is kept for later is kept by now
		if err := askTLS(d.address, d.client); err != nil {
			t.Fatal(err)
		}
	}
	d.quiet()
	files := stage.OpenFiles(t, d.PID())
	goroutines := d.Metric("go_goroutines")
	hello := clientHello()
	var g sync.WaitGroup
	next := atomic.Int32{}
	for range 16 {
		g.Go(func() {
			for i := next.Add(1); i <= storm; i = next.Add(1) {
				raw, err := net.DialTimeout("tcp", d.address, callTime)
				if err != nil {
					t.Error(err)
					return
				}
				switch i % 4 {
				case 0: // at once
				case 1:
					_, _ = raw.Write(hello)
				case 2:
					_, _ = raw.Write(hello[:len(hello)/2])
				case 3:
					_ = tls.Client(raw, d.client.client()).Handshake()
				}
				reset(raw.(*net.TCPConn))
			}
		})
	}
	stopped := make(chan struct{})
	var good sync.WaitGroup
	good.Go(func() {
		for {
			select {
			case <-stopped:
				return
			default:
			}
			if err := askTLS(d.address, d.client); err != nil {
				t.Errorf("a good client in the storm: %v", err)
			}
		}
	})
	g.Wait()
	close(stopped)
	good.Wait()
	d.quiet()
	d.leavesNothing(files, goroutines)
}

// leavesNothing wants as many files and goroutines as before.
func (n *node) leavesNothing(files int, goroutines float64) {
	n.t.Helper()
	stage.Eventually(n.t, stage.Soon, "nothing is left behind", func() error {
		var err error
		if now := stage.OpenFiles(n.t, n.PID()); now > files+5 {
			err = fmt.Errorf("%d files are open, %d were", now, files)
		}
		if now := n.Metric("go_goroutines"); now > goroutines+5 {
			err = errors.Join(err, fmt.Errorf("%g goroutines, %g were", now, goroutines))
		}
		return err
	})
}
