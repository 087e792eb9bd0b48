// Package proxy carries connections between workloads and lets only those
// through whose two ends proved a SPIFFE ID and whom the policy allows.
//
// An inbound listener takes mTLS in and speaks plaintext to the local
// service; an outbound one takes plaintext from a local caller and speaks
// mTLS to a peer that must be whom `expect` names.
//
//	source, err := identity.NewWorkloadAPI(identity.WorkloadAPIConfig{Socket: "/run/spire/sockets/agent.sock"})
//	…
//	p, err := proxy.New(proxy.Config{Listeners: listeners, Policy: rules, Identities: source})
//	…
//	err = p.Run(ctx) // until ctx ends, then drains
//	…
//	applied, err := p.Apply(newer) // at any time: listeners, policy, identities
//
// Follow one connection: listener.go accepts it on a socket (socket.go) and
// registers it under the settings of that moment (settings.go), conn.go walks it
// from there to the access record. On the way proxyproto.go reads who was there
// before it, hello.go waits for its first words and plaintext.go tells them from
// TLS, turn.go has its handshake compute in turn, tls.go says with what, share.go
// counts it among its peer's, live.go decides, and decides again while it lives,
// limit.go counts what the policy limits, and route.go says where it goes. wire.go and copy.go move its bytes; park.go
// holds it while there are none. due.go is what time does to it and how it is
// ended, when table.go says so; minute.go asks where rules go by the time, and
// domains.go whether the trust domains that they name are known.
//
// Follow a change: apply.go puts listeners and rules in force as one,
// handover.go passes the sockets to the process that takes this one's place.
//
// Who a peer is and whom we speak as is the business of proxy/identity, what
// is decided that of proxy/policy, and which address is dialled that of
// proxy/upstream.
package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// Config is what a proxy runs on. MaxConnections bounds the connections of all
// listeners together, as Listener.MaxConnections those of one; 0 is no bound.
// Metrics, Access and Log are taken once, by New; all three may be nil.
type Config struct {
	Listeners  []Listener
	Policy     *policy.Policy // nil denies everything
	Identities identity.Source

	// TrustDomain is what the proxy's identity is said to be of; zero: nothing
	// is said. Another one is warned of.
	TrustDomain spiffeid.TrustDomain

	// Sockets is asked for a listening socket before one is opened: one that
	// was handed over or that systemd made. Nil, and a nil socket: one is
	// opened. It is asked once for each listener that is added.
	Sockets func(name, bind string) net.Listener

	MaxConnections int

	Metrics *telemetry.Metrics
	Access  *telemetry.AccessLog
	Log     hclog.Logger
}

// Listener is one way in. Zero values of the fields below Expect mean the
// default that stands beside them.
type Listener struct {
	Name      string // unique
	Direction policy.Direction
	Bind      string        // host:port or unix:/path
	Targets   []string      // host:port or unix:/path, at least one where there are no Routes, and at most MaxTargets
	Routes    []Route       // inbound: the first that takes a connection leads it, before Targets
	Identity  identity.Pick // which of our SVIDs it presents
	Expect    []policy.Pattern
	Upstream  upstream.Settings // how one of Targets is chosen

	HTTP             *HTTP    // the connection carries HTTP, and each request is decided; nil: bytes, decided once
	UpstreamProtocol Protocol // with HTTP, what requests are sent to Targets in: ProtocolAuto

	Mode        Mode        // inbound: ModeStrict
	Enforcement Enforcement // Enforce

	ALPN          []string // protocols offered, or, inbound, accepted beside those of Routes, the preferred first; with HTTP inbound alone, and of its Versions: all of them
	ServerName    string   // outbound: the SNI that is sent; the host of the target
	ProxyProtocol ProxyProtocol

	Timeouts       Timeouts
	OnPolicyChange Action        // of connections the new policy refuses: ActionClose
	OnPeerExpiry   Action        // of connections whose peer's SVID has expired: ActionKeep, with HTTP ActionDrain
	MaxAge         time.Duration // of a connection; 0: unbounded
	MaxConnections int           // at once, 10,000; clients that have not proved who they are make room, then further ones wait in the kernel's backlog
	MaxPerIdentity int           // live connections of one peer: by its SPIFFE ID, in plaintext by the address it comes from; 0: unbounded
	MaxHandshakes  int           // that compute at once, twice GOMAXPROCS; those that wait for their peer are none of them
	UnixMode       os.FileMode   // of a unix socket that Bind creates, 0660: who may connect speaks as us

	// Socket is a listening socket that was inherited; Bind then only
	// names it.
	Socket net.Listener
}

// MaxTargets is how many targets a listener can have.
const MaxTargets = 64

