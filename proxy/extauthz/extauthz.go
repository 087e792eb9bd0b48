// Package extauthz answers Envoy's question whether a request may go on:
// envoy.service.auth.v3.Authorization over gRPC, decided by the rules in force.
//
//	set, err := extauthz.New(extauthz.Config{Ask: p.Answer, Bars: p.Bars, Identities: source})
//	…
//	change, err := set.Plan([]extauthz.Service{{Name: "envoy-orders", Bind: "unix:/run/narthex/authz.sock"}})
//	…
//	change.Commit()
//	err = set.Run(ctx) // until ctx ends, then drains
//
// Whoever asks is believed in what it says of a request: who sent it, where
// from, what it asks for. So it asks over a Unix socket, whose mode says who may,
// or over mTLS, as one of the clients that are named.
//
// Follow one question: service.go takes the connection, credentials.go learns
// whose it is, check.go sees that it may ask and records what came of it,
// question.go reads what Envoy sent, answer.go is what it is told. What the
// answer is, is the business of whoever Config.Ask belongs to.
package extauthz

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/socket"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

// Config is what a set of services runs on. Ask and Bars are required, and
// Identities where a service is not on a Unix socket.
type Config struct {
	// Ask decides a request. Status is 0 where it may go on, else that of the
	// refusal; after is then the value of retry-after, or empty. What was
	// decided goes into r. Many goroutines call it at once.
	Ask func(q *policy.Request, audit bool, r *telemetry.Access) (status int, after string)

	// Bars says why the rules refuse whatever comes from a peer, or nothing.
	Bars func(policy.Peer) string

	Identities identity.Source

	// Sockets is asked for a listening socket before one is opened: one that
	// was handed over or that systemd made. Nil, and a nil socket: one is
	// opened.
	Sockets func(name, bind string) net.Listener

	Metrics *telemetry.Metrics
	Access  *telemetry.AccessLog
	Log     hclog.Logger
}

// Service is one place at which Envoy asks.
type Service struct {
	Name    string           // what rules call it in `on`; unique, of listeners too
	Bind    string           // unix:/path, or host:port, where mTLS is spoken
	Clients []policy.Pattern // who may ask over mTLS: required there, and of no use on a Unix socket

	Identity identity.Pick // which of our SVIDs is presented over mTLS
	Audit    bool          // what rules refuse passes, and is counted as would_deny
	UnixMode fs.FileMode   // of the socket: who may connect may ask; 0: 0660
	Drain    time.Duration // how long calls may take to end; 0: 30s
}

const (
	unixPrefix      = "unix:"
	defaultUnixMode = 0o660
	defaultDrain    = 30 * time.Second
)

func (s Service) onUnix() bool { return strings.HasPrefix(s.Bind, unixPrefix) }

// check refuses services that cannot be.
func (s Service) check() error {
	switch {
	case s.Name == "":
		return errors.New("a service has no name")
	case s.onUnix() && len(s.Clients) > 0:
		return fmt.Errorf("%s: clients are for mTLS; on a Unix socket its mode says who may ask", s.Name)
	case !s.onUnix() && len(s.Clients) == 0:
		return fmt.Errorf("%s: needs clients, the SPIFFE IDs that may ask at %s: whoever asks is believed in whom requests come from", s.Name, s.Bind)
	case s.UnixMode&^0o777 != 0:
		return fmt.Errorf("%s: mode %o: want permissions alone, like 0660", s.Name, s.UnixMode)
	}
	return nil
}

// ErrStopped is returned by Run of a set that runs, or ran, already.
var ErrStopped = errors.New("ext_authz has stopped")

// Set is the services in force.
type Set struct {
	config  Config
	meters  meters
	retired sync.WaitGroup // services that were removed and drain

	mu       sync.Mutex          // guards the following
	services map[string]*service // by where they are bound
	running  bool
	stopped  bool
}

// New returns a set without services.
func New(c Config) *Set {
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	return &Set{config: c, meters: newMeters(c.Metrics), services: map[string]*service{}}
}

// Change is a set of services that is about to be in force, with everything
// that can fail done. One of Commit and Undo is to be called.
type Change struct {
	set   *Set
	next  map[string]*service
	made  []*service             // not there before
	given map[*service]*settings // of all
}

// Plan prepares the services that are to take the place of those in force. On
// an error, which names the service, everything stays as it was. Plans are made
// one after the other. While Run drains, a change changes nothing.
//
// A service is known by where it is bound: one that changes otherwise keeps its
// socket and its connections.
func (s *Set) Plan(services []Service) (*Change, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return &Change{set: s}, nil // nobody is to be answered any more
	}
	c := &Change{set: s, next: map[string]*service{}, given: map[*service]*settings{}}
	for _, want := range services {
		if err := c.add(want, s.services); err != nil {
			c.Undo()
			return nil, fmt.Errorf("ext_authz: %w", err)
		}
	}
	return c, nil
}

func (c *Change) add(want Service, have map[string]*service) error {
	if err := want.check(); err != nil {
		return err
	}
	key := want.Bind
	if strings.HasSuffix(key, ":0") { // the kernel chooses: two of them are two addresses
		key += " " + want.Name
	}
	if other := c.next[key]; other != nil {
		return fmt.Errorf("%s: bind %s is taken by %s", want.Name, want.Bind, c.given[other].Name)
	}
	v := have[key]
	var was *settings
	if v != nil {
		was = v.settings.Load()
	}
	next, err := newSettings(want, was, c.set.config.Identities)
	if err != nil {
		return fmt.Errorf("%s: %w", want.Name, err)
	}
	if v == nil {
		if v, err = c.set.open(next); err != nil {
			next.give()
			return fmt.Errorf("%s: %w", want.Name, err)
		}
		c.made = append(c.made, v)
	}
	c.next[key], c.given[v] = v, next
	return nil
}

