package main

import (
	"context"
	"crypto/tls"
	"net"
	"time"
)

const (
	kib = 1024
	mib = 1024 * kib
)

// measureIdle measures the memory of proxies by connection. Each measurement
// has a fresh process: what a connection once took is not given back by all.
func measureIdle(ctx context.Context, b *bench) error {
	kinds := b.proxies(allProxies)
	return b.rounds(ctx, len(kinds), func(side int) error {
		p, err := b.startProxy(ctx, kinds[side], plainly, tls.X25519)
		if err != nil {
			return err
		}
		defer p.stop()
		return p.complain(b.holdIdle(ctx, p))
	})
}

// Silence after which memory is read: long enough for a proxy to notice that
// connections are idle, and to give back what it held for the busy.
const silence = 3 * time.Second

// holdIdle measures one proxy.
func (b *bench) holdIdle(ctx context.Context, p *proxy) error {
	if err := pause(ctx, 500*time.Millisecond); err != nil {
		return err
	}
	empty, err := memory(p.pid())
	if err != nil {
		return err
	}
	b.results.add(rowProxyRest, p.kind.name, empty/mib)

	conns, end, err := p.client.hold(ctx, b.connections)
	if err != nil {
		return err
	}
	defer end()
	byConnection := func(row *row) error {
		if err := pause(ctx, silence); err != nil {
			return err
		}
		full, err := memory(p.pid())
		if err == nil {
			b.results.add(row, p.kind.name, (full-empty)/kib/float64(len(conns)))
		}
		return err
	}
	if err := byConnection(rowIdle); err != nil {
		return err
	}
	turns := make(chan net.Conn, len(conns))
	for _, c := range conns {
		turns <- c
	}
	err = share(ctx, 16, len(conns), func(context.Context) error {
		c := <-turns
		if err := transfer(c, opSink, 64*kib); err != nil {
			return err
		}
		return transfer(c, opSource, 64*kib)
	})
	if err != nil {
		return err
	}
	return byConnection(rowIdleAfterBulk)
}
