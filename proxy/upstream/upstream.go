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
//	loan, err := group.Borrow(ctx, upstream.Wish{Timeout: 5 * time.Second, Key: key}, &tried)
//	…
//	if loan.Kept == nil { … } // loan.Conn is fresh: TLS, if any, is the borrower's
//	…
//	loan.Return(keeper) // or Close, when the connection is not to be used again
//
// Where the far end takes many requests at a time on one connection, the borrower
// that made it shares it, and its loan goes on beside those of others:
//
//	loan, err := group.Borrow(ctx, upstream.Wish{Timeout: 5 * time.Second, Key: key, Shares: true}, &tried)
//	…
//	if loan.Kept == nil { … loan.Share(connection) } // or Alone, where it does not
//	…
//	loan.Close() // of the loan alone
//
// Read lend.go for that, shared.go for connections that are shared, making.go
// for those that wait until there is one, idle.go for what lies between two
// loans and line.go for borrowers that wait for room; budget.go bounds their
// retries.
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
	protocol       string
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
		k := key{owner, address, settings.Health, settings.Ejection, kept, settings.Protocol}
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
// Shared ones end with their last loan.
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