// Timeouts bound what a peer can make us wait for. Zero is the default. A
// negative Idle is no idle timeout, and a negative Drain is no time at all.
type Timeouts struct {
	Handshake time.Duration // TLS, of which a client may take 3s to send its hello: 10s
	Connect   time.Duration // to the target: 5s
	Idle      time.Duration // without a byte either way: 5m; noticed up to a quarter late
	Drain     time.Duration // for connections that are to end: 30s; negative: at once

	// Of an HTTP listener alone.
	Head     time.Duration // for the first request of a connection, and for each head from its first byte on: 10s
	Response time.Duration // from the last of a request that was sent to the head of the response: 1m
	Stall    time.Duration // without a byte of a request's body, or with the client or the service taking none: 30s
}

// Action is what becomes of a connection that is no longer what it was
// allowed as.
type Action int

// The actions. ActionDefault depends on what it is for.
const (
	ActionDefault Action = iota
	ActionClose          // at once
	ActionDrain          // it may end by itself within Timeouts.Drain
	ActionKeep           // it may go on
)

var actionWords = [...]string{ActionDefault: "", ActionClose: "close", ActionDrain: "drain", ActionKeep: "keep"}

// String returns the word configuration files use.
func (a Action) String() string { return actionWords[a] }

// UnmarshalText reads close, drain or keep.
func (a *Action) UnmarshalText(text []byte) error {
	for n, word := range actionWords {
		if n > 0 && word == string(text) {
			*a = Action(n)
			return nil
		}
	}
	return fmt.Errorf("%q: want close, drain or keep", text)
}

// ErrStopped is returned by Apply once the proxy has stopped and its last
// connection has ended, and by Run once it has stopped.
var ErrStopped = errors.New("proxy has stopped")

// Proxy is a set of listeners with their live connections.
type Proxy struct {
	log         hclog.Logger
	access      *telemetry.AccessLog
	instruments *instruments
	table       *table
	lot         *lot
	world       atomic.Pointer[world]
	limits      *limiter    // of the policy
	slots       gate        // taken by every connection, beside its listener's
	draining    atomic.Bool // Run's context has ended
	upstreams   *upstream.Set
	hosts       sync.WaitGroup // goroutines that wait with connections to services
	domains     domainNotes

	applying sync.Mutex     // one Apply at a time
	retired  sync.WaitGroup // listeners that were removed and drain

	mu         sync.Mutex // guards the following, and world while it is swapped
	identities identity.Source
	running    bool
	stopped    bool // nothing is accepted any more
	ended      bool // Run has no connection any more
}

// world is what every decision and every dial depends on, swapped as one:
// rules are written for the listeners they come with, so that a connection
// that is decided by one policy must not reach the target of another. It is
// immutable.
type world struct {
	policy      *policy.Policy
	trustDomain spiffeid.TrustDomain // as configured; zero: it is not
	most        int                  // connections at once; 0: unbounded
	generation  uint64
	loaded      time.Time
	listeners   map[*listener]*settings // those in force
}

// sorted returns the listeners in force by name.
func (w *world) sorted() []*listener {
	return slices.SortedFunc(maps.Keys(w.listeners), func(a, b *listener) int { return cmp.Compare(a.name, b.name) })
}

// named returns the listener in force of that name, or nil.
func (w *world) named(name string) *listener {
	for l := range w.listeners {
		if l.name == name {
			return l
		}
	}
	return nil
}

// New checks the configuration and binds the sockets, so that mistakes and
// taken addresses show at once. Connections are accepted by Run; Close gives
// the sockets back when Run is never called.
func New(c Config) (*Proxy, error) {
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	lot, err := newLot()
	if err != nil {
		return nil, err
	}
	p := &Proxy{
		log: c.Log, access: c.Access, instruments: newInstruments(c.Metrics), table: newTable(), lot: lot, limits: newLimiter(time.Now),
	}
	p.upstreams = upstream.NewSet(upstream.Options{Log: c.Log, Meters: p.instruments.upstream})
	p.world.Store(&world{})
	if _, err := p.Apply(c); err != nil {
		lot.close()
		return nil, err
	}
	return p, nil
}

