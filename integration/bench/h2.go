package main

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"
)

// withHTTP2 returns the kind with HTTP/2 in front of it, and behind it with
// either version.
func (k proxyKind) withHTTP2(h2c bool) *proxyKind {
	k.h2, k.h2c, k.greet = true, h2c, greetH2(h2Request(0, kib))
	return &k
}

// The proxies that speak HTTP/2 with clients: with the backend HTTP/1.1, or
// HTTP/2.
var (
	h2Proxies  = []*proxyKind{kindNarthexHTTP.withHTTP2(false), kindNginxHTTP.withHTTP2(false), kindHAProxyHTTP.withHTTP2(false)}
	h2cProxies = []*proxyKind{kindNarthexHTTP.withHTTP2(true), kindNginxHTTP.withHTTP2(true), kindHAProxyHTTP.withHTTP2(true)}
)

const (
	didH2 = "Requests, rules, fields set and records as in the rows of HTTP/1.1. The client speaks HTTP/2 over TLS (ALPN), the backend HTTP/1.1 on kept connections. The fields that do not change are in the table of both ends, the path and the request's id are literals. " +
		"The client's windows are so large that nobody waits for it; limits and windows of the proxies are their defaults."
	didH2C        = "As above with HTTP/2 in plaintext to the backend, which does the same for it: haproxy and narthex put many requests on a connection, nginx (grpc_pass, the only way it has) one at a time."
	didH2Transfer = "4 streams at a time on each of 4 connections."
)

// The rows of HTTP/2 that count CPU time, in the order of h2Loads.
var (
	h2Rows  = streamRows("h2", "HTTP/1.1", didH2, besideNginx)
	h2cRows = streamRows("h2-h2c", "h2c", didH2C, besideHAProxy)
)

// streamRows are those with one version behind.
func streamRows(id, behind, did string, t target) []*row {
	return []*row{
		{id: id + "-1x1", title: "HTTP/2 request, 1 KiB back, " + behind + " behind; 1 stream on 1 connection", unit: "µs CPU", target: t, did: did},
		{id: id + "-100x1", title: "the same, 100 streams at a time on 1 connection", unit: "µs CPU", target: t, did: "As above."},
		{id: id + "-1x100", title: "the same, 1 stream on each of 100 connections", unit: "µs CPU", target: t, did: "As above."},
		{id: id + "-post", title: "HTTP/2 request with 1 KiB, " + behind + " behind", unit: "µs CPU", target: t, did: didH2Transfer},
		{id: id + "-down-64k", title: "HTTP/2 response of 64 KiB, " + behind + " behind", unit: "µs CPU", target: t, did: didH2Transfer},
		{id: id + "-down-1m", title: "HTTP/2 response of 1 MiB, " + behind + " behind", unit: "µs CPU", target: t, did: didH2Transfer},
	}
}

var (
	besideNginx   = target{bound: 1.5, against: nginx}
	besideHAProxy = target{bound: 1, against: haproxy}
)

// The rows of HTTP/2's memory.
var (
	rowH2Idle = &row{
		id: "h2-idle", title: "idle HTTP/2 connection", unit: "KiB", target: target{bound: 24, absolute: true},
		did: "PSS with 2,000 connections open (handshake and one request, HTTP/1.1 behind, then 3 s of silence) less that without, 3 s after a start, by connection.",
	}
	rowH2Stream = &row{
		id: "h2-stream", title: "open HTTP/2 stream", unit: "KiB", target: target{bound: 8, absolute: true},
		did: "20 connections with 100 streams each, h2c behind, whose response has begun with 1 KiB and then stands still for 3 s: PSS less that of the same connections after one request, by stream.",
	}
)

// h2Loads are what the rows that count CPU time do.
var h2Loads = []struct {
	units, connections, streams int
	question                    *h2Question
}{
	{6_000, 1, 1, h2Request(0, kib)},
	{32_000, 1, 100, h2Request(0, kib)},
	{32_000, 100, 1, h2Request(0, kib)},
	{24_000, 4, 4, h2Request(kib, 0)},
	{8_000, 4, 4, h2Request(0, 64*kib)},
	{1_000, 4, 4, h2Request(0, mib)},
}

// The same with either version behind.
var (
	h2Throughputs  = loadStreams(h2Proxies, h2Rows)
	h2cThroughputs = loadStreams(h2cProxies, h2cRows)
)

// loadStreams puts each of h2Loads on proxies, for the row in its place.
func loadStreams(kinds []*proxyKind, rows []*row) (list []throughput) {
	for i, load := range h2Loads {
		list = append(list, throughput{
			row: rows[i], kinds: kinds, curve: classical, how: logged, units: load.units, per: 1, each: time.Microsecond,
			prepare: prepareStreams(load.connections, load.streams, load.question),
		})
	}
	return list
}

// prepareStreams has q asked on some connections, so many at a time on each.
func prepareStreams(connections, atATime int, q *h2Question) func(context.Context, client, int) (func() error, func(), error) {
	return func(ctx context.Context, c client, n int) (func() error, func(), error) {
		conns, end, err := c.holdH2(ctx, connections, q)
		if err != nil {
			return nil, nil, err
		}
		return func() error {
			var g errgroup.Group // end closes what they read when the context ends
			for _, h := range conns {
				g.Go(func() error {
					took, err := h.ask(q, n/connections, atATime)
					c.took.add(took)
					return err
				})
			}
			return g.Wait()
		}, end, nil
	}
}

// How many connections and streams hold the memory that is measured.
const (
	h2IdleConnections     = 2000
	h2StandingConnections = 20
	h2StandingStreams     = 100
)

// measureIdleH2 measures the memory of proxies by connection.
func measureIdleH2(ctx context.Context, b *bench) error {
	return b.afresh(ctx, h2Proxies, func(p *proxy) error {
		return b.holdIdleRequests(ctx, p, rowH2Idle, min(b.connections, h2IdleConnections))
	})
}

// measureStreams measures the memory of proxies by stream.
func measureStreams(ctx context.Context, b *bench) error {
	return b.afresh(ctx, h2cProxies, func(p *proxy) error {
		conns, end, err := p.client.holdH2(ctx, h2StandingConnections, h2Request(0, kib))
		if err != nil {
			return err
		}
		defer end()
		if err := pause(ctx, silence); err != nil {
			return err
		}
		before, err := memory(p.pid())
		if err != nil {
			return err
		}
		for _, h := range conns {
			if _, err := h.ask(h2Standing(), h2StandingStreams, h2StandingStreams); err != nil {
				return err
			}
		}
		return b.idleOf(ctx, p, rowH2Stream, before, len(conns)*h2StandingStreams)
	})
}
