package proxy

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/narthex-id/narthex/proxy/http2"
)

// This file is what the two ends of HTTP/2 have in common, the client's
// (front.go) and the service's (far.go): frames in and out of a socket. One
// goroutine reads, and never waits for a peer that reads slowly: what is sent
// leaves from whichever goroutine has something to say, as far as the socket
// takes it, and the rest from a goroutine that waits.

// mux is one connection that carries many requests.
type mux struct {
	h2    *http2.Conn
	in    intake
	spool *spool
	write func(b []byte) error // to the spool, through TLS where there is one
	flow  flow                 // counts what is sent

	// slow is told that so many bytes wait to be taken, and with 0 that none do.
	slow func(n int)
	// broke is told that nothing can be sent any more.
	broke func(err error)

	sending atomic.Bool    // somebody sends
	holds   atomic.Int32   // batches that send once, at their end
	senders sync.WaitGroup // goroutines that wait for a slow peer
	ends    atomic.Bool    // finish waits for who sends
	rested  chan struct{}  // who sent has ended, after ends was set

	mu      sync.Mutex // guards the following
	touched []*mux     // that are to send at the end of a batch
}

// spoolTo has the mux write to e without waiting.
func (m *mux) spoolTo(e end) {
	m.rested = make(chan struct{}, 1)
	t, ok := e.(*secured)
	if !ok {
		m.spool = newSpool(e)
		m.write = func(b []byte) error { _, err := m.spool.write(b); return err }
		return
	}
	m.spool = newSpool(t.wire.end)
	t.wire.cork.Lock()
	t.wire.spool = m.spool
	t.wire.cork.Unlock()
	m.write = func(b []byte) error {
		if len(b) <= maxPlaintext {
			_, err := t.Conn.Write(b)
			return err
		}
		return m.spool.together(func() error { _, err := t.Conn.Write(b); return err })
	}
}

// receive takes what was read, and sends what comes of it on this and on other
// connections. An error is the connection's end.
func (m *mux) receive() error {
	m.holds.Add(1)
	n, err := m.h2.Receive(m.in.b)
	m.in.take(n)
	m.letGo()
	m.flush()
	return err
}

// letGo ends a batch: what was touched within it sends. Until then nobody does,
// because who passes frames on has locked their stream, and what is sent may
// let others go on.
func (m *mux) letGo() {
	m.holds.Add(-1)
	m.mu.Lock()
	touched := m.touched
	m.touched = nil
	m.mu.Unlock()
	for _, other := range touched {
		other.flush()
	}
}

// touch has another connection send: at the end of the batch, while there is
// one of this connection.
func (m *mux) touch(other *mux) {
	if m.holds.Load() > 0 && m.defers(other) {
		return
	}
	other.flush()
}

func (m *mux) defers(other *mux) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.holds.Load() == 0 {
		return false
	}
	if !slices.Contains(m.touched, other) {
		m.touched = append(m.touched, other)
	}
	return true
}

// flush sends what is there to be sent, unless somebody is about to.
func (m *mux) flush() {
	for m.holds.Load() == 0 && (m.h2.Pending() || m.spool.pending() > 0) {
		if !m.sending.CompareAndSwap(false, true) {
			return // who sends looks again
		}
		if m.send() {
			return
		}
		m.rest()
	}
}

// rest lets others send.
func (m *mux) rest() {
	m.sending.Store(false)
	if m.ends.Load() {
		signal(m.rested)
	}
}

// finish sends what is left and waits for all who send; from then on nobody
// does.
func (m *mux) finish() {
	m.ends.Store(true)
	for !m.sending.CompareAndSwap(false, true) || m.send() {
		<-m.rested
	}
	m.senders.Wait()
}

// pump has streams go on that waited for room.
func (m *mux) pump() {
	m.holds.Add(1)
	m.h2.Pump()
	m.letGo()
}

// send sends until nothing is left, or the peer takes no more: then a goroutine
// goes on, and it reports true.
func (m *mux) send() (waits bool) {
	for {
		out := m.h2.Take()
		if out != nil {
			err := m.sendAll(*out)
			m.flow.add(len(*out))
			m.h2.Sent(out)
			if err != nil {
				m.broke(err)
				return false
			}
		}
		if n := m.spool.pending(); n > 0 {
			m.slow(n)
			m.senders.Add(1)
			go m.drain()
			return true
		}
		if out == nil {
			return false
		}
		m.pump()
	}
}

// sendAll writes b in pieces that fill TLS records.
func (m *mux) sendAll(b []byte) error {
	const most = 4 * maxPlaintext
	for len(b) > most {
		if err := m.write(b[:most]); err != nil {
			return err
		}
		b = b[most:]
	}
	return m.write(b)
}

// drain waits until the peer has taken what is there for it, and sends on.
func (m *mux) drain() {
	defer m.senders.Done()
	if err := m.spool.drain(); err != nil {
		m.slow(0)
		m.broke(err)
		m.rest()
		return
	}
	m.pump()
	if m.send() {
		return
	}
	m.slow(0)
	m.rest()
	m.flush()
}
