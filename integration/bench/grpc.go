package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// The rows of gRPC.
var (
	rowGRPC = &row{
		id: "h2-grpc", title: "gRPC, unary, 128 B each way, in front of grpc-go; 16 calls at a time on 1 connection", unit: "µs CPU", target: besideHAProxy,
		did: "CPU time of the proxy. HTTP/2 over TLS to the proxy, h2c behind it. The client is the one of the rows above; narthex decides by service and method, haproxy and nginx by the path.",
	}
	rowGRPCBoth = &row{
		id: "h2-grpc-both", title: "the same through two proxies, or with mTLS in grpc-go itself: the client, the service and what is between them", unit: "µs CPU",
		did: "CPU time of all processes. narthex, haproxy: client (grpc-go, plaintext), outbound proxy, mTLS, inbound proxy, service (grpc-go, plaintext). grpc-go: client, mTLS with go-spiffe, service. " +
			"16 calls at a time on 1 connection; the handshakes are not counted.",
	}
	rowGRPCProxies = &row{
		id: "h2-grpc-proxies", title: "of the row above, what the two proxies use", unit: "µs CPU", target: besideHAProxy,
		did: "CPU time of the outbound and the inbound proxy in the row above.",
	}
)

// Calls of gRPC in a round, and how many are made at a time.
const (
	grpcCalls   = 24_000
	grpcAtATime = 16
)

// withGRPC returns the kind with HTTP/2 on both sides, in front of a service
// of gRPC.
func (k proxyKind) withGRPC(address string) *proxyKind {
	kind := k.withHTTP2(true)
	kind.behind, kind.greet = address, greetH2(grpcQuestion())
	return kind
}

// measureGRPC measures the proxies in front of a service of grpc-go.
func measureGRPC(ctx context.Context, b *bench) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	end := startGRPC(l, nil)
	defer end()
	t := throughput{row: rowGRPC, curve: classical, how: logged, units: grpcCalls, per: 1, each: time.Microsecond, prepare: prepareStreams(1, grpcAtATime, grpcQuestion())}
	for _, kind := range []*proxyKind{kindNarthexHTTP, kindNginxHTTP, kindHAProxyHTTP} {
		t.kinds = append(t.kinds, kind.withGRPC(l.Addr().String()))
	}
	return t.run(ctx, b)
}

// The proxies beside the callers.
var (
	kindNarthexOutbound = &proxyKind{name: ours, files: []string{"narthex-outbound.yaml", "narthex-outbound-rules.yaml"}, command: kindNarthex.command}
	kindHAProxyOutbound = &proxyKind{name: haproxy, files: []string{"haproxy-outbound.cfg"}, command: kindHAProxy.command}
)

// grpcWay is a way from a client of gRPC to a service.
type grpcWay struct {
	side    string
	ends    []*process // the service and the client
	proxies []*process // between them: the inbound and the outbound one, or none
	client  *grpcClient
}

// measureGRPCBoth measures all there is between a client and a service, both
// included.
func measureGRPCBoth(ctx context.Context, b *bench) error {
	var ways []*grpcWay
	defer func() {
		for _, w := range ways {
			w.end()
		}
	}()
	for _, side := range []struct{ out, in *proxyKind }{{kindNarthexOutbound, kindNarthexHTTP}, {kindHAProxyOutbound, kindHAProxyHTTP}, {}} {
		w := &grpcWay{side: grpcGo}
		if side.out != nil {
			w.side = side.out.name
		}
		if !b.measures(w.side) {
			continue
		}
		ways = append(ways, w)
		if err := w.start(ctx, b, side.out, side.in); err != nil {
			return w.complain(err)
		}
	}
	n := b.scaled(grpcCalls)
	for _, w := range ways { // warm
		if _, err := w.client.call(n/5, grpcAtATime); err != nil {
			return w.complain(err)
		}
	}
	return b.rounds(ctx, len(ways), func(side int) error {
		return ways[side].complain(ways[side].measure(ctx, b, n))
	})
}

