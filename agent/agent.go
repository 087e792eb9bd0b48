// Package agent is the half of Narthex that has identities to give: it
// attests its node to a SPIRE Server, keeps entries, bundles and SVIDs in
// step with it, and serves them to the workloads of the node.
//
//	a, err := agent.New(agent.Config{…}) // takes the lease of data_dir, opens the socket
//	if err != nil { … }
//	err = a.Run(ctx)                     // until ctx ends
//
// An agent may take the place of one that runs (Successor), which lets go of it
// (LetGo): at no moment do two of them speak to the server.
//
// Everything that changes, changes in one goroutine, the loop of Run: attest
// or renew, sync, sign, sleep until something is due. Only tokens are signed
// beside it, when somebody asks. The calls it makes are
// in agent/spire, what it knows in agent/registry, the sockets it serves in
// agent/endpoint. It leaves to cmd/narthex where its configuration comes
// from, and to internal/telemetry/expose how its figures are shown.
package agent

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/agent/bootstrap"
	"github.com/narthex-id/narthex/agent/endpoint"
	"github.com/narthex-id/narthex/agent/keys"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// Config is what an agent needs. Fields without a default named here are
// required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	DataDir     string // made with mode 0700 where it is missing
	Version     string // told to the server

	Server             string // host:port of the SPIRE Server
	RequirePQKEM       bool
	InsecureBootstrap  bool              // trust whatever server answers first
	Bootstrap          *bootstrap.Source // asked before each attestation without a saved bundle; may be nil with InsecureBootstrap
	Rebootstrap        Rebootstrap
	Node               attestor.Node
	Keys               keys.Store // default: in DataDir
	TakeOver           *TakeOver  // nil: no spire-agent was here before
	WorkloadAttestors  []attestor.Workload
	WorkloadKeyType    string        // ec-p256 (default), ec-p384, rsa-2048
	SyncInterval       time.Duration // default 5 s, jittered by ±10 %
	X509Cache          int           // SVIDs signed before they are asked for; default 1000
	JWTCache           int           // JWT-SVIDs and WIT-SVIDs kept for who asks next; default 1000
	AvailabilityTarget time.Duration // see registry.Options

	AllowUnauthenticatedVerifiers bool     // see endpoint.Config
	ForeignJWTClaims              []string // likewise

	Socket  string       // path of the Workload API
	SDS     endpoint.SDS // on the same socket
	Inherit net.Listener // for Successor: what the agent before us served at Socket; nil: Socket is opened

	AdminSocket  string        // path of the admin socket; empty: there is none
	AdminInherit net.Listener  // as Inherit
	Delegates    []spiffeid.ID // see endpoint.AdminConfig

	Broker Broker // the zero Broker: there is no broker endpoint

	Metrics *telemetry.Metrics
	Log     hclog.Logger // its level is what the admin socket changes

	minPause time.Duration // default minPause; tests have less time
}

// Agent is a running agent. Make it with New.
type Agent struct {
	cfg      Config
	log      hclog.Logger
	dir      *dataDir
	registry *registry.Registry
	client   *spire.Client
	server   *endpoint.Server
	admin    *endpoint.Server   // nil: there is none
	brokers  []*endpoint.Server // of the broker endpoint, one for each of its sockets
	metrics  metrics
	tokens   *tokens
	wake     chan struct{} // holds one token when somebody waits for a sync
	due      chan struct{} // holds one token when a watch has made signing due
	renewed  chan struct{} // holds one token when the file of the bootstrap bundle has changed
	turn     turn          // to speak to the server
	stale    bool          // another agent had the lease since; whoever has the turn may touch it
	warned   bool          // of another node attestor; touched by CouldBegin, then by the loop
	attests  atomic.Bool   // an attestor has been able to attest

	mu     sync.Mutex // guards the following
	flight *flight    // the sync that callers wait for, nil when none do
	chase  chase      // what they make the agent ask
	view   view       // what Status and Unready tell
}

// view is what others may know of the loop's progress.
type view struct {
	id        spiffeid.ID
	chain     []*x509.Certificate // of the agent's SVID, never written to
	expires   time.Time
	attested  time.Time // when the node last was, by this process
	entries   int       // that the last sync brought
	synced    bool
	lastSync  time.Time
	reachable bool
	since     time.Time
	problem   error
	banned    bool
	signed    issue // what the server has signed last
}

// flight is one sync on behalf of all who asked before it began.
type flight struct {
	done  chan struct{}
	err   error
	asked []question // for which it is made, maxAsked of them
}

