package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

// The proxies that read HTTP. ghostunnel does not.
var (
	kindNarthexHTTP = &proxyKind{name: ours, files: []string{"narthex-http.yaml", "narthex-http-rules.yaml"}, command: kindNarthex.command, greet: greetHTTP}
	kindNginxHTTP   = &proxyKind{name: nginx, files: []string{"nginx-http.conf"}, command: kindNginx.command, greet: greetHTTP}
	kindHAProxyHTTP = &proxyKind{name: haproxy, files: []string{"haproxy-http.cfg"}, command: kindHAProxy.command, greet: greetHTTP}

	httpProxies = []*proxyKind{kindNarthexHTTP, kindNginxHTTP, kindHAProxyHTTP}
)

const (
	didRequests = "Keep-alive on both sides of the proxy. A request with seven fields of its own; narthex decides it by 21 rules on methods and paths, strips what says who calls, and sets the identity, where it comes from and the id; " +
		"nginx and haproxy choose by a pattern of the path and refuse other methods, set the identity and where it comes from, and pass the id on. Each writes a record of each request to a file (nginx and narthex many at a time, haproxy each by itself). Handshakes are not counted."
	didTransfer = "As above, 16 connections, HTTP/1.1 with Content-Length; nginx does not hold bodies back (proxy_request_buffering off) and puts none into files (proxy_max_temp_file_size 0), as none of the others does."
)

// The rows of requests.
var (
	rowRequests1 = &row{
		goes: "profile: half in read(2), write(2) and waiting in epoll, each of which a lone client pays in full: the runtime's scheduler wakes a second thread for most of them.",
		id:   "http-1", title: "HTTP/1.1 request, 1 KiB back, 1 connection", unit: "µs CPU", target: target{bound: 1, against: nginx}, did: didRequests,
	}
	rowRequests16 = &row{
		goes: "profile: half in read(2) and write(2), of which the peers make as many; AES and the parser 4 % each, the decision and the record 5 % each.",
		id:   "http-16", title: "the same, 16 connections", unit: "µs CPU", target: target{bound: 1, against: nginx}, did: "As above.",
	}
	rowRequests256 = &row{
		id: "http-256", title: "the same, 256 connections", unit: "µs CPU", target: target{bound: 1, against: nginx}, did: "As above.",
	}
	rowPosts = &row{
		id: "http-post", title: "HTTP/1.1 request with 1 KiB, 16 connections", unit: "µs CPU", target: target{bound: 1, against: nginx}, did: didTransfer,
	}
	rowDown64 = &row{
		id: "http-down-64k", title: "HTTP/1.1 response of 64 KiB", unit: "µs CPU", target: target{bound: 1, against: nginx}, did: didTransfer,
	}
	rowDown1M = &row{
		id: "http-down-1m", title: "HTTP/1.1 response of 1 MiB", unit: "µs CPU", target: target{bound: 1, against: nginx}, did: didTransfer,
	}
	rowUp64 = &row{
		id: "http-up-64k", title: "HTTP/1.1 request with 64 KiB", unit: "µs CPU", target: target{bound: 1, against: nginx}, did: didTransfer,
	}
	rowUp1M = &row{
		id: "http-up-1m", title: "HTTP/1.1 request with 1 MiB", unit: "µs CPU", target: target{bound: 1, against: nginx}, did: didTransfer,
	}
	rowIdleHTTP = &row{
		id: "http-idle", title: "idle keep-alive connection", unit: "KiB", target: target{bound: 16, absolute: true},
		did: "PSS with all connections open (handshake and one request, then 3 s of silence) less that without, 3 s after a start, by connection.",
	}
	rowLatencyHTTP = &row{
		goes: "as with messages: who waits for a core.",
		id:   "http-latency", title: "p99 added to a request, 2,000 a second", unit: "µs", target: target{bound: 1, against: nginx},
		did: "16 connections ask for 1 KiB at fixed times, one request at a time on each; 99th percentile of the time from when it was due to the whole answer, less that of requests straight to the backend in the same round.",
	}
)

// requests are the rows that count CPU time.
var requests = []throughput{
	{row: rowRequests1, units: 6_000, prepare: prepareRequests(1, 0, kib)},
	{row: rowRequests16, units: 32_000, prepare: prepareRequests(16, 0, kib)},
	{row: rowRequests256, units: 32_000, prepare: prepareRequests(256, 0, kib)},
	{row: rowPosts, units: 24_000, prepare: prepareRequests(16, kib, 0)},
	{row: rowDown64, units: 8_000, prepare: prepareRequests(16, 0, 64*kib)},
	{row: rowDown1M, units: 1_000, prepare: prepareRequests(16, 0, mib)},
	{row: rowUp64, units: 8_000, prepare: prepareRequests(16, 64*kib, 0)},
	{row: rowUp1M, units: 1_000, prepare: prepareRequests(16, mib, 0)},
}

