package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

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

// nodePath is the SPIFFE ID that every agent of the benchmark shares, and
// that the entries have as their parent.
const nodePath = "/node"

// entries on the server, the caller's own among them.
const entries = 10

// measureAgents measures agents beside each other on one real SPIRE Server.
// Each measurement has a fresh process with an empty data directory.
func measureAgents(ctx context.Context, b *bench) error {
	kinds := slices.DeleteFunc(slices.Clone(allAgents), func(k *agentKind) bool { return !b.measures(k.name) })
	s, err := b.startServer(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.addEntries(ctx); err != nil {
		return err
	}
	var tokens []string
	for range b.pairs * len(kinds) {
		token, err := s.token(ctx)
		if err != nil {
			return err
		}
		tokens = append(tokens, token)
	}
	// A server shows agents its entries from a cache it makes every 5 s.
	if err := pause(ctx, 6*time.Second); err != nil {
		return err
	}
	return b.rounds(ctx, len(kinds), func(side int) error {
		token := tokens[0]
		tokens = tokens[1:]
		if err := b.measureAgent(ctx, kinds[side], s, token); err != nil {
			return fmt.Errorf("%s: %w", kinds[side].name, err)
		}
		return nil
	})
}

// spireServer is a running SPIRE Server.
type spireServer struct {
	*process
	host, port string
	bundle     string // file
	conn       *grpc.ClientConn
}

// startServer starts a server and waits until it answers.
func (b *bench) startServer(ctx context.Context) (*spireServer, error) {
	program, err := tool("NARTHEX_SPIRE", "spire", "spire-server")
	if err != nil {
		return nil, err
	}
	dir, err := b.folder()
	if err != nil {
		return nil, err
	}
	port, err := b.freePort()
	if err != nil {
		return nil, err
	}
	s := &spireServer{host: "127.0.0.1", port: itoa(port), bundle: filepath.Join(dir, "bundle.pem")}
	config, err := fill(dir, "spire-server.conf", map[string]string{"Host": s.host, "Port": s.port, "Dir": dir, "TrustDomain": trustDomain})
	if err != nil {
		return nil, err
	}
	s.conn, err = grpc.NewClient("unix://"+filepath.Join(dir, "admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	s.process, err = b.keeper.start(exec.Command(program, "run", "-config", config), filepath.Join(dir, "output"))
	if err != nil {
		return nil, errors.Join(err, s.conn.Close())
	}
	if err := s.ready(ctx); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *spireServer) close() {
	_ = s.conn.Close()
	s.stop()
}

// ready waits until the server answers, and writes its bundle.
func (s *spireServer) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		b, err := bundlev1.NewBundleClient(s.conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err == nil {
			var text []byte
			for _, authority := range b.X509Authorities {
				text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Asn1})...)
			}
			var c net.Conn
			if c, err = net.Dial("tcp", net.JoinHostPort(s.host, s.port)); err == nil {
				_ = c.Close()
				return os.WriteFile(s.bundle, text, 0o600)
			}
		}
		if gone := s.ended(); gone != nil {
			return gone
		}
		if pause(ctx, 50*time.Millisecond) != nil {
			return fmt.Errorf("spire-server does not answer: %w\n%s", err, s.said())
		}
	}
}

// addEntries adds the caller's entry, and others that fit nobody.
func (s *spireServer) addEntries(ctx context.Context) error {
	req := &entryv1.BatchCreateEntryRequest{}
	for i := range entries {
		uid := os.Geteuid()
		if i > 0 {
			uid = 60000 + i
		}
		req.Entries = append(req.Entries, &types.Entry{
			SpiffeId:  &types.SPIFFEID{TrustDomain: trustDomain, Path: "/workload/" + itoa(i)},
			ParentId:  &types.SPIFFEID{TrustDomain: trustDomain, Path: nodePath},
			Selectors: []*types.Selector{{Type: "unix", Value: "uid:" + itoa(uid)}},
		})
	}
	resp, err := entryv1.NewEntryClient(s.conn).BatchCreateEntry(ctx, req)
	if err != nil {
		return fmt.Errorf("create entries: %w", err)
	}
	for _, r := range resp.Results {
		if codes.Code(r.Status.GetCode()) != codes.OK {
			return fmt.Errorf("create entry: %s", r.Status.GetMessage())
		}
	}
	return nil
}

