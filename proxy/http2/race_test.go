package http2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/http"
	"runtime"
	"sync"
	"testing"

	"github.com/narthex-id/narthex/proxy/http1"
)

// link is two ends back to back, each with a goroutine that brings it what the
// other one sends.
type link struct {
	client, server *Conn
	over           chan struct{}
	work           sync.WaitGroup
	later          sync.WaitGroup // of those that reset streams
}

// wake is told that something may be there to be sent.
type wake chan struct{}

func (w wake) up() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// carry brings to one end what the other sends, in pieces of random sizes, until
// the link is over. Whoever makes something to send wakes it. Now and then it
// changes the windows of all streams.
func (l *link) carry(from, to *Conn, woken, other wake, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	var pending []byte
	for changes := 0; ; {
		for out := from.Take(); out != nil; out = from.Take() {
			pending = append(pending, withoutAcks(*out)...)
			from.Sent(out)
			from.Pump()
			if changes < 100 && r.IntN(4) == 0 {
				pending = append(pending, raw(settings, 0, 0, setting(setInitialWindow, uint32(r.IntN(FirstWindow))))...)
				pending = append(pending, raw(settings, 0, 0, setting(setInitialWindow, uint32(from.streamWindow())))...)
				changes++
			}
		}
		for end := 0; end < len(pending); {
			end = min(end+1+r.IntN(40_000), len(pending))
			n, _ := to.Receive(pending[:end])
			pending = pending[n:]
			end -= n
			other.up()
		}
		if from.Failed() != nil {
			to.Cut("the other end is gone")
		}
		select {
		case <-woken:
		case <-l.over:
			return
		}
	}
}

// withoutAcks leaves out acknowledgements of SETTINGS: they are of what carry has
// made up.
func withoutAcks(b []byte) []byte {
	acks := []byte(raw(settings, ack, 0, ""))
	var kept []byte
	if bytes.HasPrefix(b, []byte(Preface)) {
		kept, b = append(kept, Preface...), b[len(Preface):]
	}
	for len(b) > 0 {
		n := frameHead + int(uint32Of(b)>>8)
		if !bytes.Equal(b[:n], acks) {
			kept = append(kept, b[:n]...)
		}
		b = b[n:]
	}
	return kept
}

// job is one request, whose content comes back if nothing goes wrong.
type job struct {
	t    *testing.T
	l    *link
	up   wake
	size int
	kind int
	ends bool // it may break off, because the connection ends

	later sync.WaitGroup // goroutines that take content

	mu     sync.Mutex // guards the following
	s      *Stream
	left   []byte // of the request
	got    bytes.Buffer
	ended  bool
	broken *Error
	done   chan struct{}
}

// The ways in which a request goes.
const (
	plain    = iota // its content comes back
	trailing        // with trailers
	cancels         // the client resets it in the midst
	refused         // the server does
	slow            // the client takes content later, from another goroutine
	kinds
)

func content32(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

func (j *job) finish() {
	if !j.ended {
		j.ended = true
		close(j.done)
	}
}

func (j *job) Head(*http1.Parts, bool) {}

func (j *job) Data(b []byte, ended bool) int {
	if j.kind == slow {
		j.later.Go(func() {
			j.s.Held(j.take)
			j.up.up()
		})
		return 0
	}
	return j.take(b, ended)
}

func (j *job) take(b []byte, ended bool) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.got.Write(b)
	if ended {
		j.finish()
	}
	return len(b)
}

func (j *job) Trailers([]http1.Field) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.finish()
}

func (j *job) Room() { j.send() }

func (j *job) Ended(err *Error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.broken = err
	j.finish()
}

// send writes what there is room for, and the end with the last of it.
func (j *job) send() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.s == nil {
		return
	}
	n, err := j.s.Write(j.left, j.kind != trailing)
	if err != nil {
		return
	}
	if j.left = j.left[n:]; len(j.left) == 0 && j.kind == trailing {
		_ = j.s.Trailers([]http1.Field{{Name: "x-sum", Value: "1"}})
	}
	j.up.up()
}

// run makes the request and waits for its end.
func (j *job) run() {
	r := &http1.Request{}
	if err := r.Assemble(&http1.Parts{Method: "POST", Scheme: "http", Authority: "a", Path: fmt.Sprintf("/%d/%d", j.kind, j.size)}); err != nil {
		j.t.Error(err)
		return
	}
	j.mu.Lock()
	j.left = content32(j.size)
	s, err := j.l.client.Request(r, &http1.Edit{}, "http", false, j)
	j.s = s
	j.mu.Unlock()
	if err != nil {
		j.l.client.Unreserve()
		if !j.ends {
			j.t.Error(err)
		}
		return
	}
	j.send()
	if j.kind == cancels {
		s.Release(Cancel)
		j.up.up()
		return
	}
	<-j.done
	j.later.Wait()
	s.Release(Cancel)
	j.up.up()
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case j.kind == refused, j.broken != nil && j.ends:
	case j.broken != nil || !bytes.Equal(j.got.Bytes(), content32(j.size)):
		j.t.Errorf("stream %d: %d of %d bytes came back: %v", s.ID(), j.got.Len(), j.size, j.broken)
	}
}

