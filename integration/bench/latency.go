package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

// The rate of messages whose latency is measured. It is far from what any of
// the proxies can carry, so that it is theirs and not that of a queue.
const (
	latencyConnections = 16
	latencyRate        = 2000 // messages a second, on all connections
	latencyMessages    = 4000
)

// measureLatency measures what a proxy adds to the time a message takes there
// and back, against the way without a proxy in the same round.
func measureLatency(ctx context.Context, b *bench) error {
	proxies, end, err := b.startProxies(ctx, b.proxies(allProxies), plainly, classical)
	if err != nil {
		return err
	}
	defer end()
	n := b.scaled(latencyMessages)
	round := 0
	return b.rounds(ctx, 1, func(int) error {
		// The direct way comes twice, at the beginning and the end of a
		// round, and the smaller counts.
		first, err := b.directLatency(ctx, n)
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
			added[p.kind.name], err = latency(ctx, asConns(conns), n)
			end()
			if err != nil {
				return p.complain(err)
			}
		}
		last, err := b.directLatency(ctx, n)
		if err != nil {
			return err
		}
		for side, p99 := range added {
			b.results.add(rowLatency, side, p99-min(first, last))
		}
		return nil
	})
}

func asConns(list []*tls.Conn) []net.Conn {
	conns := make([]net.Conn, len(list))
	for i, c := range list {
		conns[i] = c
	}
	return conns
}

// directLatency is that of messages straight to the backend.
func (b *bench) directLatency(ctx context.Context, n int) (float64, error) {
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
	return latency(ctx, conns, n)
}

// latency sends n messages of 128 bytes at latencyRate, whether the ones
// before were answered or not, and returns the 99th percentile of the µs from
// the moment each was sent to its answer.
func latency(ctx context.Context, conns []net.Conn, n int) (float64, error) {
	each := n / len(conns)
	took := make([][]float64, len(conns))
	g, ctx := errgroup.WithContext(ctx)
	begin := time.Now()
	for i, c := range conns {
		if _, err := c.Write([]byte{opEcho}); err != nil {
			return 0, err
		}
		_ = c.SetDeadline(time.Now().Add(connectionTimeout))
		g.Go(func() error { return sendAtRate(ctx, c, begin, i, len(conns), each) })
		g.Go(func() error {
			message := make([]byte, 128)
			for range each {
				if _, err := io.ReadFull(c, message); err != nil {
					return err
				}
				sent := time.Duration(binary.BigEndian.Uint64(message))
				took[i] = append(took[i], float64((time.Since(begin) - sent).Microseconds()))
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
		return 0, errors.New("no message was sent")
	}
	return figures.Quantile(all, 0.99), nil
}

// sendAtRate sends each messages on c, the turn-th of so many connections that
// share the rate.
func sendAtRate(ctx context.Context, c net.Conn, begin time.Time, turn, of, each int) error {
	message := make([]byte, 128)
	for k := range each {
		due := time.Duration(k*of+turn) * time.Second / latencyRate
		if err := pause(ctx, due-time.Since(begin)); err != nil {
			return err
		}
		binary.BigEndian.PutUint64(message, uint64(time.Since(begin)))
		if _, err := c.Write(message); err != nil {
			return err
		}
	}
	return nil
}
