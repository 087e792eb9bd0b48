// Package expose shows what internal/telemetry holds to people and machines
// over HTTP: Prometheus metrics, the status document and a page of it, and
// health.
//
//	s, err := expose.Listen(expose.Config{Listen: "127.0.0.1:9901", Metrics: m, …})
//	if err != nil {
//		return err // a busy port says which key to change
//	}
//	return s.Serve(ctx) // until ctx ends
//
// There is no authentication here: who may reach the address may read. What
// is shown holds no keys and no tokens. A web page that a browser on this host
// has open can reach a loopback address too (DNS rebinding), so requests that
// come by loopback must name a local host.
//
// Under `narthex run` two processes are shown as one: each serves its own part
// on a private socket, and the one that has the public address merges the
// other's in. While the other half is away its part is missing, and the page
// says so.
package expose

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/narthex-id/narthex/internal/telemetry"
	"golang.org/x/net/netutil"
)

// Config says what to show and where. Zero fields show less.
type Config struct {
	Listen  string                  // everything, at host:port or unix:/path; empty: none
	Socket  net.Listener            // inherited, for Listen, which then only names it; nil: Listen is opened
	Health  string                  // /livez and /readyz alone, likewise
	Probed  net.Listener            // inherited, for Health
	Process string                  // "agent", "proxy" or another word: the label of the process's own metrics
	Metrics *telemetry.Metrics      // may be nil
	Status  func() telemetry.Status // of this process; called by Listen and by each request; may be nil
	Ready   func() error            // why it cannot do its work, nil when it can; a nil func is always ready
	Live    func() error            // why it should be restarted, nil when it should not; a nil func is always live
	Other   *Remote                 // the other half under `narthex run`, merged in; nil: there is none
	Private net.Listener            // serves this process's own part to the other half; closed by Close and at the end of Serve
	Log     hclog.Logger            // nil: silent
}

// Bounds on what a client may cost.
const (
	maxHeader      = 16 << 10
	maxConnections = 64 // on each address; more wait in the kernel's queue or, on Health, end the oldest
	headerTimeout  = 5 * time.Second
	readTimeout    = 10 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = 30 * time.Second
	healthTimeout  = 2 * time.Second // of each step on Health: whoever keeps a connection must not keep probes out
	drainTimeout   = 2 * time.Second
)

// Server listens on the addresses of its Config. Make it with Listen, end it
// with the context of Serve, or with Close where Serve is never called.
type Server struct {
	cfg    Config
	remote *client // nil without Other
	faces  []face
	addr   net.Addr
	health net.Addr

	listening, probed net.Listener // of Listen and Health; nil where there is none
}

// face is one address with what it serves.
type face struct {
	listener net.Listener
	handler  http.Handler
	open     bool // strangers reach it: a connection is for one request, sent and read without delay
}

// limited is the listener with no more connections than maxConnections.
func (f *face) limited() net.Listener {
	if f.open {
		return newShedding(f.listener, maxConnections)
	}
	return netutil.LimitListener(f.listener, maxConnections)
}

// Listen opens the addresses. Nothing is answered before Serve.
func Listen(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	s := &Server{cfg: cfg}
	if cfg.Other != nil {
		s.remote = newClient(*cfg.Other)
	}
	if cfg.Private != nil {
		s.faces = append(s.faces, face{listener: cfg.Private, handler: s.privateRoutes()})
	}
	for _, want := range []struct {
		key, address string
		socket       net.Listener
		routes       func() http.Handler
		addr         *net.Addr
	}{
		{"telemetry.listen", cfg.Listen, cfg.Socket, s.publicRoutes, &s.addr},
		{"telemetry.health", cfg.Health, cfg.Probed, s.healthRoutes, &s.health},
	} {
		if want.address == "" {
			continue
		}
		l := want.socket
		if l == nil {
			var err error
			if l, err = listen(want.key, want.address); err != nil {
				return nil, errors.Join(err, s.Close())
			}
		}
		*want.addr = l.Addr()
		if want.key == "telemetry.listen" {
			s.listening = l
		} else {
			s.probed = l
		}
		s.faces = append(s.faces, face{l, guard(want.address, want.routes()), want.key == "telemetry.health"})
	}
	return s, nil
}

// Addr returns the address of Config.Listen with the port it got; nil where
// there is none.
func (s *Server) Addr() net.Addr { return s.addr }

// HealthAddr returns the address of Config.Health with the port it got; nil
// where there is none.
func (s *Server) HealthAddr() net.Addr { return s.health }

// Sockets returns the listening sockets of Config.Listen and Config.Health,
// nil where there is none, for a process that takes this one's place. They
// stay the server's.
func (s *Server) Sockets() (listen, health net.Listener) { return s.listening, s.probed }

// Close closes the listeners.
func (s *Server) Close() error {
	var errs []error
	for _, f := range s.faces {
		if err := f.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Serve answers until ctx ends, gives requests under way two seconds and
// waits for all of them. It returns nil then, or the error that kept an
// address from being served.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, len(s.faces))
	var wg sync.WaitGroup
	for _, f := range s.faces {
		srv := &http.Server{
			Handler:           f.handler,
			ReadHeaderTimeout: headerTimeout,
			ReadTimeout:       readTimeout,
			WriteTimeout:      writeTimeout,
			IdleTimeout:       idleTimeout,
			MaxHeaderBytes:    maxHeader,
			ErrorLog:          s.cfg.Log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		}
		if f.open {
			srv.SetKeepAlivesEnabled(false)
			srv.ReadHeaderTimeout, srv.ReadTimeout, srv.WriteTimeout = healthTimeout, healthTimeout, healthTimeout
		}
		wg.Go(func() {
			err := srv.Serve(f.limited())
			if !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve telemetry on %s: %w", f.listener.Addr(), err)
				cancel()
			}
		})
		wg.Go(func() {
			<-ctx.Done()
			shutdown(srv)
		})
	}
	<-ctx.Done()
	wg.Wait()
	close(failed)
	errs := []error{s.Close()}
	for err := range failed {
		errs = append(errs, err)
	}
	if s.remote != nil {
		s.remote.http.CloseIdleConnections()
	}
	return errors.Join(errs...)
}

func shutdown(srv *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if srv.Shutdown(ctx) != nil {
		_ = srv.Close() // nothing is lost: the clients are asked to come again
	}
}
