package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// half is one of the halves of `narthex run`: the process that serves, and
// those before it that drain.
type half struct {
	child                  // as it is started
	peer  *os.File         // how a process that takes another's place reaches it; nil: they are not there at one time
	heard func(say string) // what the process that serves says of itself
	log   hclog.Logger

	hangups  chan struct{}    // of one: reload
	replaces chan replacement // start another image in the place of this one
	aborts   chan struct{}    // of one: it has stopped working
}

// replacement is a request to go on with another program.
type replacement struct {
	image *image
	done  chan<- error // nil: that is what runs now. Else nothing has changed
}

func newHalf(c child, image *image, log hclog.Logger) *half {
	c.image = image
	return &half{
		child: c, log: log, heard: func(string) {},
		hangups: make(chan struct{}, 1), replaces: make(chan replacement), aborts: make(chan struct{}, 1),
	}
}

// Supervision: a child that ends too soon after the first start tells of a
// mistake that a restart does not mend.
const (
	soon        = 3 * time.Second
	restartMin  = time.Second
	restartMax  = 30 * time.Second
	restartGood = time.Minute // after which the back-off starts anew
)

var errEndedEarly = errors.New("ended right after it was started: mend what it said above")

// process is one process of a half.
type process struct {
	started time.Time
	hangup  chan struct{} // of one
	end     func()        // has it end
	abort   func()        // has it say where it is, and end
	took    chan struct{} // closed: it took the place of the one before it
	ready   chan struct{} // closed: it serves
	exited  chan struct{} // closed: it is gone, and err says how
	err     error
}

// startedState is heard of a half when a process of it is started.
const startedState = "X_NARTHEX_STARTED"

// start starts a process from an image, with further files.
func (h *half) start(ctx, kill context.Context, from *image, files map[string]*os.File) *process {
	h.heard(startedState)
	select {
	case <-h.aborts: // was meant for the one before
	default:
	}
	ctx, cancel := context.WithCancel(ctx)
	aborted := make(chan struct{})
	p := &process{
		started: time.Now(), hangup: make(chan struct{}, 1), end: cancel, abort: sync.OnceFunc(func() { close(aborted) }),
		took: make(chan struct{}), ready: make(chan struct{}), exited: make(chan struct{}),
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		p.err = fmt.Errorf("start %s: %w", h.name, err)
		cancel()
		close(p.exited)
		return p
	}
	c := h.child
	c.image, c.abort, c.begun = from, aborted, func() { _ = writer.Close() }
	c.files = maps.Clone(c.files)
	maps.Copy(c.files, files)
	c.files[notifyName] = writer
	var listening sync.WaitGroup
	listening.Go(func() { h.listen(p, reader) })
	go func() { // whoever started it waits for exited
		defer close(p.exited)
		p.err = c.run(ctx, kill, p.hangup)
		cancel()
		_ = reader.SetReadDeadline(time.Now().Add(killAfter)) // a child of its own may have the other end
		listening.Wait()
		_ = reader.Close()
	}()
	return p
}

// listen hears what the process says of itself until it is gone.
func (h *half) listen(p *process, from *os.File) {
	took, ready := sync.OnceFunc(func() { close(p.took) }), sync.OnceFunc(func() { close(p.ready) })
	lines := bufio.NewScanner(from)
	lines.Buffer(make([]byte, 0, 1024), 4096) // whoever says more is not heard any more
	for lines.Scan() {
		switch line := lines.Text(); line {
		case tookOverState:
			took()
		default:
			if line == "READY=1" {
				ready()
			}
			h.heard(line)
		}
	}
}