// question is whether there is an entry for a caller.
type question struct {
	user      string // whose caller it is
	selectors []attestor.Selector
}

// maxAsked bounds the callers whose selectors are held against what a sync
// brought. There are seldom more than a few; the rest have the server asked
// again when they call again.
const maxAsked = 64

// New takes the lease of the data directory, reads what an earlier run left
// there and opens the Workload API socket, so that callers are answered from
// the first moment. It speaks to no server. The error is a *HeldError where
// another agent has the lease: see Successor; it tells of a spire-agent that runs
// on what is to be taken over.
func New(cfg Config) (*Agent, error) {
	a, err := newAgent(cfg)
	if err != nil {
		return nil, err
	}
	if err := cfg.TakeOver.alone("/proc"); err != nil {
		return nil, err
	}
	if err := a.dir.take(); err != nil {
		return nil, err
	}
	if err := a.open(); err != nil {
		return nil, errors.Join(err, a.dir.close())
	}
	return a, nil
}

// newAgent makes an agent that holds nothing yet.
func newAgent(cfg Config) (*Agent, error) {
	if cfg.SyncInterval <= 0 {
		cfg.SyncInterval = 5 * time.Second
	}
	if cfg.minPause <= 0 {
		cfg.minPause = minPause
	}
	if cfg.JWTCache <= 0 {
		cfg.JWTCache = 1000
	}
	if cfg.WorkloadKeyType == "" {
		cfg.WorkloadKeyType = "ec-p256"
	}
	dir, err := openDataDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg:     cfg,
		log:     cfg.Log,
		dir:     dir,
		metrics: newMetrics(cfg.Metrics),
		wake:    make(chan struct{}, 1),
		due:     make(chan struct{}, 1),
		renewed: make(chan struct{}, 1),
		turn:    turn{token: make(chan struct{}, 1)},
		view:    view{problem: errNotAttested, since: time.Now()},
	}
	a.tokens = newTokens(cfg.JWTCache, a.log, a.metrics.tokens, a.signToken)
	return a, nil
}

var errNotAttested = errors.New("the agent is starting and has not attested its node yet")

// open makes what New needs beside the lease.
func (a *Agent) open() error {
	if a.cfg.Keys == nil {
		store, err := keys.Disk(a.dir.path + "/keys")
		if err != nil {
			return err
		}
		a.cfg.Keys = store
	}
	a.registry = registry.New(registry.Options{
		TrustDomain:        a.cfg.TrustDomain,
		CacheSize:          a.cfg.X509Cache,
		AvailabilityTarget: a.cfg.AvailabilityTarget,
		Jitter:             jitter,
	})
	client, err := spire.New(spire.Config{
		Address:      a.cfg.Server,
		TrustDomain:  a.cfg.TrustDomain,
		RequirePQKEM: a.cfg.RequirePQKEM,
		Log:          a.log.Named("spire"),
	})
	if err != nil {
		return err
	}
	a.client = client
	a.server, err = endpoint.Listen(endpoint.Config{
		Socket:    a.cfg.Socket,
		Listener:  a.cfg.Inherit,
		Agent:     a,
		Attestors: a.cfg.WorkloadAttestors,
		SDS:       a.cfg.SDS,

		AllowUnauthenticatedVerifiers: a.cfg.AllowUnauthenticatedVerifiers,
		ForeignJWTClaims:              a.cfg.ForeignJWTClaims,

		Metrics: a.cfg.Metrics,
		Log:     a.log.Named("endpoint"),
	})
	if err == nil && a.cfg.AdminSocket != "" {
		if err = a.openAdmin(); err != nil {
			err = errors.Join(err, a.server.Close())
		}
	}
	if err == nil {
		if err = a.openBrokers(); err != nil {
			if a.admin != nil {
				err = errors.Join(err, a.admin.Close())
			}
			err = errors.Join(err, a.server.Close())
		}
	}
	if err != nil {
		return errors.Join(err, client.Close())
	}
	return nil
}

// Run serves until ctx ends, then ends every stream, waits for every
// goroutine and gives the lease back. It does not return because a server is
// away or refuses the agent: it says so to callers, and tries again.
func (a *Agent) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range a.servers() {
		g.Go(func() error { return s.Serve(ctx) })
	}
	g.Go(func() error { return a.loop(ctx) })
	g.Go(func() error { return a.tokens.run(ctx) })
	if a.cfg.Bootstrap != nil {
		g.Go(func() error { a.cfg.Bootstrap.Follow(ctx, func() { poke(a.renewed) }); return nil })
	}
	for _, w := range a.cfg.WorkloadAttestors {
		if r, ok := w.(attestor.Runner); ok {
			g.Go(func() error { return r.Run(ctx) })
		}
	}
	return errors.Join(g.Wait(), a.client.Close(), a.dir.close())
}