func init() {
	for i := range requests {
		t := &requests[i]
		t.kinds, t.curve, t.how, t.per, t.each = httpProxies, classical, logged, 1, time.Microsecond
	}
}

// request is one that sends a body of up bytes, or asks for one of down bytes.
func request(up, down int) []byte {
	const fields = "Host: orders.example.org\r\nUser-Agent: narthex-bench/1.0\r\nAccept: application/json\r\nAccept-Encoding: gzip\r\n" +
		"Accept-Language: en\r\nCookie: session=0123456789abcdef; theme=dark\r\nX-Request-Id: 7f3c1a52-0d6e-4c1b-9a55-3c2f0c3a9d11\r\n"
	if up == 0 {
		return fmt.Appendf(nil, "GET /v19/items/%d HTTP/1.1\r\n%s\r\n", down, fields)
	}
	head := fmt.Appendf(nil, "PUT /v20/items/0 HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n", fields, up)
	return append(head, bytes.Repeat([]byte("y"), up)...)
}

// response is what the backend answers where size bytes are asked for.
func response(size int) []byte {
	head := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nServer: backend\r\nDate: Fri, 27 Nov 2026 12:00:00 GMT\r\nContent-Type: application/json\r\nCache-Control: no-store\r\nContent-Length: %d\r\n\r\n", size)
	return append(head, bytes.Repeat([]byte("x"), size)...)
}

// prepareRequests has requests made on some connections, one after another on
// each.
func prepareRequests(connections, up, down int) func(context.Context, client, int) (func() error, func(), error) {
	return func(ctx context.Context, c client, n int) (func() error, func(), error) {
		conns, end, err := c.hold(ctx, connections)
		if err != nil {
			return nil, nil, err
		}
		message := request(up, down)
		return func() error {
			g, ctx := errgroup.WithContext(ctx)
			for _, t := range conns {
				g.Go(func() error {
					buf := make([]byte, min(128*kib, down+4*kib))
					took := make([]float64, 0, n/connections)
					for range n / connections {
						begin := time.Now()
						if err := exchange(t, message, buf, down); err != nil {
							return err
						}
						took = append(took, microseconds(time.Since(begin)))
						if ctx.Err() != nil {
							return ctx.Err()
						}
					}
					c.took.add(took)
					return nil
				})
			}
			return g.Wait()
		}, end, nil
	}
}

var endOfHead = []byte("\r\n\r\n")

// exchange sends a request and reads its response, of which the body has size
// bytes.
func exchange(c net.Conn, message, buf []byte, size int) error {
	if _, err := c.Write(message); err != nil {
		return err
	}
	got, want := 0, -1
	for want < 0 || got < want {
		at := 0
		if want < 0 {
			at = got
		}
		n, err := c.Read(buf[at:])
		if n == 0 && err != nil {
			return err
		}
		if got += n; want >= 0 {
			continue
		}
		end := bytes.Index(buf[:got], endOfHead)
		if end < 0 && got == len(buf) {
			return fmt.Errorf("the head of the answer is larger than %d bytes", got)
		}
		if end >= 0 {
			want = end + len(endOfHead) + size
			if !bytes.HasPrefix(buf, []byte("HTTP/1.1 200 ")) {
				return fmt.Errorf("the answer is %q", buf[:min(got, 100)])
			}
		}
	}
	if got != want {
		return fmt.Errorf("the answer has %d bytes, not %d", got, want)
	}
	return nil
}

// greetHTTP makes one request.
func greetHTTP(c net.Conn) error { return exchange(c, request(0, kib), make([]byte, 4*kib), kib) }

// serveHTTP answers requests, of the first of which one byte was read.
func (b *backend) serveHTTP(c net.Conn, first byte) {
	r := bufio.NewReaderSize(io.MultiReader(bytes.NewReader([]byte{first}), c), chunk)
	if begin, err := r.Peek(3); err == nil && string(begin) == http2.ClientPreface[:3] {
		_ = serveH2(c, r) // whoever asked sees that it ended
		return
	}
	for {
		size, body, err := readRequest(r)
		if err != nil {
			return
		}
		if _, err := r.Discard(body); err != nil {
			return
		}
		if _, err := c.Write(b.responses[size]); err != nil {
			return
		}
	}
}

