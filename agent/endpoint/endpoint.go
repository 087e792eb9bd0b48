// Package endpoint is the sockets on which local processes ask the agent for
// identities. On one Unix socket, for their own: today the SPIFFE Workload API
// and Envoy's SDS. On another, which few may reach, for those of others and for
// what the agent is doing: the admin socket (ListenAdmin). On a third, or over the
// network, brokers ask for those of others (ListenBroker). All have gRPC health,
// and Unix sockets reflection.
//
//	s, err := endpoint.Listen(endpoint.Config{
//		Socket:    "/run/narthex/public/api.sock",
//		Agent:     agent,
//		Attestors: []attestor.Workload{attestor.NewUnix(attestor.UnixConfig{})},
//	})
//	err = s.Serve(ctx) // until ctx ends
//
// A call takes one way through the package. conn.go pins the process at the
// other end of a new connection; calls.go holds it to its limits and asks for
// the header of the SPIFFE Workload API; stream.go attests the process,
// watches the registry on its behalf and sends what an encoder makes of each
// view: {next, encode once, send}. x509.go, jwt.go and wit.go hold the profiles
// of the Workload API; what is signed when it is asked for, they ask the agent
// for (Tokens). A stream of SDS (sds.go) waits for requests and for views at
// once. The admin socket's services take the same way, each in a file of its
// own: delegated.go, debug.go, logger.go, explain.go. So does the Broker API:
// brokerdoor.go lets brokers in, brokerref.go reads whom they ask for,
// brokerapi.go answers.
//
// It leaves to attestor how a process is known, to agent/registry who is
// entitled to what, and to agent how entries and SVIDs come from the server:
// the Agent interface is all it knows of it.
package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/socket"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// Agent is what the sockets need of the agent.
type Agent interface {
	// Watch watches what a process with these selectors may have.
	Watch(selectors []attestor.Selector) *registry.Watch
	// Sync asks the server for changes on behalf of a caller with these
	// selectors (sorted), to which no entry matches. Callers at the same time
	// share one sync; it returns once that has been applied, or with ctx, and at
	// once where what is known is new enough, or where the user whose caller it
	// is, such as a uid, has had the server asked often enough. Any other error is
	// the reason why the server cannot be asked.
	Sync(ctx context.Context, user string, selectors []attestor.Selector) error
	// Unready returns nil once entries are synced, else the reason a caller
	// should read.
	Unready() error
	// Problem returns nil while all is well with the agent, else why what is not
	// signed yet may take longer.
	Problem() error
	Tokens
}

// Tokens are JWT-SVIDs and WIT-SVIDs of entries. Whoever asks has an entry from
// a registry.View of the caller, and so knows that the caller may have them.
// All who ask for the same at the same time share one call to the server, and
// what comes of it; the answer has at least some of its life left. An error is
// for the caller to read; it wraps ErrNoTokens where no call would help.
type Tokens interface {
	// JWTSVID returns a JWT-SVID of the entry for the audience, which is
	// sorted, without duplicates and not empty.
	JWTSVID(ctx context.Context, entry *registry.Entry, audience []string) (*registry.Token, error)
	// WITSVID returns a WIT-SVID of the entry with its private key, which
	// all who have the entry share. At refresh, or once the token is not good
	// any more, a caller should ask again.
	WITSVID(ctx context.Context, entry *registry.Entry) (token *registry.Token, refresh time.Time, err error)
}

// ErrNoTokens says that the server signs no tokens of a kind.
var ErrNoTokens = errors.New("the SPIRE Server signs none")

// Config is what Listen needs. Agent and one of Socket and Listener are
// required.
type Config struct {
	// Socket is the path of the Unix socket, at most 107 bytes; "unix:" and
	// "unix://" before it are dropped. A missing parent directory is made,
	// mode 0755. The socket has mode 0777: who may have what is decided by
	// attestation. A socket that nobody serves any more is replaced.
	Socket string
	// Listener, where it is set, is served instead of making a socket: one
	// handed over by a predecessor or by systemd. It must be a listener on a
	// Unix stream socket. Serve closes it and leaves its file alone, unless
	// Own was called.
	Listener net.Listener

	Agent     Agent
	Attestors []attestor.Workload
	// AllowUnauthenticatedVerifiers hands the own trust domain's bundle to
	// callers without an identity, and validates its JWT-SVIDs for them.
	AllowUnauthenticatedVerifiers bool
	// ForeignJWTClaims are the claims that ValidateJWTSVID tells of a token of
	// another trust domain, beside sub, exp and aud.
	ForeignJWTClaims []string
	SDS              SDS
	Limits           Limits

	Metrics *telemetry.Metrics
	Log     hclog.Logger // nil: no log

	door *door // of a server that brokers call
}

