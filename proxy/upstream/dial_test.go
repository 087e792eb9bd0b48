package upstream

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkDial is one connection to a service on this host, made and closed.
// "package net" is what a plain net.Dialer takes for the same.
func BenchmarkDial(b *testing.B) {
	tcp := accept(b, "tcp", "127.0.0.1:0")
	sock := accept(b, "unix", filepath.Join(b.TempDir(), "s"))
	for _, v := range []struct {
		name string
		dial func(context.Context) (net.Conn, error)
	}{
		{"tcp", dialPlace(tcp)},
		{"tcp/package net", func(ctx context.Context) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			return (&net.Dialer{}).DialContext(ctx, "tcp", tcp)
		}},
		{"unix", dialPlace(unixPrefix + sock)},
		{"unix/package net", func(ctx context.Context) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			return (&net.Dialer{}).DialContext(ctx, "unix", sock)
		}},
		{"group", dialGroup(b, tcp)},
	} {
		b.Run(v.name, func(b *testing.B) {
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			b.ReportAllocs()
			var before, after syscall.Rusage
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			for b.Loop() {
				c, err := v.dial(ctx)
				if err != nil {
					b.Fatal(err)
				}
				if t, ok := c.(*net.TCPConn); ok {
					_ = t.SetLinger(0) // leave no port in TIME_WAIT
				}
				_ = c.Close()
			}
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
			b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op") // of both ends
		})
	}
}

func dialPlace(address string) func(context.Context) (net.Conn, error) {
	p, _, _ := parsePlace(address)
	return func(ctx context.Context) (net.Conn, error) { return p.dial(ctx, time.Now().Add(5*time.Second)) }
}

func dialGroup(b *testing.B, address string) func(context.Context) (net.Conn, error) {
	set := NewSet(Options{})
	b.Cleanup(set.Close)
	g, err := set.Take("bench", []string{address}, Settings{})
	if err != nil {
		b.Fatal(err)
	}
	return func(ctx context.Context) (net.Conn, error) {
		c, err := g.Dial(ctx, 5*time.Second)
		c.Succeeded()
		c.Close()
		return c.Conn, err
	}
}

// accept listens and closes whatever comes once the other side has. It
// returns the address.
func accept(tb testing.TB, network, address string) string {
	tb.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	tb.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

// shrink gives a listener the smallest backlog.
func shrink(t *testing.T, l *net.UnixListener) {
	t.Helper()
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var listen error
	if err := raw.Control(func(fd uintptr) { listen = syscall.Listen(int(fd), 1) }); err != nil || listen != nil {
		t.Fatal(err, listen)
	}
}

// TestOptions: a dial to another host asks for keep-alives; one to this host
// does not.
func TestOptions(t *testing.T) {
	for _, address := range []string{"127.0.0.1", ownAddress(t)} {
		at := accept(t, "tcp", net.JoinHostPort(address, "0"))
		c, err := dialPlace(at)(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		options := map[string]int{}
		err = raw.Control(func(fd uintptr) {
			for name, o := range map[string][2]int{
				"keepalive": {unix.SOL_SOCKET, unix.SO_KEEPALIVE}, "idle": {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE},
				"interval": {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL},
				"nodelay":  {unix.IPPROTO_TCP, unix.TCP_NODELAY},
			} {
				options[name], _ = unix.GetsockoptInt(int(fd), o[0], o[1])
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		remote := address != "127.0.0.1"
		if (options["keepalive"] == 1) != remote || options["nodelay"] != 1 ||
			remote && (options["idle"] != 15 || options["interval"] != 15) {
			t.Errorf("socket options to %s: %v", address, options)
		}
	}
}

// ownAddress returns an address of this host that is not loopback, where there
// is one.
func ownAddress(t *testing.T) string {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() {
			return ip.IP.String()
		}
	}
	return "127.0.0.1" // a host without a network has nothing else to show
}

// TestLeadsTo: which endpoints are the listener itself.
func TestLeadsTo(t *testing.T) {
	here := ownAddress(t)
	tcp := func(address string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address)) }
	for _, c := range []struct {
		endpoint string
		own      net.Addr
		is       bool
	}{
		{"127.0.0.1:80", nil, false},
		{"127.0.0.1:80", tcp("127.0.0.1:80"), true},
		{"[::ffff:127.0.0.1]:80", tcp("127.0.0.1:80"), true},
		{"127.0.0.1:81", tcp("127.0.0.1:80"), false},
		{"127.0.0.2:80", tcp("127.0.0.1:80"), false},
		{"127.0.0.2:80", tcp("[::]:80"), true},
		{"0.0.0.0:80", tcp("127.0.0.1:80"), true},
		{"[::1]:80", tcp("[::]:80"), true},
		{net.JoinHostPort(here, "80"), tcp("[::]:80"), true},
		{net.JoinHostPort(here, "80"), tcp("127.0.0.3:80"), false},
		{"192.0.2.1:80", tcp("[::]:80"), false},
		{"unix:/run/a.sock", &net.UnixAddr{Name: "/run/a.sock", Net: "unix"}, true},
		{"unix:/run/a.sock", &net.UnixAddr{Name: "/run/b.sock", Net: "unix"}, false},
		{"unix:/run/a.sock", tcp("127.0.0.1:80"), false},
	} {
		if p, _, _ := parsePlace(c.endpoint); p.leadsTo(c.own) != c.is {
			t.Errorf("%s from %v: %t", c.endpoint, c.own, !c.is)
		}
	}
}
