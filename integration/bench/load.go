package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// client makes load on one proxy. It is the same for all of them.
type client struct {
	address string
	config  *tls.Config
	greet   func(net.Conn) error // makes sure that the backend is there
	took    *waits               // of its requests; nil where nobody wants to know
}

// waits are times, in µs, that many goroutines measure.
type waits struct {
	mu   sync.Mutex // guards the following
	list []float64
}

// add adds to them, unless they are nil.
func (w *waits) add(list []float64) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.list = append(w.list, list...)
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// newClient returns a client that speaks TLS 1.3 with one key exchange. It asks
// for tickets or not, and takes none up. It does not verify the proxy: who is
// measured is at the other end.
func newClient(address string, certificate tls.Certificate, curve tls.CurveID, tickets bool) client {
	return client{address: address, greet: ping, config: &tls.Config{
		Certificates:           []tls.Certificate{certificate},
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       []tls.CurveID{curve},
		SessionTicketsDisabled: !tickets,
		ClientSessionCache:     forgetful{},
		InsecureSkipVerify:     true,
	}}
}

// forgetful is a session cache without sessions: a client with a cache says
// that it takes tickets (RFC 8446 §4.2.9).
type forgetful struct{}

// Get implements tls.ClientSessionCache.
func (forgetful) Get(string) (*tls.ClientSessionState, bool) { return nil, false }

// Put implements tls.ClientSessionCache.
func (forgetful) Put(string, *tls.ClientSessionState) {}

// A connection that takes longer than this, all its work included, is an
// error.
const connectionTimeout = 2 * time.Minute

// connect makes a connection and has one byte go to the backend and back: in
// TLS 1.3 the handshake ends for the client before the server has looked at
// its certificate.
func (c client) connect(ctx context.Context) (*tls.Conn, error) {
	var d net.Dialer
	raw, err := d.DialContext(ctx, "tcp", c.address)
	if err != nil {
		return nil, err
	}
	t := tls.Client(raw, c.config)
	err = raw.SetDeadline(time.Now().Add(connectionTimeout))
	if err == nil {
		err = t.HandshakeContext(ctx)
	}
	if err == nil {
		err = c.greet(t)
	}
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	return t, nil
}

// ping sends one byte to the backend and waits for it.
func ping(c net.Conn) error {
	b := [1]byte{opPing}
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	if b[0] != opPing {
		return fmt.Errorf("the backend answered %q", b[0])
	}
	return nil
}

// check makes sure that the proxy negotiates what all of them have to, and
// that it lets nobody in without a certificate.
func (c client) check(ctx context.Context) error {
	t, err := c.connect(ctx)
	if err != nil {
		return err
	}
	s := t.ConnectionState()
	_ = t.Close() // it has served
	if s.Version != tls.VersionTLS13 || s.CipherSuite != tls.TLS_AES_128_GCM_SHA256 || s.CurveID != c.config.CurvePreferences[0] {
		return fmt.Errorf("it negotiates %s, %s and %s", tls.VersionName(s.Version), tls.CipherSuiteName(s.CipherSuite), s.CurveID)
	}
	if want := c.config.NextProtos; len(want) > 0 && s.NegotiatedProtocol != want[0] {
		return fmt.Errorf("it speaks %q, not %s", s.NegotiatedProtocol, want[0])
	}
	stranger := c
	stranger.config = c.config.Clone()
	stranger.config.Certificates = nil
	if t, err := stranger.connect(ctx); err == nil {
		_ = t.Close()
		return errors.New("it lets clients without a certificate in")
	}
	return nil
}

// handshakes makes n connections, a few at a time, and closes each after one
// byte.
func (c client) handshakes(ctx context.Context, n int) error {
	return share(ctx, 8, n, func(ctx context.Context) error {
		t, err := c.connect(ctx)
		if err != nil {
			return err
		}
		_ = t.Close() // a proxy that has closed first is no error
		return nil
	})
}

// echoes has messages of size bytes go to the backend and back, n in all, on
// as many connections. Connecting is not part of it: the function returned
// is.
func (c client) echoes(ctx context.Context, connections, size, n int) (work func() error, end func(), err error) {
	conns, end, err := c.hold(ctx, connections)
	if err != nil {
		return nil, nil, err
	}
	for _, t := range conns {
		if _, err := t.Write([]byte{opEcho}); err != nil {
			end()
			return nil, nil, err
		}
	}
	each := n / connections
	return func() error {
		g, ctx := errgroup.WithContext(ctx)
		for _, t := range conns {
			g.Go(func() error {
				message := make([]byte, size)
				for range each {
					if _, err := t.Write(message); err != nil {
						return err
					}
					if _, err := io.ReadFull(t, message); err != nil {
						return err
					}
					if ctx.Err() != nil {
						return ctx.Err()
					}
				}
				return nil
			})
		}
		return g.Wait()
	}, end, nil
}

// bulk has bytes go one way, on as many connections. op is opSink (to the
// backend) or opSource. Connecting is not part of it: the function returned
// is.
func (c client) bulk(ctx context.Context, op byte, connections int, bytes uint64) (work func() error, end func(), err error) {
	conns, end, err := c.hold(ctx, connections)
	if err != nil {
		return nil, nil, err
	}
	return func() error {
		var g errgroup.Group
		for _, t := range conns {
			g.Go(func() error { return transfer(t, op, bytes/uint64(connections)) })
		}
		return g.Wait()
	}, end, nil
}

// transfer has n bytes go one way.
func transfer(t net.Conn, op byte, n uint64) error {
	if _, err := t.Write(binary.BigEndian.AppendUint64([]byte{op}, n)); err != nil {
		return err
	}
	buf := chunks.Get().(*[]byte)
	defer chunks.Put(buf)
	if op == opSource {
		return take(t, *buf, n)
	}
	if err := give(t, *buf, n); err != nil {
		return err
	}
	_, err := io.ReadFull(t, (*buf)[:1])
	return err
}

// hold makes n connections and keeps them until end is called.
func (c client) hold(ctx context.Context, n int) (conns []*tls.Conn, end func(), err error) {
	made := make(chan *tls.Conn, n)
	err = share(ctx, 16, n, func(ctx context.Context) error {
		t, err := c.connect(ctx)
		if err == nil {
			made <- t
		}
		return err
	})
	close(made)
	for t := range made {
		conns = append(conns, t)
	}
	// A connection whose bytes stall ends with the benchmark, too.
	stop := context.AfterFunc(ctx, func() { closeAll(conns) })
	end = func() { stop(); closeAll(conns) }
	if err != nil {
		end()
		return nil, nil, err
	}
	return conns, end, nil
}

func closeAll(conns []*tls.Conn) {
	for _, t := range conns {
		_ = t.NetConn().Close()
	}
}

// share does n times the same, by workers side by side. It ends with the
// first error.
func share(ctx context.Context, workers, n int, do func(context.Context) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for w := range workers {
		g.Go(func() error {
			for range (n + workers - 1 - w) / workers {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err := do(ctx); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// pause waits for d, or less when ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