// Times that bound what a call may wait for.
const (
	// handshakeTimeout bounds the time from accept to the client's HTTP/2
	// preface.
	handshakeTimeout = 10 * time.Second
	// idleTimeout is after how long a connection without a call is asked to
	// go. Clients of gRPC connect again by themselves.
	idleTimeout = 10 * time.Minute
	// drainTimeout is how long Serve waits, once it is told to stop, for
	// clients to take the last answer and hang up, before it cuts them off.
	drainTimeout = 2 * time.Second
	// healthPeriod is how soon a health watch sees the agent become ready.
	healthPeriod = time.Second
)

// maxHeaders bounds the headers of a call, uncompressed and with 32 bytes for
// each: they stay in memory for as long as the call is open. A client sends
// about 400; a trace's context fits as well.
const maxHeaders = 4 << 10

// Server serves one socket.
type Server struct {
	agent     Agent
	attestors []attestor.Workload
	followers []attestor.Follower // those of attestors that are
	housing   []attestor.Housing  // likewise
	objects   []attestor.Objects  // likewise
	log       hclog.Logger

	listener *listener
	socket   *socket.Listener // nil where the listener is inherited and not ours
	grpc     *grpc.Server
	health   *healthServer
	limits   *limiter
	meter    *meter
	frames   frames
	secrets  secrets
	held     held
	deep     *deep
	door     *door       // nil: callers are processes, which the kernel knows
	yielding atomic.Bool // between Pause and Resume
	given    atomic.Bool // likewise, where another process has the socket

	// stop ends every call when the server shuts down. The calls of a gRPC
	// server have no parent context of ours, so they are tied to this one.
	stop   context.Context
	halt   context.CancelFunc
	closed sync.Once
}

// Listen takes the socket, so that a caller's connection waits rather than
// fails from here on. It fails with an error naming the path where the path
// is too long, something other than a socket is there, or a live process
// serves it. The caller then calls Serve, or Close.
func Listen(cfg Config) (*Server, error) {
	s, err := newServer(&cfg, listenUnix)
	if err != nil {
		return nil, err
	}
	services := registrar{s.grpc, s}
	workload.RegisterSpiffeWorkloadAPIServer(services, newWorkloadAPI(s, &cfg))
	secretservice.RegisterSecretDiscoveryServiceServer(services, newSecretAPI(s))
	s.complete(services, cfg.Metrics, workloadAPIMetrics, workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName)
	return s, nil
}

// newServer makes a server without services. Where the listener is not
// inherited, listen makes the socket.
func newServer(cfg *Config, listen func(addr string) (*socket.Listener, error)) (*Server, error) {
	log := cfg.Log
	if log == nil {
		log = hclog.NewNullLogger()
	}
	if cfg.Agent == nil {
		return nil, errors.New("listen: no agent given")
	}
	s := &Server{agent: cfg.Agent, attestors: cfg.Attestors, log: log, door: cfg.door, frames: newFrames(), deep: newDeep(), held: held{watches: map[*registry.Watch]struct{}{}}}
	s.secrets = newSecrets(cfg.SDS.withDefaults(), cfg.AllowUnauthenticatedVerifiers)
	for _, a := range cfg.Attestors {
		if f, ok := a.(attestor.Follower); ok {
			s.followers = append(s.followers, f)
		}
		if h, ok := a.(attestor.Housing); ok && cfg.door == nil { // brokers count for themselves
			s.housing = append(s.housing, h)
		}
		if o, ok := a.(attestor.Objects); ok {
			s.objects = append(s.objects, o)
		}
	}
	s.limits = newLimiter(cfg.Limits, len(s.housing) > 0)
	s.stop, s.halt = context.WithCancel(context.Background())
	s.listener = &listener{Listener: cfg.Listener, server: s}
	if cfg.Listener == nil {
		var err error
		if s.socket, err = listen(cfg.Socket); err != nil {
			return nil, err
		}
		s.listener.Listener = s.socket
	} else if network := cfg.Listener.Addr().Network(); network != "unix" && (cfg.door == nil || cfg.door.local) {
		return nil, fmt.Errorf("listen: the inherited listener is on %q; want a unix stream socket", network)
	} else if l, ok := cfg.Listener.(*net.UnixListener); ok {
		l.SetUnlinkOnClose(false)
		if cfg.Socket != "" {
			var err error
			if s.socket, err = socket.Inherit(l, cfg.Socket); err != nil {
				return nil, err
			}
			s.listener.Listener = s.socket
		}
	}
	s.grpc = s.newGRPC()
	return s, nil
}