// Run accepts connections until ctx ends, then drains: it stops accepting,
// gives live connections the drain time of their listener to end, ends the
// rest, and returns when all of them are gone. It can be called once. The cause
// of ctx (context.Cause), where it is more than that it was cancelled, is the
// reason that drained connections are recorded with.
func (p *Proxy) Run(ctx context.Context) error {
	tableCtx, stopTable := context.WithCancel(context.Background())
	var tables sync.WaitGroup
	p.mu.Lock()
	if p.running || p.stopped {
		p.mu.Unlock()
		stopTable()
		return ErrStopped
	}
	tables.Go(func() { p.table.run(tableCtx) })
	tables.Go(p.lot.run)
	tables.Go(func() { eachMinute(tableCtx, p.askForTime) }) // also for connections that drain
	defer func() { stopTable(); p.lot.close(); tables.Wait(); p.upstreams.Close(); p.hosts.Wait() }()
	p.running = true
	p.upstreams.Start()
	for l := range p.world.Load().listeners {
		l.start()
	}
	p.mu.Unlock()

	<-ctx.Done()
	p.draining.Store(true)
	p.applying.Lock() // an Apply that has begun ends first
	p.mu.Lock()
	p.stopped = true
	w := p.world.Load() // the last one
	p.mu.Unlock()
	p.applying.Unlock()
	for l := range w.listeners {
		l.stopAccepting()
	}
	if live := len(p.table.of(nil)); live > 0 {
		p.log.Info("draining", "connections", live, "at_most", longestDrain(w))
	}
	why := "the proxy is shutting down"
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		why = cause.Error()
	}
	var drains sync.WaitGroup
	for l, s := range w.listeners {
		drains.Go(func() { l.retire(s, why) })
	}
	drains.Wait()
	p.retired.Wait()
	p.applying.Lock() // one that has begun needs what Run gives back
	defer p.applying.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	return nil
}

// longestDrain is the longest a connection may take to end.
func longestDrain(w *world) time.Duration {
	var longest time.Duration
	for _, s := range w.listeners {
		longest = max(longest, s.Timeouts.Drain)
	}
	return longest
}

// Draining reports whether Run was told to end: no new connection is taken,
// and Run returns when those that live are gone. Status says the same of every
// listener, so that who asks for readiness sends nobody here any more.
func (p *Proxy) Draining() bool { return p.draining.Load() }

// EndNow ends every live connection at once, each with its access record, and
// so the draining of Run: somebody asked twice.
func (p *Proxy) EndNow() {
	for _, c := range p.table.of(nil) {
		c.mu.Lock()
		c.kill(closing{"drain", "the proxy was told to end at once"})
		c.mu.Unlock()
	}
}

// Close gives back the sockets of a proxy that does not run.
func (p *Proxy) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running {
		return
	}
	p.stopped = true
	p.lot.close()
	for l, s := range p.world.Load().listeners {
		l.closeSocket()
		s.give()
	}
	p.upstreams.Close()
}

// Addr returns the address a listener is bound to, or nil when there is no
// such listener.
func (p *Proxy) Addr(name string) net.Addr {
	if l := p.world.Load().named(name); l != nil {
		return l.socket.Addr()
	}
	return nil
}

// askAtOnce is how many connections one goroutine asks before it takes the
// next ones.
const askAtOnce = 64

// asked counts what became of connections that were asked again.
type asked struct {
	all, closed, kept int
	refused           int // those that are not to be, whatever became of them
}

// ask asks every given connection again. All CPUs take part: what is refused by
// now must not go on while others are closed one after the other.
func (p *Proxy) ask(conns []*conn) asked {
	now := time.Now()
	var next atomic.Int64
	var counts [answers]atomic.Int64
	take := func() {
		for {
			end := int(next.Add(askAtOnce))
			if end-askAtOnce >= len(conns) {
				return
			}
			for _, c := range conns[end-askAtOnce : min(end, len(conns))] {
				counts[c.ask(now)].Add(1)
			}
		}
	}
	var asking sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(conns)/askAtOnce) - 1 {
		asking.Go(take)
	}
	take()
	asking.Wait()
	n := asked{closed: int(counts[killed].Load()), kept: int(counts[kept].Load())}
	n.refused = n.closed + n.kept
	n.closed += int(counts[ended].Load())
	n.all = int(counts[passes].Load()) + n.closed + n.kept
	return n
}

// maxStatusConnections bounds how many connections of a listener the status
// document names.
const maxStatusConnections = 100

// maxStatusEndpoints bounds the same of its endpoints.
const maxStatusEndpoints = 100

// Status returns what the proxy knows of itself. Problem and LoadedAt of the
// policy's files are the loader's to fill in.
func (p *Proxy) Status() *telemetry.ProxyStatus {
	p.mu.Lock()
	report, w := p.identities.Report(), p.world.Load()
	p.mu.Unlock()
	s := &telemetry.ProxyStatus{
		Source: report.Source, Problem: report.Problem, Identities: report.Identities, CRLs: report.CRLs,
		Policy: telemetry.PolicyStatus{
			Generation: w.generation, LoadedAt: w.loaded, Files: w.policy.Files(), Rules: w.policy.Rules(),
			Decisions: p.instruments.decisionCounts(),
		},
		MaxConnections: w.most,
		Listeners:      make([]telemetry.ListenerStatus, 0, len(w.listeners)),
	}
	for _, l := range w.sorted() {
		s.Listeners = append(s.Listeners, l.status(w.listeners[l]))
	}
	return s
}