// mirror is the server: it sends back what comes.
type mirror struct {
	up    wake
	later *sync.WaitGroup // goroutines that reset streams
}

func (m mirror) Settled() {}
func (m mirror) Leaving() {}

func (m mirror) Opened(s *Stream, p *http1.Parts, _ bool) {
	var kind, size int
	_, _ = fmt.Sscanf(p.Path, "/%d/%d", &kind, &size)
	e := &mirrored{mirror: m, s: s, kind: kind}
	s.Attend(e)
	_ = s.Answer(http.StatusOK, nil, false)
	if kind == refused && size%2 == 0 {
		s.Release(RefusedStream)
	}
}

type mirrored struct {
	mirror
	s    *Stream
	kind int
}

func (e *mirrored) Head(*http1.Parts, bool) {}

func (e *mirrored) Data(b []byte, ended bool) int {
	defer e.up.up()
	n, err := e.s.Write(b, ended)
	if err != nil {
		return len(b)
	}
	switch {
	case e.kind == refused:
		e.later.Go(func() { e.s.Release(Cancel) }) // while more comes
	case ended && n == len(b):
		e.s.Release(NoError)
	}
	return n
}

func (e *mirrored) Trailers(f []http1.Field) {
	_ = e.s.Trailers(f)
	e.s.Release(NoError)
	e.up.up()
}

func (e *mirrored) Room()        { e.s.Held(e.Data); e.up.up() }
func (e *mirrored) Ended(*Error) { e.s.Release(Cancel); e.up.up() }

// Many requests at a time over one connection: each comes back whole, and
// nothing of what they took is missing at the end.
func TestRaces(t *testing.T) {
	t.Parallel()
	l, up := newLink()
	race(t, l, up, false, nil)
	settled(t, l, up)
	l.close()
}

// However the connection ends within them, each is told so once.
func TestRacingEnds(t *testing.T) {
	t.Parallel()
	for _, ends := range []func(l *link){
		func(l *link) { l.server.Fail(broken(InternalError, "enough")) },
		func(l *link) { l.client.Fail(broken(InternalError, "enough")) },
		func(l *link) { l.client.Cut("the network is gone") },
		func(l *link) { l.server.Leave(false); l.server.Leave(true) },
	} {
		l, up := newLink()
		race(t, l, up, true, ends)
		l.client.Cut("it is over")
		l.server.Cut("it is over")
		for _, c := range []*Conn{l.client, l.server} {
			for c.Held() > 0 { // until who was told has let go of it
				runtime.Gosched()
			}
			if c.Open() != 0 {
				t.Errorf("%d streams are left", c.Open())
			}
		}
		l.close()
	}
}

func newLink() (l *link, up wake) {
	toServer, toClient := make(wake, 1), make(wake, 1)
	up = make(wake, 1) // whoever has something to send wakes both
	l = &link{over: make(chan struct{})}
	l.client = NewClient(Settings{}, mirror{up, &l.later})
	l.server = NewServer(Settings{MaxStreams: 64}, mirror{up, &l.later})
	l.work.Go(func() { l.carry(l.client, l.server, toServer, toClient, 1) })
	l.work.Go(func() { l.carry(l.server, l.client, toClient, toServer, 2) })
	l.work.Go(func() {
		for {
			select {
			case <-up:
				toServer.up()
				toClient.up()
			case <-l.over:
				return
			}
		}
	})
	return l, up
}

func (l *link) close() {
	close(l.over)
	l.work.Wait()
	l.later.Wait()
}

// race makes many requests. After a third of them the connection ends, if there
// is how.
func race(t *testing.T, l *link, up wake, ends bool, end func(*link)) {
	t.Helper()
	var jobs sync.WaitGroup
	places := make(chan struct{}, 32)
	for i := range 300 {
		if end != nil && i == 100 {
			jobs.Go(func() {
				end(l)
				up.up()
			})
		}
		places <- struct{}{}
		if !l.client.Reserve() {
			if !ends {
				t.Error("there is no place")
			}
			break
		}
		size := [...]int{0, 1, 100, 16 << 10, 16<<10 + 1, 100_000, 600_000}[i%7]
		j := &job{t: t, l: l, up: up, size: size, kind: i % kinds, ends: ends, done: make(chan struct{})}
		jobs.Go(func() {
			j.run()
			<-places
		})
	}
	jobs.Wait()
}

// settled waits until both ends have nothing left, and checks that nothing is
// missing.
func settled(t *testing.T, l *link, up wake) {
	t.Helper()
	for l.server.Held() > 0 || l.client.Held() > 0 || l.server.Pending() || l.client.Pending() {
		up.up()
		runtime.Gosched()
		if l.client.Failed() != nil || l.server.Failed() != nil {
			break
		}
	}
	for _, c := range []*Conn{l.client, l.server} {
		c.mu.Lock()
		if err := c.failed.Load(); err != nil {
			t.Errorf("the connection has ended: %v", err)
		}
		if len(c.streams) != 0 || c.held != 0 || c.waiting.size != 0 || c.recv+c.unacked != c.whole {
			t.Errorf("%d streams, %d held, %d waiting, window %d", len(c.streams), c.held, c.waiting.size, c.recv+c.unacked)
		}
		c.mu.Unlock()
	}
}