// Close gives up an agent that was never Run.
func (a *Agent) Close() error {
	var err error
	for _, s := range a.servers() {
		err = errors.Join(err, s.Close())
	}
	return errors.Join(err, a.client.Close(), a.dir.close())
}

// Watch implements endpoint.Agent. Where it is the first to ask for an entry
// beyond those that are signed ahead, the loop is told.
func (a *Agent) Watch(selectors []attestor.Selector) *registry.Watch {
	w := a.registry.Watch(selectors)
	if w.Due(time.Now()) {
		poke(a.due)
	}
	return w
}

// poke leaves a token in c, unless there is one already.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Sync implements endpoint.Agent: it returns once a sync that began after the
// call has been applied, or with the reason why none was. All callers share
// one sync, and there are at most two a second. A caller that was denied
// lately, and one for which none is left (see chase), has nobody asked: what
// is known is an interval old at most, and the answer is there at once or,
// while the server is asked each second anyway, with that.
//
// Where the server has no entry at all for a node that has just attested, that
// tells nothing yet (see settleFor): the caller waits for further syncs, and
// what it is told in the end is errUnsettled.
func (a *Agent) Sync(ctx context.Context, user string, selectors []attestor.Selector) error {
	if err := a.Unready(); err != nil {
		return err
	}
	for {
		f, err := a.board(question{user, selectors}, time.Now())
		if f == nil {
			return cmp.Or(err, a.unsettled(time.Now()))
		}
		select {
		case <-f.done:
			if f.err != nil || a.unsettled(time.Now()) == nil {
				return f.err
			}
		case <-ctx.Done():
			return cmp.Or(a.unsettled(time.Now()), fmt.Errorf("wait for a sync with the server: %w", ctx.Err()))
		}
	}
}

// board returns the sync to wait for: one that is asked for now, or the next of
// those that are made anyway. Where neither comes soon it is nil, and the error
// says why what is known may be old.
func (a *Agent) board(q question, now time.Time) (*flight, error) {
	key := selectorsKey(q.selectors)
	a.mu.Lock()
	defer a.mu.Unlock()
	soon := a.chase.on(now)
	// Until that tells anything, one question more would be spent in vain.
	asks := (!soon || a.view.settled(now)) && !a.chase.known(key, now) && a.chase.take(q.user, now, a.cfg.SyncInterval)
	if !asks && !soon {
		return nil, a.view.problem
	}
	if a.flight == nil {
		a.flight = &flight{done: make(chan struct{})}
	}
	if asks {
		if len(a.flight.asked) < maxAsked {
			a.flight.asked = append(a.flight.asked, q)
		}
		poke(a.wake)
	}
	return a.flight, nil
}

// Unready implements endpoint.Agent: nil once entries have been synced, else
// the reason why no caller can be answered yet, and what a person can do.
func (a *Agent) Unready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.view.banned:
		return a.view.problem
	case a.view.synced:
		return nil
	case a.view.problem == nil:
		return errors.New("the agent has not synced with the server yet")
	}
	return a.view.problem
}

// Problem implements endpoint.Agent: nil while all is well, else why the agent
// cannot go on, or what is wrong with the clock.
func (a *Agent) Problem() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.view.trouble(time.Now())
}

func (v *view) trouble(now time.Time) error { return cmp.Or(v.problem, v.signed.wrong(now)) }

// Status tells what the agent knows of itself.
func (a *Agent) Status() *telemetry.AgentStatus {
	entries, identities := a.registry.Status()
	attestors := a.attestorsStatus()
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &telemetry.AgentStatus{
		ExpiresAt:  a.view.expires,
		Server:     a.cfg.Server,
		Reachable:  a.view.reachable,
		Since:      a.view.since,
		LastSync:   a.view.lastSync,
		Entries:    entries,
		Streams:    a.server.Streams(),
		Attestors:  attestors,
		Identities: identities,
	}
	if !a.view.id.IsZero() {
		s.ID = a.view.id.String()
	}
	if problem := a.view.trouble(time.Now()); problem != nil {
		s.Problem = problem.Error()
	}
	return s
}

// update changes the view under its lock.
func (a *Agent) update(change func(*view)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change(&a.view)
}