// start starts all processes. Without proxies the client speaks TLS with the
// service.
func (w *grpcWay) start(ctx context.Context, b *bench, out, in *proxyKind) error {
	address, err := b.startGRPCService(w, out == nil)
	if err != nil {
		return err
	}
	if out != nil {
		inbound, err := b.startProxy(ctx, in.withGRPC(address), logged, tls.X25519)
		if err != nil {
			return err
		}
		w.proxies = append(w.proxies, inbound.process)
		kind := *out
		kind.behind = inbound.values.Listen
		outbound, err := b.launchProxy(&kind, logged)
		if err != nil {
			return err
		}
		w.proxies = append(w.proxies, outbound.process)
		address = outbound.values.Listen
	}
	return b.startGRPCClient(ctx, w, address, out == nil)
}

// measure makes n calls.
func (w *grpcWay) measure(ctx context.Context, b *bench, n int) error {
	var p99 float64
	used, err := cpuOf(ctx, func() (err error) {
		p99, err = w.client.call(n, grpcAtATime)
		return err
	}, w.ends, w.proxies)
	if err != nil {
		return err
	}
	ends, proxies := microseconds(used[0])/float64(n), microseconds(used[1])/float64(n)
	b.results.add(rowGRPCBoth, w.side, ends+proxies)
	b.p99.add(rowGRPCBoth, w.side, p99)
	if len(w.proxies) > 0 {
		b.results.add(rowGRPCProxies, w.side, proxies)
	}
	return nil
}

func (w *grpcWay) end() {
	if w.client != nil {
		w.client.end()
	}
	for _, p := range slices.Concat(w.ends, w.proxies) {
		p.stop()
	}
}

// complain says what the processes said when something has failed.
func (w *grpcWay) complain(err error) error {
	if err == nil {
		return nil
	}
	errs := []error{fmt.Errorf("%s: %w", w.side, err)}
	for _, p := range slices.Concat(w.ends, w.proxies) {
		errs = append(errs, fmt.Errorf("%s said:\n%s", filepath.Base(p.cmd.Path), p.said()))
	}
	return errors.Join(errs...)
}

// startGRPCService starts a service in a process of its own and returns its
// address. The client waits until it is there.
func (b *bench) startGRPCService(w *grpcWay, secure bool) (string, error) {
	port, err := b.freePort()
	if err != nil {
		return "", err
	}
	address := net.JoinHostPort("127.0.0.1", itoa(port))
	cmd, log, err := b.grpcPeer(roleService, address, secure)
	if err != nil {
		return "", err
	}
	p, err := b.keeper.start(cmd, log)
	if err != nil {
		return "", err
	}
	w.ends = append(w.ends, p)
	return address, nil
}

// grpcPeer returns the command that runs this program as one end of the calls,
// and the file for what it says.
func (b *bench) grpcPeer(role, address string, secure bool) (*exec.Cmd, string, error) {
	dir, err := b.folder()
	if err != nil {
		return nil, "", err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	cmd := exec.Command(program, role, address)
	if secure {
		cmd.Args = append(cmd.Args, b.certs())
	}
	return cmd, filepath.Join(dir, "output"), nil
}

// grpcClient is one in a process of its own.
type grpcClient struct {
	ask     *os.File // how many calls it shall make
	answers *os.File // what it has to say of them
	lines   *bufio.Reader
}

// startGRPCClient starts a client and has it make a call.
func (b *bench) startGRPCClient(ctx context.Context, w *grpcWay, address string, secure bool) error {
	cmd, log, err := b.grpcPeer(roleClient, address, secure)
	if err != nil {
		return err
	}
	in, ask, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	answers, out, err := os.Pipe()
	if err != nil {
		_ = ask.Close()
		return err
	}
	defer out.Close()
	w.client = &grpcClient{ask, answers, bufio.NewReader(answers)}
	cmd.Stdin, cmd.Stdout = in, out
	p, err := b.keeper.start(cmd, log)
	if err != nil {
		return err
	}
	w.ends = append(w.ends, p)
	_, err = w.client.call(1, 1)
	return errors.Join(err, ctx.Err())
}

// call has n calls made, so many at a time, and returns the 99th percentile of
// the µs that they took.
func (c *grpcClient) call(n, atATime int) (p99 float64, err error) {
	if _, err := fmt.Fprintln(c.ask, n, atATime); err != nil {
		return 0, err
	}
	_, err = fmt.Fscanln(c.lines, &p99)
	if err != nil {
		return 0, fmt.Errorf("the client of gRPC has not answered: %w", err)
	}
	return p99, nil
}

func (c *grpcClient) end() {
	_ = c.ask.Close()
	_ = c.answers.Close()
}