// keepRunning starts the half again whenever it ends, until ctx does, and
// waits for all of its processes.
func (h *half) keepRunning(ctx, kill context.Context) error {
	var draining sync.WaitGroup
	defer draining.Wait()
	defer func() { h.image.close() }()
	pause := restartMin
	now := h.start(ctx, kill, h.image, nil)
	for first := true; ; {
		select {
		case <-h.hangups:
			now.hangUp()
		case <-h.aborts:
			h.log.Error("a half has stopped to work and is ended", "half", h.name)
			now.abort()
		case want := <-h.replaces:
			now = h.replace(ctx, kill, now, want, &draining)
		case <-now.exited:
			if ctx.Err() != nil {
				return now.err
			}
			lived := time.Since(now.started)
			if first && lived < soon {
				return errors.Join(now.err, fmt.Errorf("%s %w", h.name, errEndedEarly))
			}
			if first = false; lived > restartGood {
				pause = restartMin
			}
			h.log.Error("a half has ended and is started again", "half", h.name, "error", now.err, "after", lived.Round(time.Millisecond), "restart_in", pause)
			if !h.wait(ctx, pause) {
				return nil
			}
			pause = min(2*pause, restartMax)
			now = h.start(ctx, kill, h.image, nil)
		}
	}
}

// wait waits before the half is started again. Requests to replace it meet
// nobody meanwhile.
func (h *half) wait(ctx context.Context, pause time.Duration) bool {
	for timer := time.After(pause); ; {
		select {
		case <-ctx.Done():
			return false
		case want := <-h.replaces:
			want.image.close()
			want.done <- fmt.Errorf("the %s is not running", h.name)
		case <-timer:
			return true
		}
	}
}

func (p *process) hangUp() {
	select {
	case p.hangup <- struct{}{}:
	default:
	}
}

// replace has another program take the place of the one that runs, and
// returns the process that serves then: where it fails, as good as the old one.
func (h *half) replace(ctx, kill context.Context, now *process, want replacement, draining *sync.WaitGroup) *process {
	var next *process
	var err error
	if h.peer != nil {
		next, err = h.takeOver(ctx, kill, now, want.image, draining)
	} else {
		next, err = h.restart(ctx, kill, now, want.image)
	}
	if err != nil {
		want.image.close()
	} else {
		h.image.close()
		h.image = want.image
	}
	want.done <- err
	return next
}

// takeOver starts the new process beside the old one, and lets the old one
// drain once the new one has its sockets.
func (h *half) takeOver(ctx, kill context.Context, now *process, from *image, draining *sync.WaitGroup) (*process, error) {
	next := h.start(ctx, kill, from, map[string]*os.File{controlPeerName: h.peer})
	limit := time.After(2 * readyWithin)
	died := now.exited
	for {
		select {
		case <-next.took:
			draining.Go(func() {
				<-now.exited
				if now.err != nil {
					h.log.Error("the process before it did not end well", "half", h.name, "error", now.err)
					return
				}
				h.log.Info("the process before it has drained and ended", "half", h.name)
			})
			return next, nil
		case <-next.exited:
			return now, errors.Join(next.err, fmt.Errorf("the new %s ended before it took over", h.name))
		case <-died: // it may have given its sockets first
			died = nil
			limit = time.After(killAfter)
		case <-limit:
			next.end()
			<-next.exited
			return now, fmt.Errorf("the new %s did not take over in time, and was ended", h.name)
		}
	}
}

// restart ends the old process and starts the new one, or the old program
// again when the new one ends at once.
func (h *half) restart(ctx, kill context.Context, now *process, from *image) (*process, error) {
	now.end()
	<-now.exited
	if ctx.Err() != nil {
		return now, ctx.Err()
	}
	next := h.start(ctx, kill, from, nil)
	select {
	case <-next.ready:
		return next, nil
	case <-time.After(soon):
		return next, nil
	case <-next.exited:
	}
	if ctx.Err() != nil {
		return next, ctx.Err()
	}
	err := errors.Join(next.err, fmt.Errorf("the new %s ended right after it was started: the old one is started again", h.name))
	return h.start(ctx, kill, h.image, nil), err
}
