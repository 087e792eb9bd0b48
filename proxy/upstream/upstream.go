// Package upstream chooses where a connection goes: a group of targets is
// resolved, watched and dialled.
//
//	set := upstream.NewSet(upstream.Options{Log: log})
//	group, err := set.Take("orders", []string{"orders.shop.svc:8080", "unix:/run/orders.sock"}, upstream.Settings{})
//	…
//	set.Start() // lookups and health checks begin
//	chosen, err := group.Dial(ctx, 5*time.Second)
//	…
//	chosen.Succeeded() // or Failed, when the far end proved to be no good
//	…
//	chosen.Close() // once the connection is over
//	group.Release()
//	set.Close() // waits for what it started
//
// A target is what stands in the configuration: host:port or unix:/path. An
// endpoint is one address of it, which is what is chosen, counted and found
// healthy or not. Read search.go for the choice, target.go for names and their
// addresses, endpoint.go for what failures do, health.go and probe.go for active
// checks and dial.go for the dial itself.
//
// Where a connection serves many requests it is lent for each of them:
//
//	loan, err := group.Borrow(ctx, 5*time.Second, own, key, &tried)
//	…
//	if loan.Kept == nil { … } // loan.Conn is fresh: TLS, if any, is the borrower's
//	…
//	loan.Return(keeper) // or Close, when the connection is not to be used again
//
// Read lend.go for that, idle.go for what lies between two loans and line.go
// for borrowers that wait; budget.go bounds their retries.
//
// What is sent over a connection, and whether the far end is whom it should
// be, is left to others.
package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/telemetry"
)

const unixPrefix = "unix:"

// Settings say how targets are chosen and watched. The zero value is round
// robin, no active checks and the default ejection. Values can be compared.
type Settings struct {
	Balance  Balance
	Health   Health
	Ejection Ejection

	// Of what Borrow lends; zeros are the defaults.
	MaxIdle        int           // idle connections of an endpoint that are kept: 256; negative: none
	IdleTimeout    time.Duration // how long at most, to the second: 60s
	MaxRequests    int           // loans of an endpoint at a time: any number
	MaxConnections int           // connections of an endpoint at a time, idle ones included: any number
	MaxPending     int           // borrowers that wait for room at a time: 1024; negative: none
	RetryPercent   int           // retries for a hundred requests, at most 100 (see Budget): 20; negative: none
}

// limits are the settings that an endpoint keeps.
type limits struct {
	idle, requests, connections int
	idleTimeout                 time.Duration
}

// loans is how many there may be at a time, or 0 for any number: each has a
// connection, and idle ones make way for them.
func (l limits) loans() int64 {
	if l.requests == 0 || l.connections == 0 {
		return int64(l.requests + l.connections)
	}
	return int64(min(l.requests, l.connections))
}

// Balance is how a healthy endpoint is chosen.
type Balance int

// The balances.
const (
	RoundRobin       Balance = iota // one after the other
	LeastConnections                // the one with the fewest connections from here, idle ones included
	LeastRequests                   // the one with the fewest loans from here
)

var balanceWords = [...]string{RoundRobin: "round_robin", LeastConnections: "least_connections", LeastRequests: "least_requests"}

// String returns the word configuration files use.
func (b Balance) String() string { return balanceWords[b] }

// UnmarshalText reads round_robin, least_connections or least_requests.
func (b *Balance) UnmarshalText(text []byte) error {
	for n, word := range balanceWords {
		if word == string(text) {
			*b = Balance(n)
			return nil
		}
	}
	return fmt.Errorf("%q: want round_robin, least_connections or least_requests", text)
}

// Health is active: every endpoint is connected to now and then, and asked for
// Path where there is one. It is off while Interval is zero; zeros of the
// others are the defaults beside them.
type Health struct {
	Interval       time.Duration // between two checks of an endpoint, give or take a tenth
	Timeout        time.Duration // of a check: 2s
	UnhealthyAfter int           // failed checks in a row: 3
	HealthyAfter   int           // good checks in a row: 2
	Path           string        // a GET of it answers with 2xx or 3xx, over HTTP/1.1: nothing is asked
	Host           string        // that it is sent with: the target's address, localhost for a Unix socket
}

