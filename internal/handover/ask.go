package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
)

// ErrNobody is returned by Ask where no process listens: there is nobody to
// take over from.
var ErrNobody = errors.New("nobody to take over from")

// Takeover is what a running process has offered. End it with Close, whether
// or not Ready succeeded.
type Takeover struct {
	Version string // of the process that runs

	line    line
	sockets []Socket // without Listener: of another network
	taken   []int
}

// Ask connects to the process that listens at path and has it offer its
// sockets. Another new process that asked before is waited for; the one that
// wins is then the one that answers. Until Ready, closing the Takeover, or
// dying, changes nothing.
func Ask(ctx context.Context, path, version string) (*Takeover, error) {
	for tries := 3; ; tries-- {
		t, err := ask(ctx, path, version)
		// It died while we waited in its queue, perhaps killed to be replaced.
		if gone(err) && tries > 1 && ctx.Err() == nil {
			continue
		}
		if gone(err) {
			return nil, ErrNobody
		}
		return t, err
	}
}

// gone reports whether the other end went away without a word.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

func ask(ctx context.Context, path, version string) (_ *Takeover, err error) {
	dialled, err := (&net.Dialer{Timeout: stepTime}).DialContext(ctx, "unixpacket", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrNobody
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("ask the running process for its sockets at %s: not allowed; start this one as the user of that one, or as root: %w", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("ask the running process for its sockets at %s: %w", path, err)
	}
	conn := dialled.(*net.UnixConn)
	t := &Takeover{line: line{conn}}
	defer func() {
		if err != nil {
			t.Close()
			err = fmt.Errorf("take over from the process that listens at %s: %w", path, explain(err))
		}
	}()
	if err := trusted(conn); err != nil {
		return nil, err
	}
	if err := t.line.send(message{Step: stepHello, Version: version}, nil); err != nil {
		return nil, err
	}
	// Others may be before us, each with all the time there is.
	until := time.Now().Add(2 * ReadyTime)
	for {
		m, file, err := t.line.receive(ctx, until, true)
		if err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			if file != nil {
				_ = file.Close()
			}
			return nil, ctx.Err()
		}
		switch m.Step {
		case stepOffered:
			t.Version = m.Version
			return t, nil
		case stepSocket:
			if err := t.receive(*m.Socket, file); err != nil {
				return nil, err
			}
		default:
			return nil, fmt.Errorf("%s in place of its sockets", m.Step)
		}
		until = time.Now().Add(stepTime)
	}
}

func (t *Takeover) receive(s Socket, file *os.File) error {
	defer file.Close()
	if len(t.sockets) == maxSockets {
		return fmt.Errorf("it offers more than %d sockets", maxSockets)
	}
	l, err := net.FileListener(file)
	if err != nil {
		return fmt.Errorf("socket %s: %w", s.Bind, err)
	}
	here, err := ofThisNetwork(l)
	if err != nil || !here {
		_ = l.Close()
	} else {
		s.Listener = l
	}
	if err != nil {
		return fmt.Errorf("socket %s: %w", s.Bind, err)
	}
	t.sockets = append(t.sockets, s) // in any case: `ready` names them by their places
	return nil
}

// Serving reports whether the process that runs could serve a socket of that
// kind when it was asked.
func (t *Takeover) Serving(kind Kind) bool {
	return slices.ContainsFunc(t.sockets, func(s Socket) bool { return s.Kind == kind && s.Serving })
}

// Elsewhere returns the addresses of the sockets that belong to another network
// namespace: they stay the old process's.
func (t *Takeover) Elsewhere() []string {
	var binds []string
	for _, s := range t.sockets {
		if s.Listener == nil {
			binds = append(binds, s.Bind)
		}
	}
	return binds
}

// Take returns the socket of that kind and address, or nil where there is none
// or it was taken before. Of several with one address (a port that the kernel
// chose) it is the one of that name.
func (t *Takeover) Take(kind Kind, name, bind string) *Socket {
	best := -1
	for i, s := range t.sockets {
		if s.Listener == nil || s.Kind != kind || s.Bind != bind || slices.Contains(t.taken, i) {
			continue
		}
		if s.Name == name {
			best = i
			break
		}
		if best < 0 {
			best = i
		}
	}
	if best < 0 {
		return nil
	}
	t.taken = append(t.taken, best)
	return &t.sockets[best]
}

// Control returns the socket on which a hand-over is asked for, as Take does.
func (t *Takeover) Control(path string) *net.UnixListener {
	if path == "" {
		path = "-"
	}
	s := t.Take(Control, "", path)
	if s == nil {
		return nil
	}
	u, ok := s.Listener.(*net.UnixListener)
	if !ok {
		return nil
	}
	return u
}

// Taken returns what was taken.
func (t *Takeover) Taken() []Socket {
	var out []Socket
	for _, i := range t.taken {
		out = append(out, t.sockets[i])
	}
	return out
}

// Ready says that this process could begin, and waits until the old one has
// let go: with a nil error what was taken is ours, with any other it stays
// the old one's. An old process that has died meanwhile had let go.
func (t *Takeover) Ready(ctx context.Context) error {
	if ctx.Err() != nil {
		return ctx.Err() // nothing has changed yet
	}
	err := t.line.send(message{Step: stepReady, Taken: t.taken}, nil)
	var answer *message
	if err == nil || gone(err) { // what it said before it went is still there
		answer, _, err = t.line.receive(ctx, time.Now().Add(LetGoTime+stepTime), false)
	}
	switch {
	case gone(err):
		return nil
	case err != nil && ctx.Err() != nil:
		err = ctx.Err()
	case err == nil && answer.Step != stepYours:
		err = fmt.Errorf("%s in place of letting go", answer.Step)
	}
	if err != nil {
		return fmt.Errorf("take over: %w", explain(err))
	}
	return nil
}

// Begun says, after Ready, that this process serves and that whoever looks
// after it knows of it, so that the old one may end. It has BegunTime.
func (t *Takeover) Begun() {
	_ = t.line.send(message{Step: stepBegun}, nil) // an old process that has gone needs no leave
}

// Live calls each with the connections that the old process still has, by
// listener, whenever it hears of them, and with nil in the end: when it has
// none, or ctx ends.
func (t *Takeover) Live(ctx context.Context, each func(map[string]int)) {
	defer each(nil)
	for ctx.Err() == nil {
		m, _, err := t.line.receive(ctx, time.Now().Add(10*reportEvery), false)
		if err != nil || m.Step != stepLive {
			return
		}
		each(m.Live)
	}
}

// Close ends the talk, and closes the sockets that were not taken.
func (t *Takeover) Close() {
	_ = t.line.conn.Close()
	t.CloseUnused()
}

// CloseUnused closes the sockets that were not taken.
func (t *Takeover) CloseUnused() {
	for i, s := range t.sockets {
		if s.Listener != nil && !slices.Contains(t.taken, i) {
			_ = s.Listener.Close()
		}
	}
}

// Abandon closes everything: for a process that will not take over after all.
func (t *Takeover) Abandon() {
	t.taken = nil
	t.Close()
}

// Served reports whether a process listens at path, without asking it for
// anything.
func Served(path string) bool {
	conn, err := net.DialTimeout("unixpacket", path, stepTime)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}
