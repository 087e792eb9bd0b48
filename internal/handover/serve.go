package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// Giver is the process that may be asked for its sockets.
type Giver interface {
	// Offer returns the sockets. Until Keep or Give is called none of them
	// may be closed, and none removed from its path.
	Offer() ([]Socket, error)
	// Keep is called when nobody took over after all: everything goes on.
	Keep()
	// LetGo is called when the new process could begin, before it is told that
	// the sockets of taken are its own. When it returns, everything is free
	// that only one process can have at a time. After an error, which the new
	// process is told, Keep is called. It has LetGoTime.
	LetGo(ctx context.Context, taken []Socket) error
	// Give is called when another process serves the sockets of taken: it
	// stops accepting, and leaves their paths where they are.
	Give(taken []Socket)
	// Begun is called after Give, with whether the new process said that it
	// has begun. One that did not say so has failed, or is slow: where the
	// giver finds that it can go on in its place, it returns true, and it is
	// as if nobody had asked.
	Begun(ok bool) (goesOn bool)
	// Live returns the connections that are left, by listener, once the
	// sockets were given; nil when there are none.
	Live() map[string]int
}

// Config is what Serve works with.
type Config struct {
	Listener *net.UnixListener // of Listen, or handed over
	Path     string            // which it was made for; empty: a socket without a name
	Owned    bool              // Path is removed at the end
	Version  string            // of this program, for the other's log
	Giver    Giver
	Log      hclog.Logger
}

// Listen makes the socket on which a new process asks: for our own user (and
// root) alone. One that nobody serves is replaced.
func Listen(path string) (*net.UnixListener, error) {
	if err := makeDir(path); err != nil {
		return nil, fmt.Errorf("listen for a hand-over on %s: %w", path, err)
	}
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("listen for a hand-over on %s: %w", path, err)
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// bind(2) gives the file the socket's mode: it is never open to others.
		var chmodErr error
		if err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmodErr
	}}
	l, err := lc.Listen(context.Background(), "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("listen for a hand-over on %s: %w; let the user of this process write to %s", path, err, filepath.Dir(path))
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	return u, nil
}

// makeDir makes the directory of a file, for our own user alone.
func makeDir(file string) error {
	dir := filepath.Dir(file)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; make %s, writable for the user of this process", err, filepath.Dir(dir))
	}
	return nil
}

// removeStale removes a socket that a process left behind when it died.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("a file is there that is no socket: remove it, or name another path")
	}
	c, err := net.DialTimeout("unixpacket", path, time.Second)
	if err == nil {
		_ = c.Close()
		return errors.New("another process listens there: name another path")
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("cannot tell whether the socket that is there is served: %w", err)
	}
	return os.Remove(path)
}

// Serve answers those who ask, one after the other, until ctx ends or one of
// them has taken over; then it reports the live connections to that one until
// there are none, or ctx ends. It closes the listener.
func Serve(ctx context.Context, c Config) (given bool, err error) {
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	own, _ := os.Lstat(c.Path)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		_ = c.Listener.SetDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-stopped
		}
		_ = c.Listener.Close()
		if now, statErr := os.Lstat(c.Path); !given && c.Owned && statErr == nil && own != nil && os.SameFile(own, now) {
			_ = os.Remove(c.Path)
		}
	}()
	for pause := time.Duration(0); ; {
		conn, err := c.Listener.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close()
			}
			return false, nil
		case errors.Is(err, net.ErrClosed):
			return false, fmt.Errorf("accept on the hand-over socket: %w", err)
		case err != nil: // out of files: that passes
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			c.Log.Warn("cannot accept on the hand-over socket", "error", err, "retry_in", pause)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		if c.answer(ctx, conn) {
			return true, nil
		}
	}
}

// answer goes through the protocol with one that asks, and reports whether it
// took over.
func (c *Config) answer(ctx context.Context, conn *net.UnixConn) (given bool) {
	defer conn.Close()
	l := line{conn}
	sockets, taken, theirs, err := c.give(ctx, l)
	if errors.Is(err, errNoQuestion) {
		return false
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errors.New("it is shutting down")
		}
		c.Log.Warn("no hand-over: this process goes on", "error", err)
		var said *refusedError
		if !errors.As(err, &said) {
			_ = l.send(message{Step: stepRefused, Reason: err.Error()}, nil)
			// What it has sent and nobody has read would reset the connection,
			// and the reason be lost with it, also where ctx has ended.
			_, _, _ = l.receive(context.WithoutCancel(ctx), time.Now().Add(refusedTime), false)
		}
		return false
	}
	c.Log.Info("handed over to a new process: accepting no more", "version", theirs, "sockets", len(taken), "of", len(sockets))
	// A service manager must hear of the new process before it sees the old
	// one end. One that died instead of saying so has nothing to add.
	begun, _, err := l.receive(ctx, time.Now().Add(BegunTime), false)
	if err == nil && begun.Step != stepBegun {
		err = fmt.Errorf("%s in place of begun", begun.Step)
	}
	if c.Giver.Begun(err == nil) {
		c.Log.Warn("the new process took over and did not begin: this process goes on", "error", explain(err))
		return false
	}
	c.report(ctx, l)
	return true
}

