package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"
)

// How many connections a proxy of this machine can hold: it has two sockets
// for each, and so has this process.
const manyConnections = 9000

// measureMany measures what a connection costs when there are few, and when
// there are many, and how long it takes to close those that new rules refuse.
func measureMany(ctx context.Context, b *bench) error {
	kinds := b.proxies([]*proxyKind{kindNarthex})
	return b.rounds(ctx, len(kinds), func(side int) error {
		p, err := b.startProxy(ctx, kinds[side], plainly, tls.X25519)
		if err != nil {
			return err
		}
		defer p.stop()
		return p.complain(b.holdMany(ctx, p))
	})
}

func (b *bench) holdMany(ctx context.Context, p *proxy) error {
	if err := pause(ctx, silence); err != nil {
		return err
	}
	empty, err := memory(p.pid())
	if err != nil {
		return err
	}
	held := 0
	for _, step := range []struct {
		row   *row
		holds int
	}{{rowIdle100, b.scaled(100)}, {rowIdle1000, b.scaled(1000)}, {rowIdle9000, b.scaled(manyConnections - refusedConnections)}} {
		_, end, err := p.client.hold(ctx, step.holds-held)
		if err != nil {
			return err
		}
		defer end()
		held = step.holds
		if step.row == rowIdle9000 {
			break
		}
		if err := b.idleOf(ctx, p, step.row, empty, held); err != nil {
			return err
		}
	}
	return b.refuseSome(ctx, p, empty, held)
}

// idleOf measures the memory by connection.
func (b *bench) idleOf(ctx context.Context, p *proxy, row *row, empty float64, held int) error {
	if err := pause(ctx, silence); err != nil {
		return err
	}
	full, err := memory(p.pid())
	if err == nil {
		b.results.add(row, p.kind.name, (full-empty)/kib/float64(held))
	}
	return err
}

// Of many connections so many are refused by new rules.
const refusedConnections = 1000

// refuseSome holds some more connections, of a client that new rules refuse,
// and measures how long it takes until the last of them has seen its end.
func (b *bench) refuseSome(ctx context.Context, p *proxy, empty float64, held int) error {
	other := newClient(p.client.address, b.other, tls.X25519, false)
	conns, end, err := other.hold(ctx, b.scaled(refusedConnections))
	if err != nil {
		return err
	}
	defer end()
	if err := b.idleOf(ctx, p, rowIdle9000, empty, held+len(conns)); err != nil {
		return err
	}
	if err := b.besideMany(ctx, p); err != nil {
		return err
	}
	last, err := closings(conns, func() error {
		if _, err := fill(p.dir, "narthex-rules.yaml", p.values.withoutOther()); err != nil {
			return err
		}
		return syscall.Kill(p.pid(), syscall.SIGHUP)
	})
	if err != nil {
		return err
	}
	b.results.add(rowRefuse, p.kind.name, float64(last.Microseconds())/1000)
	t, err := p.client.connect(ctx) // the others go on, and so do new ones
	if err != nil {
		return fmt.Errorf("after the new rules: %w", err)
	}
	return t.Close()
}

// besideMany measures handshakes and echoes beside connections that say
// nothing.
func (b *bench) besideMany(ctx context.Context, p *proxy) error {
	for _, t := range []throughput{throughputHandshakeBeside, throughputEchoBeside} {
		n := b.scaled(t.units)
		if _, err := t.work(ctx, p, n/5); err != nil {
			return err
		}
		used, err := t.work(ctx, p, n)
		if err != nil {
			return err
		}
		t.add(b, p, used, n)
	}
	return nil
}

// closings does what makes the other side close all conns, and returns how
// long after that the last of them was closed.
func closings(conns []*tls.Conn, do func() error) (time.Duration, error) {
	var reading sync.WaitGroup
	ends := make([]time.Time, len(conns))
	errs := make([]error, len(conns))
	for i, c := range conns {
		reading.Go(func() {
			raw := c.NetConn()
			_ = raw.SetReadDeadline(time.Now().Add(time.Minute))
			_, err := raw.Read(make([]byte, 1))
			ends[i] = time.Now()
			if !errors.Is(err, syscall.ECONNRESET) {
				errs[i] = errors.Join(errors.New("a connection that new rules refuse was not reset"), err)
			}
		})
	}
	if err := pause(context.Background(), finish); err != nil { // until all of them read
		return 0, err
	}
	begin := time.Now()
	if err := do(); err != nil {
		return 0, err
	}
	reading.Wait()
	var last time.Duration
	for _, end := range ends {
		last = max(last, end.Sub(begin))
	}
	return last, errors.Join(errs...)
}
