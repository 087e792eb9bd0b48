package extauthz

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"github.com/narthex-id/narthex/internal/socket"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/identity"
)

// The bounds of what a client can make us hold and wait for.
const (
	maxConnections   = 1024      // of one service; more wait in the kernel's backlog
	maxCalls         = 1000      // of one connection at a time; Envoy opens another one beyond
	maxMessage       = 192 << 10 // bytes of a question: a head of 64 KiB, whose path is in it twice, and what Envoy says beside it
	maxCallHeaders   = 16 << 10  // bytes of a call's own headers
	window           = 1 << 20   // bytes that may be on their way on one connection
	handshakeTimeout = 10 * time.Second
	idleTimeout      = 30 * time.Minute
	pingAfter        = time.Minute      // of silence, to notice clients that are gone
	pingTimeout      = 20 * time.Second // for the answer
	pingsApart       = 10 * time.Second // those of clients; one that pings more often is sent away
)

// settings are those of a service with their defaults filled in, and the lease
// on what it presents. They are immutable.
type settings struct {
	Service
	lease identity.Lease // nil on a Unix socket
}

func newSettings(s Service, was *settings, source identity.Source) (*settings, error) {
	s.UnixMode = cmp.Or(s.UnixMode, defaultUnixMode)
	s.Drain = cmp.Or(s.Drain, defaultDrain)
	s.Clients = slices.Clone(s.Clients)
	out := &settings{Service: s}
	switch {
	case s.onUnix():
		return out, nil
	case was != nil && was.Identity == s.Identity:
		out.lease = was.lease
		return out, nil
	case source == nil:
		return nil, errors.New("no source of identities: mTLS needs one")
	}
	var err error
	if out.lease, err = source.Own(context.Background(), s.Identity); err != nil {
		return nil, fmt.Errorf("identity %s: %w", s.Identity, err)
	}
	return out, nil
}

// give gives back what the settings hold.
func (s *settings) give() {
	if s.lease != nil {
		s.lease.Close()
	}
}

// service is one place at which Envoy asks.
type service struct {
	auth.UnimplementedAuthorizationServer

	set      *Set
	settings atomic.Pointer[settings] // those in force; nil before Commit
	socket   net.Listener
	places   *places
	server   *grpc.Server
	serving  sync.WaitGroup
	removed  atomic.Bool // no rules are written for it any more: it answers nobody
	left     atomic.Bool // the socket's path is another process's
	refusals telemetry.LogLimit

	checks, denied atomic.Uint64
}

// open makes a service that does not accept yet.
func (s *Set) open(with *settings) (*service, error) {
	v := &service{set: s}
	if err := v.listen(with.Service); err != nil {
		return nil, err
	}
	v.places = &places{Listener: v.socket, free: make(chan struct{}, maxConnections), closed: make(chan struct{})}
	v.server = v.newServer(with.onUnix())
	auth.RegisterAuthorizationServer(v.server, v)
	grpc_health_v1.RegisterHealthServer(v.server, &health{v: v})
	return v, nil
}

func (v *service) newServer(onUnix bool) *grpc.Server {
	creds := grpc.Creds(insecure.NewCredentials())
	if !onUnix {
		creds = grpc.Creds(&mutual{v})
	}
	return grpc.NewServer(
		creds,
		grpc.UnaryInterceptor(v.admit),
		grpc.WaitForHandlers(true),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxCalls),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxCallHeaders),
		grpc.StaticConnWindowSize(window),
		grpc.StaticStreamWindowSize(window),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout, Time: pingAfter, Timeout: pingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingsApart, PermitWithoutStream: true}),
	)
}

// listen opens the socket, or takes the one that was handed over.
func (v *service) listen(s Service) (err error) {
	var have net.Listener
	if v.set.config.Sockets != nil {
		have = v.set.config.Sockets(s.Name, s.Bind)
	}
	if !s.onUnix() {
		if v.socket = have; have == nil {
			v.socket, err = net.Listen("tcp", s.Bind)
		}
		return err
	}
	if u, ok := have.(*net.UnixListener); ok {
		v.socket, err = socket.Inherit(u, s.Bind)
		return err
	}
	v.socket, err = socket.Listen(s.Bind, s.UnixMode)
	return err
}

// chmod gives the socket of a service the mode it has by now.
func (v *service) chmod(s *settings) {
	u, ok := v.socket.(*socket.Listener)
	if !ok || !u.Stands() {
		return
	}
	if err := os.Chmod(u.Addr().String(), s.UnixMode); err != nil {
		v.set.config.Log.Error("cannot change the mode of a socket: it keeps the old one", "listener", s.Name, "error", err)
	}
}

func (v *service) start() {
	v.serving.Go(func() {
		if err := v.server.Serve(v.places); err != nil && !errors.Is(err, grpc.ErrServerStopped) && !errors.Is(err, net.ErrClosed) {
			v.set.config.Log.Error("ext_authz ended", "listener", v.settings.Load().Name, "error", err)
		}
	})
}

// retire takes no more connections, lets calls end, and waits for all.
func (v *service) retire() {
	s := v.settings.Load()
	late := time.AfterFunc(s.Drain, v.server.Stop)
	v.removePath()
	v.server.GracefulStop()
	late.Stop()
	v.serving.Wait()
	s.give()
}

// close is for a service that never accepted.
func (v *service) close() {
	v.removePath()
	v.server.Stop()
	_ = v.socket.Close()
}

// removePath removes the socket's file, if it is still ours.
func (v *service) removePath() {
	u, ok := v.socket.(*socket.Listener)
	if !ok || v.left.Load() {
		return
	}
	if err := u.Remove(); err != nil {
		v.set.config.Log.Warn("ext_authz", "error", err)
	}
}

func (v *service) status(stopped bool) telemetry.ExtAuthzStatus {
	s := v.settings.Load()
	out := telemetry.ExtAuthzStatus{
		Name: s.Name, Bind: s.Bind, Enforcement: "enforce",
		Active: int(v.places.live.Load()), Checks: v.checks.Load(), Denied: v.denied.Load(),
	}
	if s.Audit {
		out.Enforcement = "audit"
	}
	for _, c := range s.Clients {
		out.Clients = append(out.Clients, c.String())
	}
	if s.lease != nil {
		if own, err := s.lease.Current(); err != nil {
			out.Problem = err.Error()
		} else {
			out.SPIFFEID, out.ExpiresAt = own.ID.String(), own.NotAfter()
		}
	}
	if stopped {
		out.Problem = "draining"
	}
	return out
}

// places is a listener that has a bounded number of connections at once.
type places struct {
	net.Listener
	free      chan struct{} // holds one for each connection, and for the one that is awaited
	live      atomic.Int64
	closed    chan struct{}
	closeOnce sync.Once
}

// Accept waits for a place first: whoever else comes waits in the kernel's
// backlog and costs nothing.
func (p *places) Accept() (net.Conn, error) {
	select {
	case p.free <- struct{}{}:
	case <-p.closed:
		return nil, net.ErrClosed
	}
	raw, err := p.Listener.Accept()
	if err != nil {
		<-p.free
		return nil, err
	}
	p.live.Add(1)
	return &placed{Conn: raw, give: sync.OnceFunc(func() {
		p.live.Add(-1)
		<-p.free
	})}, nil
}

// Close ends the wait for a place too.
func (p *places) Close() error {
	p.closeOnce.Do(func() { close(p.closed) })
	return p.Listener.Close()
}

// placed is a connection that has a place.
type placed struct {
	net.Conn
	give func()
}

// Close gives the place back.
func (c *placed) Close() error {
	defer c.give()
	return c.Conn.Close()
}