// refusedTime is how long one that is refused has to read why.
const refusedTime = time.Second

// errNoQuestion is of one that connected and went away: it only looked whether
// anybody is here.
var errNoQuestion = errors.New("nothing was asked")

// give is everything up to `yours`. When it returns nil the giver has given.
func (c *Config) give(ctx context.Context, l line) (sockets, taken []Socket, theirs string, err error) {
	if err := trusted(l.conn); err != nil {
		return nil, nil, "", err
	}
	hello, _, err := l.receive(ctx, time.Now().Add(stepTime), false)
	if gone(err) {
		return nil, nil, "", errNoQuestion
	}
	if err == nil && hello.Step != stepHello {
		err = fmt.Errorf("%s in place of hello", hello.Step)
	}
	if err != nil {
		return nil, nil, "", fmt.Errorf("wait for hello: %w", explain(err))
	}
	c.Log.Info("a new process asks to take over", "version", hello.Version)
	if sockets, err = c.Giver.Offer(); err != nil {
		return nil, nil, "", err
	}
	kept := true
	defer func() {
		if kept {
			c.Giver.Keep()
		}
	}()
	offered, err := c.offer(l, sockets)
	if err != nil {
		return nil, nil, "", err
	}
	ready, _, err := l.receive(ctx, time.Now().Add(ReadyTime), false)
	if err == nil && ready.Step != stepReady {
		err = fmt.Errorf("%s in place of ready", ready.Step)
	}
	if err != nil {
		return nil, nil, "", fmt.Errorf("wait until it is ready: %w", explain(err))
	}
	for _, i := range ready.Taken {
		if i >= len(offered) {
			return nil, nil, "", fmt.Errorf("it takes socket %d of %d", i, len(offered))
		}
		taken = append(taken, offered[i])
	}
	within, cancel := context.WithTimeout(ctx, LetGoTime)
	defer cancel()
	if err := c.Giver.LetGo(within, taken); err != nil {
		return nil, nil, "", err
	}
	// From here on the new process may believe that it has our place: an
	// answer that arrived is kept to.
	if err := l.send(message{Step: stepYours}, nil); err != nil {
		return nil, nil, "", explain(err)
	}
	kept = false
	c.Giver.Give(taken)
	return offered, taken, hello.Version, nil
}

// offer sends the sockets, our own among them, and returns them in the order in
// which they were sent.
func (c *Config) offer(l line, sockets []Socket) ([]Socket, error) {
	offered := append(sockets[:len(sockets):len(sockets)], Socket{Kind: Control, Bind: c.Path, Owned: c.Owned, Serving: true, Listener: c.Listener})
	if len(offered) > maxSockets {
		return nil, fmt.Errorf("%d sockets are more than the %d that can be handed over", len(offered), maxSockets)
	}
	for i := range offered {
		s := &offered[i]
		if c.Path == "" && s.Kind == Control {
			s.Bind = "-"
		}
		if err := l.send(message{Step: stepSocket, Socket: s}, s.Listener); err != nil {
			return nil, fmt.Errorf("send socket %s: %w", s.Bind, explain(err))
		}
	}
	if err := l.send(message{Step: stepOffered, Version: c.Version}, nil); err != nil {
		return nil, explain(err)
	}
	return offered, nil
}

// reportEvery is how often the new process is told what the old one still has.
const reportEvery = time.Second

// report tells the new process of the connections that are left, so that its
// limits count them. A new process that has gone away is nobody to tell.
func (c *Config) report(ctx context.Context, l line) {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		live := c.Giver.Live()
		if len(live) == 0 || l.send(message{Step: stepLive, Live: live}, nil) != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// explain says of a connection that ended what that means.
func explain(err error) error {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("the other process is gone: %w", err)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("the other process took too long: %w", err)
	}
	return err
}