// token makes a join token for an agent that is also nodePath.
func (s *spireServer) token(ctx context.Context) (string, error) {
	made, err := agentv1.NewAgentClient(s.conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{
		Ttl: 3600, AgentId: &types.SPIFFEID{TrustDomain: trustDomain, Path: nodePath},
	})
	if err != nil {
		return "", fmt.Errorf("create join token: %w", err)
	}
	return made.Value, nil
}

// agent is a running one.
type agent struct {
	*process
	name   string
	socket string
}

// measureAgent takes one agent through all rows.
func (b *bench) measureAgent(ctx context.Context, kind *agentKind, s *spireServer, token string) error {
	dir, err := b.folder()
	if err != nil {
		return err
	}
	config, err := fill(dir, kind.config, map[string]string{
		"Host": s.host, "Port": s.port, "Dir": dir, "TrustDomain": trustDomain, "Bundle": s.bundle, "Token": token,
	})
	if err != nil {
		return err
	}
	command, err := kind.command(b, config)
	if err != nil {
		return err
	}
	begin := time.Now()
	p, err := b.keeper.start(exec.Command(command[0], command[1:]...), filepath.Join(dir, "output"))
	if err != nil {
		return err
	}
	defer p.stop()
	a := &agent{p, kind.name, filepath.Join(dir, "api.sock")}
	if err := a.firstSVID(ctx); err != nil {
		return err
	}
	b.results.add(rowAgentStart, a.name, time.Since(begin).Seconds()*1e3)
	for _, step := range []func(context.Context, *agent) error{b.agentMemory, b.agentRate, b.agentTokens, b.agentLatency} {
		if err := step(ctx, a); err != nil {
			return errors.Join(err, a.ended())
		}
	}
	return nil
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

// agentMemory measures an agent at rest, and with streams held.
func (b *bench) agentMemory(ctx context.Context, a *agent) error {
	if err := pause(ctx, silence); err != nil {
		return err
	}
	rest, err := memory(a.pid())
	if err != nil {
		return err
	}
	b.results.add(rowAgentRest, a.name, rest/mib)

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
	if err := pause(ctx, 2*time.Second); err != nil {
		return err
	}
	held, err := memory(a.pid())
	if err == nil {
		b.results.add(rowAgentStream, a.name, (held-rest)/kib/float64(n))
	}
	return err
}

// agentRate measures fetches by eight clients, each on a new connection.
func (b *bench) agentRate(ctx context.Context, a *agent) error {
	if _, err := a.fetches(ctx, bareclient.FetchX509SVID, 8, 300*time.Millisecond); err != nil { // warm
		return err
	}
	before, err := cpuTime(a.pid())
	if err != nil {
		return err
	}
	begin := time.Now()
	times, err := a.fetches(ctx, bareclient.FetchX509SVID, 8, b.lasting(2*time.Second))
	if err != nil {
		return err
	}
	took := time.Since(begin)
	after, err := cpuTime(a.pid())
	if err != nil {
		return err
	}
	b.results.add(rowAgentFetch, a.name, float64(len(times))/took.Seconds())
	b.results.add(rowAgentCPU, a.name, (after-before).Seconds()*1e6/float64(len(times)))
	return nil
}

// agentTokens measures fetches of one JWT-SVID by eight clients.
func (b *bench) agentTokens(ctx context.Context, a *agent) error {
	if _, err := a.fetches(ctx, bareclient.FetchJWTSVID, 8, 300*time.Millisecond); err != nil { // warm
		return err
	}
	lasting := b.lasting(2 * time.Second)
	times, err := a.fetches(ctx, bareclient.FetchJWTSVID, 8, lasting)
	if err == nil {
		b.results.add(rowAgentJWT, a.name, float64(len(times))/lasting.Seconds())
	}
	return err
}

// agentLatency measures fetches by one client.
func (b *bench) agentLatency(ctx context.Context, a *agent) error {
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
func (a *agent) fetches(ctx context.Context, fetch func(context.Context, string) (net.Conn, error), clients int, lasting time.Duration) ([]float64, error) {
	until := time.Now().Add(lasting)
	var mu sync.Mutex // guards all
	var all []float64
	err := share(ctx, clients, clients, func(ctx context.Context) error {
		var mine []float64
		for begin := time.Now(); begin.Before(until); begin = time.Now() {
			conn, err := fetch(ctx, a.socket)
			if err != nil {
				return fmt.Errorf("fetch: %w", err)
			}
			mine = append(mine, time.Since(begin).Seconds())
			_ = conn.Close() // it has served
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