// readRequest reads a head and returns what is asked for and how much follows.
func readRequest(r *bufio.Reader) (size, body int, err error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return 0, 0, err
	}
	words := bytes.Fields(line)
	if len(words) != 3 {
		return 0, 0, errors.New("no request")
	}
	size, err = strconv.Atoi(string(words[1][bytes.LastIndexByte(words[1], '/')+1:]))
	for err == nil {
		if line, err = r.ReadSlice('\n'); err != nil || len(line) <= len("\r\n") {
			break
		}
		if name, value, ok := bytes.Cut(line, []byte(":")); ok && strings.EqualFold(string(name), "content-length") {
			body, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	return size, body, err
}

// measureIdleHTTP measures the memory of proxies by keep-alive connection.
func measureIdleHTTP(ctx context.Context, b *bench) error {
	return b.afresh(ctx, httpProxies, func(p *proxy) error {
		return b.holdIdleRequests(ctx, p, rowIdleHTTP, b.connections)
	})
}

// holdIdleRequests measures one proxy with n connections after one request
// each.
func (b *bench) holdIdleRequests(ctx context.Context, p *proxy, row *row, n int) error {
	if err := pause(ctx, silence); err != nil { // what only a start needs is given back by then
		return err
	}
	empty, err := memory(p.pid())
	if err != nil {
		return err
	}
	_, end, err := p.client.hold(ctx, n)
	if err != nil {
		return err
	}
	defer end()
	return b.idleOf(ctx, p, row, empty, n)
}

// afresh has the proxies of kinds take turns, a new process each time: what a
// connection once took is not given back by all.
func (b *bench) afresh(ctx context.Context, kinds []*proxyKind, measure func(*proxy) error) error {
	kinds = b.proxies(kinds)
	return b.rounds(ctx, len(kinds), func(side int) error {
		p, err := b.startProxy(ctx, kinds[side], logged, tls.X25519)
		if err != nil {
			return err
		}
		defer p.stop()
		return p.complain(measure(p))
	})
}

// measureLatencyHTTP measures what a proxy adds to the time a request takes.
func measureLatencyHTTP(ctx context.Context, b *bench) error {
	proxies, end, err := b.startProxies(ctx, b.proxies(httpProxies), logged, classical)
	if err != nil {
		return err
	}
	defer end()
	n := b.scaled(latencyMessages)
	round := 0
	return b.rounds(ctx, 1, func(int) error {
		first, err := b.directRequests(ctx, n)
		if err != nil {
			return err
		}
		added := map[string]float64{}
		round++
		for i := range proxies { // who begins changes
			p := proxies[(i+round)%len(proxies)]
			conns, end, err := p.client.hold(ctx, latencyConnections)
			if err != nil {
				return p.complain(err)
			}
			added[p.kind.name], err = requestLatency(ctx, asConns(conns), n)
			end()
			if err != nil {
				return p.complain(err)
			}
		}
		last, err := b.directRequests(ctx, n)
		if err != nil {
			return err
		}
		for side, p99 := range added {
			b.results.add(rowLatencyHTTP, side, p99-min(first, last))
		}
		return nil
	})
}

// directRequests is the latency of those straight to the backend.
func (b *bench) directRequests(ctx context.Context, n int) (float64, error) {
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for range latencyConnections {
		c, err := net.Dial("tcp", b.backend.address())
		if err != nil {
			return 0, err
		}
		conns = append(conns, c)
	}
	return requestLatency(ctx, conns, n)
}

// requestLatency makes n requests at latencyRate and returns the 99th percentile
// of the µs from the moment each was due to its answer.
func requestLatency(ctx context.Context, conns []net.Conn, n int) (float64, error) {
	each := n / len(conns)
	took := make([][]float64, len(conns))
	message := request(0, kib)
	g, ctx := errgroup.WithContext(ctx)
	begin := time.Now()
	for i, c := range conns {
		_ = c.SetDeadline(begin.Add(connectionTimeout))
		g.Go(func() error {
			buf := make([]byte, 4*kib)
			for k := range each {
				due := time.Duration(k*len(conns)+i) * time.Second / latencyRate
				if err := pause(ctx, due-time.Since(begin)); err != nil {
					return err
				}
				if err := exchange(c, message, buf, kib); err != nil {
					return err
				}
				took[i] = append(took[i], float64((time.Since(begin) - due).Microseconds()))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	var all []float64
	for _, list := range took {
		all = append(all, list...)
	}
	if len(all) == 0 {
		return 0, errors.New("no request was made")
	}
	return figures.Quantile(all, 0.99), nil
}
