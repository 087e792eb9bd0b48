package endpoint

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"

	"github.com/narthex-id/narthex/attestor"
)

// listener hands connections to gRPC as *conn, but for those of brokers, which
// are known after a handshake.
type listener struct {
	net.Listener
	server *Server
	gate   gate
}

// Accept returns the next connection. Its errors that pass (no file
// descriptor left, most of all) are told in the log and left to gRPC, which
// waits a little and tries again.
func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil && l.gate.wait() {
			continue
		}
		if err != nil {
			if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
				l.server.complain("cannot accept connections", "error", err, "hint", "raise the limit of open files (LimitNOFILE)")
			}
			return nil, err
		}
		if l.server.door != nil {
			return raw, nil
		}
		u, ok := raw.(*net.UnixConn)
		if !ok {
			return nil, errors.Join(errors.New("accept: not a unix socket"), raw.Close())
		}
		c, err := newConn(u, l.server.limits)
		if err != nil {
			l.server.complain("connection closed", "error", err)
			_ = raw.Close()
			continue
		}
		return c, nil
	}
}

// subject is what is attested, and the user whose limits that counts against: the
// process at the other end of a connection, or what a delegate or a broker names
// on its own.
type subject struct {
	process *attestor.Process // nil: an object, a broker, who is known by its SVID, or where a delegate gives selectors
	object  *attestor.Object  // of which the first attestation tells the UID
	user    *user             // nil on a connection over a limit
}

// conn is one connection, with the process that made it. It is what gRPC
// reads and writes, and the AuthInfo of the calls that arrive on it.
type conn struct {
	net.Conn
	limits *limiter

	// Set once by identify, before the first call.
	subject
	refusal error // the status all of its calls get, nil where there is a user

	// For ReadOnReady, which is used by one goroutine.
	raw   syscall.RawConn
	ready func(fd uintptr) bool
	read  struct {
		size int
		pool mem.BufferPool
		buf  *[]byte
		n    int
		err  error
	}

	mu      sync.Mutex // guards the following
	closed  bool
	counted bool                        // limits know of it
	ended   map[*countedStream]struct{} // calls that count on, as their answers are unread
}

func newConn(u *net.UnixConn, limits *limiter) (*conn, error) {
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: u, limits: limits, raw: raw}
	c.ready = c.readReady
	return c, nil
}

// identify pins the process at the other end and counts the connection
// against the limits of its user, or of its house. It belongs directly behind
// accept. After an error the caller closes the connection.
func (c *conn) identify(housing []attestor.Housing, now time.Time) error {
	process, err := attestor.PeerOf(c.Conn.(*net.UnixConn))
	if err != nil {
		return err
	}
	user, refusal, ok := c.limits.connect(originOf(process, housing), now)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counted = ok; !ok {
		return errors.Join(refusal, process.Close())
	}
	c.process, c.user, c.refusal = process, user, refusal
	if c.closed { // meanwhile: nobody will close it again
		c.forget()
		return net.ErrClosed
	}
	if refusal != nil {
		// The timer holds the connection for a few seconds more than its
		// peer may; refused connections are few.
		time.AfterFunc(refusedTime, func() { _ = c.Close() })
	}
	return nil
}

// Write hangs up on a client that does not read.
func (c *conn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.limits.Unread)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// Close closes the connection and lets its process go.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		c.forget()
	}
	return err
}

// forget is called with c.mu held.
func (c *conn) forget() {
	for s := range c.ended {
		s.release()
	}
	c.ended = nil
	if c.process != nil {
		_ = c.process.Close()
	}
	if c.counted {
		c.counted = false
		c.limits.disconnect(c.user)
	}
}

// AuthType implements credentials.AuthInfo.
func (*conn) AuthType() string { return "pinned-peer" }

// ReadOnReady reads up to size bytes into a buffer of the pool, and takes the
// buffer only when there is something to read. gRPC uses it where a
// connection has it (package readyreader), so that a silent connection holds
// no buffer.
func (c *conn) ReadOnReady(size int, pool mem.BufferPool) (*[]byte, int, error) {
	r := &c.read
	r.size, r.pool = size, pool
	err := c.raw.Read(c.ready)
	buf, n := r.buf, r.n
	err = errors.Join(err, r.err)
	r.buf, r.n, r.err = nil, 0, nil
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		if buf != nil {
			pool.Put(buf)
		}
		return nil, 0, err
	}
	return buf, n, nil
}

// readReady reads without blocking, and returns false where it has to wait.
func (c *conn) readReady(fd uintptr) bool {
	r := &c.read
	r.buf = r.pool.Get(r.size)
	for {
		// syscall and not x/sys: the race detector knows reads and writes
		// of package net by its annotations.
		r.n, r.err = syscall.Read(int(fd), *r.buf)
		if !errors.Is(r.err, syscall.EINTR) {
			break
		}
	}
	if r.err != nil {
		r.pool.Put(r.buf)
		r.buf, r.n = nil, 0
	}
	if errors.Is(r.err, syscall.EAGAIN) {
		r.err = nil
		return false
	}
	return true
}

// connOf returns the connection a call arrived on.
func connOf(ctx context.Context) *conn {
	p, _ := peer.FromContext(ctx)
	if b, ok := p.AuthInfo.(*brokerConn); ok {
		return &b.conn
	}
	return p.AuthInfo.(*conn) // all others come through peerCredentials
}

// peerCredentials has gRPC ask us who is at the other end of a connection.
// No byte is exchanged for it: the kernel knows.
type peerCredentials struct{ server *Server }

// ServerHandshake pins the process that made the connection.
func (p peerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c := raw.(*conn)
	if err := c.identify(p.server.housing, time.Now()); err != nil {
		p.server.complain("connection closed", "error", err)
		return nil, nil, err // gRPC closes raw
	}
	return c, c, nil
}

// ClientHandshake is refused: these are a server's credentials.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers")
}

// Info implements credentials.TransportCredentials.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "pinned-peer"}
}

// Clone implements credentials.TransportCredentials.
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

// OverrideServerName implements credentials.TransportCredentials.
func (peerCredentials) OverrideServerName(string) error {
	return errors.New("peer credentials have no server name")
}
