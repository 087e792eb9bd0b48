// Package devserver is the development server inside Narthex: the gRPC API of
// a SPIRE Server, as agents use it, over a small certificate authority and a
// list of entries held in memory. `narthex demo` and `narthex dev-server` run
// it, so that an agent takes the same road on a laptop as beside a real
// spire-server: attestation by join token, renewal, entry sync, signing,
// bundles.
//
//	srv, err := devserver.New(devserver.Config{
//		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
//		Entries:     []devserver.Entry{{SPIFFEID: …, Selectors: …}},
//	})
//	go srv.Serve(ctx)
//	// give an agent srv.Addr(), srv.BundlePEM() and srv.JoinToken()
//
// It answers as spire-server v1.15 does, down to status codes and the details
// of a refusal, so that what works here works there. What it is not: it has no
// database, no admin API, no node attestor but join_token, no federation and
// no rate limits by caller, and it listens on loopback only. It is not for
// production and says so each time it starts.
package devserver

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

const (
	defaultListen  = "127.0.0.1:0"
	defaultCATTL   = 24 * time.Hour
	defaultSVIDTTL = time.Hour

	// maxTTL keeps every lifetime inside the int32 seconds of the API and
	// far from the end of X.509's calendar.
	maxTTL = 10 * 365 * 24 * time.Hour

	// What one caller may cost. Agents on one machine need a connection or
	// two each; the message bound is gRPC's own default and the real
	// server's.
	maxConnections    = 256
	maxStreams        = 100
	maxMessage        = 4 << 20
	maxHeaderList     = 64 << 10
	handshakeTimeout  = 10 * time.Second
	maxConnectionAge  = 3 * time.Minute // as the real server's: agents must survive the GOAWAY
	connectionGrace   = time.Minute
	gracefulStopAfter = 2 * time.Second
)

// Config is what New needs. Only TrustDomain must be set.
type Config struct {
	// TrustDomain is the trust domain of the CA and of every entry.
	TrustDomain spiffeid.TrustDomain
	// Listen is host:port, where host is a loopback address or "localhost".
	// Default "127.0.0.1:0": a free port.
	Listen string

	// CATTL is the lifetime of an X.509 and JWT authority. Default 24 h, or
	// six times the longest SVID lifetime where that is more. When it is
	// given, SVIDs that would outlive the authority are cut short.
	CATTL time.Duration
	// SVIDTTL is the lifetime of a workload's X.509-SVID whose entry names
	// none. Default 1 h, at least 1 s.
	SVIDTTL time.Duration
	// AgentTTL is the lifetime of an agent's own SVID. Default SVIDTTL.
	AgentTTL time.Duration

	// Entries are the registration entries to begin with; see SetEntries.
	Entries []Entry
	// JoinTokens are tokens that agents may attest with, each once.
	JoinTokens []string

	// Dir, when set, keeps the authorities and the attested agents across
	// restarts, so that an agent goes on with the SVID it has. It is made
	// with mode 0700 and holds private keys (0600); one server at a time may
	// use it. Empty: everything is gone when the server ends.
	Dir string

	// Log receives what an operator should read. Default: nothing.
	Log hclog.Logger
	// Now is the clock. It must be safe for concurrent use. Default time.Now.
	Now func() time.Time
}

// Server is a development server. Make one with New; all methods are safe for
// concurrent use.
type Server struct {
	td      spiffeid.TrustDomain
	log     hclog.Logger
	now     func() time.Time
	listen  net.Listener
	grpc    *grpc.Server
	ca      *ca
	entries *entryList
	nodes   *nodes
	store   *store
}

