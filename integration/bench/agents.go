package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/narthex-id/narthex/integration/internal/bareclient"
	"github.com/narthex-id/narthex/integration/internal/figures"
)

// agentKind is one of the agents that are measured.
type agentKind struct {
	name    string
	config  string // its template
	command func(b *bench, config string) ([]string, error)
}

var allAgents = []*agentKind{
	{ours, "narthex-agent.yaml", func(b *bench, config string) ([]string, error) {
		return []string{b.narthex, "agent", "-c", config}, nil
	}},
	{spireAgent, "spire-agent.conf", func(_ *bench, config string) ([]string, error) {
		program, err := tool("NARTHEX_SPIRE", "spire", "spire-agent")
		return []string{program, "run", "-config", config}, err
	}},
}

// agentRun is one SPIRE Server and what is measured of each agent on it. Each
// time an agent is a fresh process with an empty data directory.
type agentRun struct {
	entries int           // on the server, that of the caller among them
	cache   int           // X.509-SVIDs that an agent is to keep ready
	ttl     time.Duration // of X.509-SVIDs; 0: an hour
	long    bool          // three rounds of five are enough
	steps   []func(context.Context, *bench, *agent) error
}

// defaultCache is what both agents keep ready when nobody says otherwise.
const defaultCache = 1000

// fewEntries is an agent as most nodes have it.
var fewEntries = agentRun{entries: 10, cache: defaultCache, steps: []func(context.Context, *bench, *agent) error{
	measureStart, measureRest(rowAgentRest), measureIdleAgent(rowAgentIdle), measureHeld, measureFetches, measureJWTs, measureLatencyAgent,
}}

// run measures agents beside each other.
func (r agentRun) run(ctx context.Context, b *bench) error {
	if b.quick {
		r.entries, r.ttl = max(10, b.scaled(r.entries)), r.ttl/4
	}
	kinds := slices.DeleteFunc(slices.Clone(allAgents), func(k *agentKind) bool { return !b.measures(k.name) })
	s, err := b.startServer(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.addEntries(ctx, r.entries, r.ttl); err != nil {
		return err
	}
	rounds := b.pairs
	if r.long {
		rounds = (3*b.pairs + 4) / 5
	}
	tokens, err := s.tokens(ctx, rounds*len(kinds))
	if err != nil {
		return err
	}
	// The server shows agents its entries, those that come with a token among
	// them, from a cache it makes every 5 s.
	if err := pause(ctx, 6*time.Second); err != nil {
		return err
	}
	return b.roundsOf(ctx, rounds, len(kinds), func(side int) error {
		token := tokens[0]
		tokens = tokens[1:]
		if err := r.measure(ctx, b, kinds[side], s, token); err != nil {
			return fmt.Errorf("%s: %w", kinds[side].name, err)
		}
		return nil
	})
}

// agent is a running one.
type agent struct {
	*process
	run    *agentRun
	server *spireServer
	dir    string
	name   string
	socket string
	begun  time.Time
}

// measure takes one agent through all steps.
func (r *agentRun) measure(ctx context.Context, b *bench, kind *agentKind, s *spireServer, token string) error {
	a := &agent{run: r, server: s, name: kind.name}
	if err := a.start(b, kind, token); err != nil {
		return err
	}
	defer a.stop()
	if err := a.firstSVID(ctx); err != nil {
		return err
	}
	for _, step := range r.steps {
		if err := step(ctx, b, a); err != nil {
			return errors.Join(err, a.ended())
		}
	}
	return nil
}

func (a *agent) start(b *bench, kind *agentKind, token string) (err error) {
	if a.dir, err = b.folder(); err != nil {
		return err
	}
	a.socket = filepath.Join(a.dir, "api.sock")
	config, err := fill(a.dir, kind.config, map[string]string{
		"Host": a.server.host, "Port": a.server.port, "Dir": a.dir, "TrustDomain": trustDomain,
		"Bundle": a.server.bundle, "Token": token, "Cache": itoa(a.run.cache),
	})
	if err != nil {
		return err
	}
	command, err := kind.command(b, config)
	if err != nil {
		return err
	}
	cmd := exec.Command(command[0], command[1:]...)
	profiled := kind.name == ours && b.profiles != ""
	if profiled {
		cmd.Env = append(os.Environ(), "NARTHEX_CPU_PROFILE="+filepath.Join(b.profiles, filepath.Base(a.dir)+".pprof"))
	}
	a.begun = time.Now()
	if a.process, err = b.keeper.start(cmd, filepath.Join(a.dir, "output")); err == nil && profiled {
		a.first = syscall.SIGUSR1
	}
	return err
}

// firstSVID asks until there is one.
func (a *agent) firstSVID(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		stream, err := bareclient.FetchX509SVID(ctx, a.socket)
		if err == nil {
			return stream.Close()
		}
		if gone := a.ended(); gone != nil {
			return gone
		}
		if pause(ctx, 5*time.Millisecond) != nil {
			return fmt.Errorf("no SVID: %w\n%s", err, a.said())
		}
	}
}

// measureStart adds the time to the first SVID, which was just had.
func measureStart(_ context.Context, b *bench, a *agent) error {
	b.results.add(rowAgentStart, a.name, time.Since(a.begun).Seconds()*1e3)
	return nil
}