// Undo gives back what was taken for a change that is not put in force.
func (c *Change) Undo() {
	for _, v := range c.made {
		v.close()
	}
	for v, s := range c.given {
		if was := v.settings.Load(); was == nil || was.lease != s.lease {
			s.give()
		}
	}
}

// Commit puts the change in force; it cannot fail. Removed services drain.
func (c *Change) Commit() {
	s := c.set
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		c.Undo()
		return
	}
	for key, v := range s.services {
		if c.next[key] != nil {
			continue
		}
		s.config.Log.Info("ext_authz removed", "listener", v.settings.Load().Name, "bind", v.settings.Load().Bind)
		v.removed.Store(true)
		if s.running {
			s.retired.Go(v.retire)
		} else {
			v.close()
			v.settings.Load().give()
		}
	}
	for v, next := range c.given {
		s.settle(v, next)
	}
	s.services = c.next
}

// settle puts the settings of a service in force, with s.mu held.
func (s *Set) settle(v *service, next *settings) {
	was := v.settings.Swap(next)
	if was == nil {
		s.config.Log.Info("ext_authz added", "listener", next.Name, "bind", next.Bind)
		if s.running {
			v.start()
		}
		return
	}
	if was.lease != next.lease {
		was.give()
	}
	if reflect.DeepEqual(was.Service, next.Service) {
		return
	}
	s.config.Log.Info("ext_authz changed", "listener", next.Name, "bind", next.Bind)
	if was.UnixMode != next.UnixMode {
		v.chmod(next)
	}
}

// Run answers until ctx ends, then lets calls end for as long as they may, and
// returns when the last connection is gone. It can be called once.
func (s *Set) Run(ctx context.Context) error {
	s.mu.Lock()
	if s.running || s.stopped {
		s.mu.Unlock()
		return ErrStopped
	}
	s.running = true
	for _, v := range s.services {
		v.start()
	}
	s.mu.Unlock()
	<-ctx.Done()
	s.mu.Lock()
	s.stopped = true
	for _, v := range s.services {
		s.retired.Go(v.retire)
	}
	s.mu.Unlock()
	s.retired.Wait()
	return nil
}

// EndNow ends every connection at once, and so the draining of Run.
func (s *Set) EndNow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.services {
		v.server.Stop()
	}
}

// Close gives back the sockets of a set that does not run.
func (s *Set) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running || s.stopped {
		return
	}
	s.stopped = true
	for _, v := range s.services {
		v.close()
		v.settings.Load().give()
	}
}

// sorted returns the services by name, with s.mu held.
func (s *Set) sorted() []*service {
	return slices.SortedFunc(maps.Values(s.services), func(a, b *service) int {
		return strings.Compare(a.settings.Load().Name, b.settings.Load().Name)
	})
}

// Status describes the services.
func (s *Set) Status() []telemetry.ExtAuthzStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []telemetry.ExtAuthzStatus
	for _, v := range s.sorted() {
		out = append(out, v.status(s.stopped))
	}
	return out
}

// WaitReady waits until every service that speaks mTLS has an identity to
// present, or ctx ends; then the error names one that has none.
func (s *Set) WaitReady(ctx context.Context) error {
	s.mu.Lock()
	services := s.sorted()
	s.mu.Unlock()
	for _, v := range services {
		set := v.settings.Load()
		for set.lease != nil {
			changed := set.lease.Changed() // before Current, or a change between the two would be missed
			_, err := set.lease.Current()
			if err == nil {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return fmt.Errorf("ext_authz %s: %w", set.Name, err)
			}
		}
	}
	return nil
}

// Addr returns the address that a service is bound to, or nil.
func (s *Set) Addr(name string) net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.services {
		if v.settings.Load().Name == name {
			return v.socket.Addr()
		}
	}
	return nil
}

// Socket is the listening socket of a service, for the process that takes this
// one's place.
type Socket struct {
	Name, Bind string
	Listener   net.Listener
	Owned      bool // a Unix socket whose path we would remove at the end
}

// Sockets returns those of the services in force, by name. They stay ours.
func (s *Set) Sockets() []Socket {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Socket
	for _, v := range s.sorted() {
		set := v.settings.Load()
		have := Socket{Name: set.Name, Bind: set.Bind, Listener: v.socket}
		if u, ok := v.socket.(*socket.Listener); ok {
			have.Listener, have.Owned = u.UnixListener, u.Stands()
		}
		out = append(out, have)
	}
	return out
}

// OwnPaths makes the paths of the Unix sockets of the given services ours to
// remove at the end: of those that Config.Sockets gave, once the process they
// came from has let go.
func (s *Set) OwnPaths(names []string) {
	s.eachUnix(names, func(v *service, u *socket.Listener) {
		if err := u.Own(); err != nil {
			s.config.Log.Warn("the path of a socket that was handed over is not there", "listener", v.settings.Load().Name, "error", err)
		}
	})
}

// LeavePaths leaves the paths of the Unix sockets of the given services where
// they are at the end: another process serves them.
func (s *Set) LeavePaths(names []string) {
	s.eachUnix(names, func(v *service, _ *socket.Listener) { v.left.Store(true) })
}

func (s *Set) eachUnix(names []string, f func(*service, *socket.Listener)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.services {
		if u, ok := v.socket.(*socket.Listener); ok && slices.Contains(names, v.settings.Load().Name) {
			f(v, u)
		}
	}
}