// Ejection is passive health: an endpoint that failed After connections in a
// row is not chosen for a while, For the first time and twice as long each
// time after that, up to ten times For. Then one connection tries it. Zeros
// are the defaults beside the fields; a negative After is no ejection.
type Ejection struct {
	After int           // 5
	For   time.Duration // 30s
	On5xx bool          // answers of 502, 503 and 504 count as failed connections (Loan.Status)
}

// withDefaults fills in the defaults.
func (s Settings) withDefaults() Settings {
	orElse(&s.Ejection.After, 5)
	orElse(&s.Ejection.For, 30*time.Second)
	orElse(&s.MaxIdle, 256)
	orElse(&s.IdleTimeout, time.Minute)
	orElse(&s.MaxPending, 1024)
	orElse(&s.RetryPercent, 20)
	if s.Health.Interval > 0 {
		orElse(&s.Health.Timeout, 2*time.Second)
		orElse(&s.Health.UnhealthyAfter, 3)
		orElse(&s.Health.HealthyAfter, 2)
	}
	return s
}

func orElse[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// Check returns why settings cannot be, or nil.
func (s Settings) Check() error {
	switch {
	case s.Balance < 0 || int(s.Balance) >= len(balanceWords):
		return fmt.Errorf("balance %d is not one", int(s.Balance))
	case s.Health.Interval < 0 || s.Health.Timeout < 0 || s.Health.UnhealthyAfter < 0 || s.Health.HealthyAfter < 0:
		return errors.New("health: times and counts cannot be negative")
	case s.Ejection.For < 0:
		return errors.New("ejection: for cannot be negative")
	case s.IdleTimeout < 0 || s.MaxRequests < 0 || s.MaxConnections < 0:
		return errors.New("the idle timeout and the most requests and connections cannot be negative")
	case s.RetryPercent > 100:
		return fmt.Errorf("%d%% retries: want at most 100%%", s.RetryPercent)
	}
	return s.Health.checkPath()
}

// Resolver looks names up. *net.Resolver is one.
type Resolver interface {
	// LookupNetIP returns the addresses of host; an error that is a
	// *net.DNSError with IsNotFound means that there is no such name.
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Options are what a set works with. Each may be left out.
type Options struct {
	Log      hclog.Logger
	Resolver Resolver                                                             // net.DefaultResolver
	Meters   func(owner string) Meters                                            // nowhere
	Dial     func(ctx context.Context, network, address string) (net.Conn, error) // instead of the dial of dial.go

	// Secure makes a connection to a target ready to be asked for Health.Path,
	// by a TLS handshake for instance. It returns c itself where the owner
	// speaks plaintext to the target. The caller closes c after an error, which
	// counts as a failed check unless it is context.Canceled: then nothing can
	// be said of the endpoint, for want of an identity for instance. Nil: all
	// is plaintext.
	Secure func(ctx context.Context, owner, target string, c net.Conn) (net.Conn, error)
}

// Meters are where the owner of groups is told of in numbers.
type Meters struct {
	Endpoints, Healthy, Idle        *telemetry.Gauge // Idle is a second behind
	ConnectFailures, LookupFailures *telemetry.Counter
	Ejections, Retries              *telemetry.Counter
}

func noMeters(string) Meters {
	return Meters{
		Endpoints: new(telemetry.Gauge), Healthy: new(telemetry.Gauge), Idle: new(telemetry.Gauge),
		ConnectFailures: new(telemetry.Counter), LookupFailures: new(telemetry.Counter),
		Ejections: new(telemetry.Counter), Retries: new(telemetry.Counter),
	}
}

// Set holds the targets that are in use. Those of one owner with the same
// address and settings are one: a group that is taken before another one is
// released finds their addresses, health and counts as they are.
type Set struct {
	Options
	base time.Time    // what the clock counts from
	news bell         // rings when a lookup has ended
	tick atomic.Int64 // seconds that the sweeper has counted

	sweeping atomic.Bool // there is a sweeper
	over     atomic.Bool // nothing is kept any more

	ctx    context.Context // ends with the set
	cancel context.CancelFunc
	work   sync.WaitGroup // lookups, checks and the sweeper

	mu      sync.Mutex // guards the following
	targets map[key]*target
	started bool
	closed  bool
}

// key is what makes two targets one.
type key struct {
	owner, address string
	health         Health
	ejection       Ejection
	limits         limits
}

// NewSet returns an empty set.
func NewSet(o Options) *Set {
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	if o.Resolver == nil {
		o.Resolver = net.DefaultResolver
	}
	if o.Meters == nil {
		o.Meters = noMeters
	}
	s := &Set{Options: o, base: time.Now(), targets: map[key]*target{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Take returns a group of targets for an owner, the listener in whose name
// they are counted. The same Release gives it back.
func (s *Set) Take(owner string, targets []string, settings Settings) (*Group, error) {
	if err := settings.Check(); err != nil {
		return nil, err
	}
	if len(targets) == 0 {
		return nil, errors.New("no target")
	}
	for _, address := range targets {
		if err := CheckTarget(address); err != nil {
			return nil, err
		}
	}
	settings = settings.withDefaults()
	g := &Group{set: s, owner: owner, balance: settings.Balance, targets: make([]*target, 0, len(targets))}
	g.line.most = settings.MaxPending
	kept := limits{settings.MaxIdle, settings.MaxRequests, settings.MaxConnections, settings.IdleTimeout}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, address := range targets {
		k := key{owner, address, settings.Health, settings.Ejection, kept}
		t := s.targets[k]
		if t == nil {
			t = newTarget(s, k)
			s.targets[k] = t
			if s.started && !s.closed {
				t.start()
			}
		}
		t.refs++
		g.targets = append(g.targets, t)
	}
	g.Budget.init(s, settings.RetryPercent, g.targets[0].meters.Retries)
	s.recountLocked(owner)
	return g, nil
}

// Start begins lookups and checks, of the groups there are and of those that
// are taken later.
func (s *Set) Start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started || s.closed {
		return
	}
	s.started = true
	for _, t := range s.targets {
		t.start()
	}
}

// Close ends lookups and checks, waits for them and closes idle connections.
func (s *Set) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.over.Store(true)
	s.cancel()
	s.work.Wait()
	for _, e := range s.endpoints() {
		e.empty()
	}
}

// endpoints returns those of all targets.
func (s *Set) endpoints() []*endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*endpoint
	for _, t := range s.targets {
		all = append(all, t.addresses()...)
	}
	return all
}

// release gives targets back. What nobody uses any more ends.
func (s *Set) release(owner string, targets []*target) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range targets {
		if t.refs--; t.refs == 0 {
			delete(s.targets, t.key)
			t.cancel()
		}
	}
	s.recountLocked(owner)
}

// recount tells an owner's meters how many endpoints there are, and how many
// are healthy.
func (s *Set) recount(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recountLocked(owner)
}

func (s *Set) recountLocked(owner string) {
	all, healthy := 0, 0
	var meters *Meters
	for k, t := range s.targets {
		if k.owner != owner {
			continue
		}
		meters = &t.meters
		for _, e := range t.addresses() {
			all++
			if e.healthy() {
				healthy++
			}
		}
	}
	if meters != nil {
		meters.Endpoints.Set(float64(all))
		meters.Healthy.Set(float64(healthy))
	}
}

// clock is the time since the set was made, in ns, and never zero.
func (s *Set) clock() int64 { return int64(time.Since(s.base)) + 1 }

// CheckTarget returns why an address cannot be a target, or nil.
func CheckTarget(address string) error {
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		if path == "" {
			return fmt.Errorf("%q: names no path", address)
		}
		return nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%q: want host:port or unix:/path: %w", address, err)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%q: want a port number from 1 to 65535", address)
	}
	if host == "" {
		return fmt.Errorf("%q: names no host", address)
	}
	return nil
}

// bell wakes all who listen.
type bell struct {
	mu sync.Mutex // guards ch
	ch chan struct{}
}

// listen returns a channel that is closed when the bell next rings.
func (b *bell) listen() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