// measureRest measures the memory of an agent of which nobody wants anything.
func measureRest(r *row) func(context.Context, *bench, *agent) error {
	return func(ctx context.Context, b *bench, a *agent) error {
		if err := pause(ctx, silence); err != nil {
			return err
		}
		rest, err := memory(a.pid())
		if err == nil {
			b.results.add(r, a.name, rest/mib)
		}
		return err
	}
}

// idleTime is several times as long as agents wait before they ask the server
// for changes.
const idleTime = 20 * time.Second

// measureIdleAgent measures the CPU time of an agent of which nobody wants
// anything.
func measureIdleAgent(r *row) func(context.Context, *bench, *agent) error {
	return func(ctx context.Context, b *bench, a *agent) error {
		used, took, err := a.uses(func() error { return pause(ctx, b.lasting(idleTime)) })
		if err == nil {
			b.results.add(r, a.name, 100*used.Seconds()/took.Seconds())
		}
		return err
	}
}

// uses returns the CPU time that the agent uses while do is done, and how long
// that takes.
func (a *agent) uses(do func() error) (used, took time.Duration, err error) {
	before, err := cpuTime(a.pid())
	if err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	if err := do(); err != nil {
		return 0, 0, err
	}
	took = time.Since(begin)
	after, err := cpuTime(a.pid())
	return after - before, took, err
}

// measureHeld measures the memory of held streams.
func measureHeld(ctx context.Context, b *bench, a *agent) error {
	rest, err := memory(a.pid())
	if err != nil {
		return err
	}
	n := b.scaled(500)
	streams := make(chan net.Conn, n)
	defer func() {
		for range len(streams) {
			_ = (<-streams).Close()
		}
	}()
	err = share(ctx, 8, n, func(ctx context.Context) error {
		stream, err := bareclient.FetchX509SVID(ctx, a.socket)
		if err == nil {
			streams <- stream
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("hold streams: %w", err)
	}
	if err := pause(ctx, silence); err != nil {
		return err
	}
	held, err := memory(a.pid())
	if err == nil {
		b.results.add(rowAgentStream, a.name, (held-rest)/kib/float64(n))
	}
	return err
}

// fetch connects to a Workload API and waits for an answer. The connection is
// the caller's to close.
type fetch func(ctx context.Context, socket string) (net.Conn, error)

// measureFetches measures fetches of X.509-SVIDs by eight clients.
func measureFetches(ctx context.Context, b *bench, a *agent) error {
	return a.measureRate(ctx, b, bareclient.FetchX509SVID, rowAgentFetch, rowAgentCPU)
}

// measureJWTs does the same with JWT-SVIDs.
func measureJWTs(ctx context.Context, b *bench, a *agent) error {
	jwt, err := bareclient.NewJWT("spiffe://" + trustDomain + "/audience")
	if err != nil {
		return err
	}
	return a.measureRate(ctx, b, jwt.Fetch, rowAgentJWT, rowAgentJWTCPU)
}

// measureRate measures fetches by eight clients, each on a new connection: how
// many there are in a second, and the agent's CPU time for one.
func (a *agent) measureRate(ctx context.Context, b *bench, f fetch, perSecond, cpu *row) error {
	if _, err := a.fetches(ctx, f, 8, 300*time.Millisecond); err != nil { // warm
		return err
	}
	var times []float64
	used, took, err := a.uses(func() (err error) {
		times, err = a.fetches(ctx, f, 8, b.lasting(2*time.Second))
		return err
	})
	if err == nil {
		b.results.add(perSecond, a.name, float64(len(times))/took.Seconds())
		b.results.add(cpu, a.name, used.Seconds()*1e6/float64(len(times)))
	}
	return err
}

// measureLatencyAgent measures fetches by one client.
func measureLatencyAgent(ctx context.Context, b *bench, a *agent) error {
	times, err := a.fetches(ctx, bareclient.FetchX509SVID, 1, b.lasting(time.Second))
	if err == nil {
		b.results.add(rowAgentLatency, a.name, figures.Quantile(times, 0.5)*1e3)
	}
	return err
}

// lasting returns d, or a tenth of it with -quick.
func (b *bench) lasting(d time.Duration) time.Duration { return time.Duration(b.scaled(int(d))) }

// fetches has clients fetch for some time and returns how long each fetch
// took, in seconds.
func (a *agent) fetches(ctx context.Context, f fetch, clients int, lasting time.Duration) ([]float64, error) {
	until := time.Now().Add(lasting)
	var mu sync.Mutex // guards all
	var all []float64
	err := share(ctx, clients, clients, func(ctx context.Context) error {
		var mine []float64
		for begin := time.Now(); begin.Before(until); begin = time.Now() {
			c, err := f(ctx, a.socket)
			if err != nil {
				return fmt.Errorf("fetch: %w", err)
			}
			mine = append(mine, time.Since(begin).Seconds())
			_ = c.Close() // it has served
		}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, mine...)
		return nil
	})
	if err == nil && len(all) == 0 {
		err = errors.New("not a single fetch ended in time")
	}
	return all, err
}