// New makes the certificate authority (or reads it from Config.Dir) and starts
// listening; calls are answered once Serve runs. A server that is never served
// must be closed.
func New(cfg Config) (*Server, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("configure development server: %w", err)
	}
	addr, err := loopback(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("configure development server: listen %q: %w", cfg.Listen, err)
	}
	s := &Server{td: cfg.TrustDomain, log: cfg.Log, now: cfg.Now, entries: newEntryList(cfg.TrustDomain, cfg.Now)}
	if err := s.entries.set(cfg.Entries); err != nil {
		return nil, fmt.Errorf("configure development server: %w", err)
	}
	if s.store, err = openStore(cfg.Dir); err != nil {
		return nil, fmt.Errorf("open state of development server: %w", err)
	}
	if s.ca, err = newCA(cfg, s.store); err == nil {
		s.nodes, err = newNodes(cfg, s.store)
	}
	if err == nil {
		s.listen, err = listen(addr)
	}
	if err != nil {
		s.store.close()
		return nil, fmt.Errorf("start development server: %w", err)
	}
	s.grpc = s.newGRPC()
	return s, nil
}

// listen says of an address that cannot be had what to do next.
func listen(addr string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("listen on %s: another program listens there, perhaps another development server; stop it, or listen on another port (0 takes a free one): %w", addr, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("listen on %s: not allowed; listen on a port above 1023: %w", addr, err)
	case err != nil:
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return l, nil
}

// complete fills in the defaults and refuses what cannot be meant.
func (cfg *Config) complete() error {
	if cfg.TrustDomain.IsZero() {
		return errors.New("trust domain is missing; name one, such as example.org")
	}
	if cfg.Listen == "" {
		cfg.Listen = defaultListen
	}
	if cfg.SVIDTTL == 0 {
		cfg.SVIDTTL = defaultSVIDTTL
	}
	if cfg.AgentTTL == 0 {
		cfg.AgentTTL = cfg.SVIDTTL
	}
	longest := max(cfg.SVIDTTL, cfg.AgentTTL)
	for _, e := range cfg.Entries {
		longest = max(longest, e.TTL)
	}
	if cfg.CATTL == 0 {
		// An authority signs until five sixths of its life are over, so
		// six times an SVID's life lets every SVID live its own to the end.
		cfg.CATTL = min(max(defaultCATTL, 6*min(longest, maxTTL)), maxTTL)
	}
	for _, ttl := range []struct {
		name string
		d    time.Duration
	}{{"CA", cfg.CATTL}, {"SVID", cfg.SVIDTTL}, {"agent", cfg.AgentTTL}} {
		if err := checkTTL(ttl.d); err != nil {
			return fmt.Errorf("lifetime of the %s: %w", ttl.name, err)
		}
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return nil
}

func checkTTL(d time.Duration) error {
	if d < time.Second || d > maxTTL {
		return fmt.Errorf("%s is out of bounds; choose from 1s to %s", d, maxTTL)
	}
	return nil
}

// loopback returns listen as a literal address, or says why it is refused.
// "localhost" is not looked up: a hosts file could send it anywhere.
func loopback(listen string) (string, error) {
	const want = "the development server listens on loopback TCP only; use 127.0.0.1:PORT or [::1]:PORT"
	if strings.Contains(listen, "/") || strings.HasPrefix(listen, "unix:") {
		return "", errors.New("not a host:port; " + want)
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", fmt.Errorf("not a host:port (%w); %s", err, want)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", fmt.Errorf("port %q is not a number from 0 to 65535", port)
	} else {
		port = strconv.FormatUint(n, 10)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.IsLoopback() {
		return "", fmt.Errorf("%q is not a loopback address; %s", host, want)
	}
	return net.JoinHostPort(ip.String(), port), nil
}

func (s *Server) newGRPC() *grpc.Server {
	g := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(s.tlsConfig())),
		grpc.UnaryInterceptor(s.authorizeUnary),
		grpc.StreamInterceptor(s.authorizeStream),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionAge:      maxConnectionAge,
			MaxConnectionAgeGrace: connectionGrace,
		}),
		grpc.WaitForHandlers(true),
	)
	agentv1.RegisterAgentServer(g, &agentService{s: s})
	entryv1.RegisterEntryServer(g, &entryService{s: s})
	svidv1.RegisterSVIDServer(g, &svidService{s: s})
	bundlev1.RegisterBundleServer(g, &bundleService{s: s})
	return g
}