// complete adds what every socket has beside its own services, which are named:
// health, counters, and reflection, but not for the network.
func (s *Server) complete(services registrar, metrics *telemetry.Metrics, names meterNames, own ...string) {
	s.health = newHealth(s.agent, own...)
	grpc_health_v1.RegisterHealthServer(services, s.health)
	if s.door == nil || s.door.local {
		reflection.Register(services)
	}
	s.meter = newMeter(metrics, names, s.grpc.GetServiceInfo(), s.attestors)
}

// newGRPC configures gRPC for many small, long-lived streams: nothing is
// buffered for a connection that is silent, and what a client may make us
// hold is bounded.
func (s *Server) newGRPC() *grpc.Server {
	return grpc.NewServer(
		grpc.Creds(s.credentials()),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.ChainStreamInterceptor(s.streamCall),
		grpc.UnknownServiceHandler(unknownMethod),
		grpc.WaitForHandlers(true),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(uint32(s.limits.StreamsPerConnection)),
		grpc.MaxRecvMsgSize(64<<10),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.HeaderTableSize(0), // calls are few: a table of headers would be kept for nothing
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		// Both buffers come from pools and are held only while bytes move:
		// see conn.ReadOnReady for the reading side.
		grpc.ReadBufferSize(4<<10),
		grpc.WriteBufferSize(16<<10),
		// Requests are a few bytes; fixed windows spare the bandwidth
		// estimator and its pings.
		grpc.StaticStreamWindowSize(64<<10),
		grpc.StaticConnWindowSize(64<<10),
	)
}

// Addr returns the address of the socket.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Streams returns how many streams are open.
func (s *Server) Streams() int { return int(s.meter.streams.Load()) }

// Serve answers callers until ctx ends, then ends every call with code
// Unavailable, which clients answer by calling again, and returns nil when
// all have ended: within a few seconds, unless an attestor does not heed its
// context. It returns an error where the listener breaks before.
func (s *Server) Serve(ctx context.Context) error {
	s.health.refresh()
	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(s.listener) }()
	if s.door != nil {
		defer s.door.keep()() // which Close ends
	}
	health := time.NewTicker(healthPeriod)
	defer health.Stop()
	for {
		select {
		case <-health.C:
			s.health.refresh()
		case err := <-served:
			if err != nil { // nil after Close
				err = fmt.Errorf("serve %s: %w", s.Addr(), err)
			}
			return errors.Join(err, s.Close())
		case <-ctx.Done():
			err := s.Close()
			if ended := <-served; !errors.Is(ended, grpc.ErrServerStopped) { // that is: stopped before it began
				err = errors.Join(err, ended)
			}
			return err
		}
	}
}

// Close ends every call, waits for all and removes the socket. Serve calls it
// by itself; it is for a server that is never served. It returns an error
// where the socket could not be removed.
func (s *Server) Close() error {
	var err error
	s.closed.Do(func() {
		// The socket goes first: who calls again should find nobody rather
		// than us.
		if s.socket != nil && !s.given.Load() {
			err = s.socket.Remove()
		}
		s.drain()
		s.deep.close()
		if closeErr := s.listener.Close(); closeErr != nil && !errors.Is(closeErr, net.ErrClosed) {
			err = errors.Join(err, closeErr)
		}
	})
	return err
}

// drain ends every call and waits for all. Where another process serves the
// socket by now, calls that came to us before that have drainTimeout to be
// answered: their callers cannot know that somebody else would answer.
func (s *Server) drain() {
	drained := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(drained)
	}()
	if !s.yielding.Load() {
		s.halt()
	}
	s.held.close()
	if s.door != nil {
		s.door.close()
	}
	s.health.Shutdown()
	grace := time.NewTimer(drainTimeout)
	defer grace.Stop()
	select {
	case <-drained:
	case <-grace.C:
		s.halt()
		s.grpc.Stop()
		<-drained
	}
	s.halt()
}
