package telemetry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// accessFlush bounds how long a record waits in memory before it is
	// written.
	accessFlush = 200 * time.Millisecond
	// accessEarly is how much waits at most before it is written sooner.
	accessEarly = 32 << 10
	// accessKept is how large a buffer is kept: while CPUs are busy more than
	// that much waits before it is written.
	accessKept = 128 << 10
	// accessMost bounds what waits for a reader that has stalled.
	accessMost = 1 << 20
	// accessPatience is how long Close waits for such a reader.
	accessPatience = 5 * time.Second
)

// AccessLog writes records from a goroutine of its own. A caller appends to a
// buffer under a short lock and never waits for whoever reads the log: when
// the buffer is full because nobody reads, records are dropped and counted. The
// methods of a nil *AccessLog do nothing.
type AccessLog struct {
	append func(*Access, []byte) []byte
	early  chan struct{} // holds one token when much waits
	done   chan struct{}
	idle   chan struct{}

	mu      sync.Mutex // guards the following
	waiting []byte     // whole lines
	spare   []byte     // the other buffer, nil while it is written
	closed  bool
	dropped *Counter

	// The following belong to the writing goroutine.
	out  io.Writer
	torn bool  // a failure may have left part of a record behind
	err  error // the first failure to write; read after idle is closed
}

// NewAccessLog returns a log that writes to w in the given format, "json" or
// "text", and counts in m, which may be nil, what it had to drop. Close ends it.
func NewAccessLog(w io.Writer, format string, m *Metrics) (*AccessLog, error) {
	l := &AccessLog{
		out: w, early: make(chan struct{}, 1), done: make(chan struct{}), idle: make(chan struct{}), spare: []byte{},
		dropped: m.Counter("narthex_access_log_dropped_total", "Access records dropped: nobody read the log, or it could not be written.").With(),
	}
	switch format {
	case "json":
		l.append = (*Access).AppendJSON
	case "text":
		l.append = (*Access).AppendText
	default:
		return nil, fmt.Errorf("access log format %q: want json or text", format)
	}
	go l.writeLoop()
	return l, nil
}

// Write records a. It does not keep a, and does not wait.
func (l *AccessLog) Write(a *Access) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return
	case len(l.waiting) >= accessMost:
		l.dropped.Inc()
		return
	}
	l.waiting = append(l.append(a, l.waiting), '\n')
	if len(l.waiting) >= accessEarly {
		select {
		case l.early <- struct{}{}:
		default:
		}
	}
}

func (l *AccessLog) writeLoop() {
	defer close(l.idle)
	tick := time.NewTicker(accessFlush)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.flush()
		case <-l.early:
			l.flush()
		case <-l.done:
			l.flush()
			return
		}
	}
}

// flush writes what waits, outside of the lock.
func (l *AccessLog) flush() {
	l.mu.Lock()
	lines := l.waiting
	l.waiting, l.spare = l.spare, nil
	l.mu.Unlock()
	if len(lines) > 0 {
		l.write(lines)
	}
	if cap(lines) > accessKept {
		lines = nil // a burst is over: give its memory back
	}
	l.mu.Lock()
	l.spare = lines[:0]
	l.mu.Unlock()
}

func (l *AccessLog) write(lines []byte) {
	if l.torn {
		if _, err := l.out.Write([]byte{'\n'}); err != nil {
			l.failed(err, lines)
			return
		}
		l.torn = false
	}
	if n, err := l.out.Write(lines); err != nil {
		l.failed(err, lines[n:])
	}
}

func (l *AccessLog) failed(err error, lost []byte) {
	if l.err == nil {
		l.err = err
	}
	l.torn = true
	l.dropped.Add(uint64(bytes.Count(lost, []byte{'\n'})))
}

var (
	// ErrLogClosed is returned by a second Close.
	ErrLogClosed = errors.New("access log is closed")
	// ErrLogStalled is returned by Close when nobody reads the log.
	ErrLogStalled = errors.New("nobody reads the access log: its last records are lost")
)

// Close writes what waits, ends the writing goroutine and returns the first
// error met while writing. Records that come later are dropped. A reader that
// has stalled is waited for 5 s; the error is then ErrLogStalled, and the
// goroutine ends with its last write.
func (l *AccessLog) Close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrLogClosed
	}
	l.closed = true
	l.mu.Unlock()
	close(l.done)
	patience := time.NewTimer(accessPatience)
	defer patience.Stop()
	select {
	case <-l.idle:
	case <-patience.C:
		return ErrLogStalled
	}
	if l.err != nil {
		return fmt.Errorf("write access log: %w", l.err)
	}
	return nil
}