// Addr is where the server listens, also before Serve.
func (s *Server) Addr() net.Addr { return s.listen.Addr() }

// BundlePEM is the X.509 bundle as agents read it from a file: the
// certificates of every authority that is trusted now.
func (s *Server) BundlePEM() []byte {
	var out []byte
	for _, a := range s.ca.bundle().authorities {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})...)
	}
	return out
}

// JoinToken returns a new token with which one agent may attest, once. It
// stays good until it is used or the server ends.
func (s *Server) JoinToken() string { return s.nodes.newToken() }

// SetEntries replaces the entries; agents see it at their next sync. An entry
// whose content differs from what the same ID had gets another revision
// number. When one of the entries is invalid the error says which and why, and
// nothing changes.
func (s *Server) SetEntries(entries []Entry) error {
	if err := s.entries.set(entries); err != nil {
		return fmt.Errorf("set entries: %w", err)
	}
	return nil
}

// Ban refuses an agent for good: its calls end with AGENT_BANNED. It fails
// when no such agent is attested.
func (s *Server) Ban(id spiffeid.ID) error { return s.nodes.ban(id.String()) }

// Evict forgets an agent: its calls end with AGENT_NOT_ATTESTED until it
// attests again, with another token. It fails when no such agent is attested.
func (s *Server) Evict(id spiffeid.ID) error { return s.nodes.evict(id.String()) }

// RotateCA makes new X.509 and JWT authorities and signs with them from now
// on. The old ones stay in the bundle until they expire, so what they signed
// stays good. The server's own certificate keeps its old authority until half
// of its life is over, so that agents hear of the new one first.
func (s *Server) RotateCA() error { return s.ca.rotate() }

// TaintCA marks every X.509 authority that signed before the active one as
// tainted in the bundle: agents must replace, at once, what those have signed.
// It is of use after RotateCA.
func (s *Server) TaintCA() error { return s.ca.taint() }

// Serve answers calls until ctx ends, and then returns nil once every call and
// goroutine has ended. It may be called once. Authorities are replaced while
// it runs: a new one is in the bundle from the half of the old one's life and
// signs from five sixths of it on.
func (s *Server) Serve(ctx context.Context) error {
	state := "memory, gone when it ends"
	if s.store != nil {
		state = s.store.dir
	}
	s.log.Warn("development server: NOT FOR PRODUCTION; its authority protects nothing but this machine's experiments",
		"trust_domain", s.td.Name(), "address", s.listen.Addr().String(), "state", state)

	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { s.keepCA(ctx) })
	wg.Go(func() {
		<-ctx.Done()
		s.stop()
	})
	err := s.grpc.Serve(netutil.LimitListener(s.listen, maxConnections))
	ended := ctx.Err() != nil
	cancel()
	wg.Wait()
	s.store.close()
	if ended && errors.Is(err, grpc.ErrServerStopped) { // before it began
		return nil
	}
	if err != nil {
		return fmt.Errorf("serve development server on %s: %w", s.listen.Addr(), err)
	}
	return nil
}

// keepCA turns the authorities over until ctx ends.
func (s *Server) keepCA(ctx context.Context) {
	tick := time.NewTicker(min(max(s.ca.ttl/60, time.Second), time.Minute))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := s.ca.turn(); err != nil {
				s.log.Error("authorities of the development server were not turned over; will try again", "error", err)
			}
		}
	}
}

// stop lets calls in flight end, for a while, and returns when all have.
func (s *Server) stop() {
	forced := make(chan struct{})
	timer := time.AfterFunc(gracefulStopAfter, func() {
		defer close(forced)
		s.grpc.Stop()
	})
	s.grpc.GracefulStop()
	if !timer.Stop() {
		<-forced
	}
}

// Close releases the listener and the state of a server that is not served.
// After Serve it does nothing.
func (s *Server) Close() error {
	s.grpc.Stop()
	err := s.listen.Close()
	s.store.close()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close development server: %w", err)
	}
	return nil
}
