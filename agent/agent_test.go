package agent_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/agent/bootstrap"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/devserver"
	"github.com/narthex-id/narthex/internal/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.test")

// stage is a development server and an agent's configuration beside it.
type stage struct {
	t      *testing.T
	dir    string
	server *devserver.Server
	stop   func()
	cfg    agent.Config
}

func me() []attestor.Selector {
	return []attestor.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}}
}

func entry(path string, ttl time.Duration) devserver.Entry {
	return devserver.Entry{SPIFFEID: spiffeid.RequireFromPath(td, path), Selectors: me(), TTL: ttl}
}

// entryOfOthers has a server know the node, and nothing for us.
func entryOfOthers() devserver.Entry {
	e := entry("/others", time.Hour)
	e.Selectors = []attestor.Selector{{Type: "unix", Value: "uid:4294967294"}}
	return e
}

// newStage starts a server and prepares an agent with a fresh join token.
func newStage(t *testing.T, entries ...devserver.Entry) *stage {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent") // short: socket paths have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &stage{t: t, dir: dir}
	s.startServer("127.0.0.1:0", entries...)
	s.cfg = agent.Config{
		TrustDomain:       td,
		DataDir:           filepath.Join(dir, "data"),
		Version:           "test",
		Server:            s.server.Addr().String(),
		Node:              attestor.JoinToken{Token: s.server.JoinToken()},
		WorkloadAttestors: []attestor.Workload{attestor.NewUnix(attestor.UnixConfig{})},
		SyncInterval:      200 * time.Millisecond,
		Socket:            filepath.Join(dir, "api.sock"),
		Metrics:           telemetry.NewMetrics(),
		Log:               hclog.New(&hclog.LoggerOptions{Output: testWriter{t}, Level: hclog.Debug}),
	}
	s.bundle(s.server.BundlePEM()) // of later servers too: the CA is kept in dir
	s.cfg.SetMinPause(50 * time.Millisecond)
	return s
}

// bundle writes the file by which the agent knows its server the first time.
func (s *stage) bundle(content []byte) {
	s.t.Helper()
	file := filepath.Join(s.dir, "bundle.pem")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		s.t.Fatal(err)
	}
	source, err := bootstrap.New(bootstrap.Config{TrustDomain: td, Server: s.server.Addr().String(), File: file})
	if err != nil {
		s.t.Fatal(err)
	}
	s.cfg.Bootstrap = source
}

func (s *stage) startServer(listen string, entries ...devserver.Entry) {
	s.t.Helper()
	server, err := devserver.New(devserver.Config{
		TrustDomain: td, Listen: listen, Dir: filepath.Join(s.dir, "server"), Entries: entries, Log: hclog.NewNullLogger(),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(ctx) }()
	s.server = server
	stopped := false
	s.stop = func() {
		if !stopped {
			stopped = true
			cancel()
			<-done
		}
	}
	s.t.Cleanup(s.stop)
}

// start runs an agent until the returned function is called.
func (s *stage) start() (*agent.Agent, func()) {
	s.t.Helper()
	a, err := agent.New(s.cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("Run: %v", err)
		}
	}
	s.t.Cleanup(stop)
	return a, stop
}

// patience bounds what takes no time on a machine that has some.
const patience = time.Minute

// fetch asks the agent as a workload does, until it is answered or told that
// it will not be.
func (s *stage) fetch() (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		x, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+s.cfg.Socket))
		if err == nil || !strings.Contains(err.Error(), "Unavailable") || ctx.Err() != nil {
			return x, err
		}
	}
}

// serialOf is an SVID's serial number as the status shows it, leading zeros and
// all.
func serialOf(svid *x509svid.SVID) string {
	return hex.EncodeToString(svid.Certificates[0].SerialNumber.Bytes())
}

func (s *stage) mustFetch() *x509svid.SVID {
	s.t.Helper()
	x, err := s.fetch()
	if err != nil {
		s.t.Fatal(err)
	}
	return x
}

// eventually waits for what another goroutine or process will do.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatal("not in time: " + what)
		case <-tick.C:
		}
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func TestServesWhatTheServerSigns(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	a, _ := s.start()
	if got, want := s.mustFetch().ID.String(), "spiffe://example.test/orders"; got != want {
		t.Errorf("SVID of %s, want %s", got, want)
	}
	status := a.Status()
	if status.Problem != "" || !status.Reachable || status.Entries != 1 || len(status.Identities) != 1 {
		t.Errorf("status: %+v", status)
	}
	if !strings.HasPrefix(status.ID, "spiffe://example.test/spire/agent/join_token/") {
		t.Errorf("agent is %q", status.ID)
	}
}

func TestNewEntryIsUsableAtOnce(t *testing.T) {
	s := newStage(t, entryOfOthers())
	s.cfg.SyncInterval = time.Hour // only callers make it sync
	a, _ := s.start()
	eventually(t, "the first sync", func() bool { return a.Unready() == nil })
	if _, err := s.fetch(); err == nil || !strings.Contains(err.Error(), "PermissionDenied") {
		t.Fatalf("without entry: %v, want PermissionDenied", err)
	}
	if err := s.server.SetEntries([]devserver.Entry{entry("/late", time.Hour)}); err != nil {
		t.Fatal(err)
	}
	// On a busy machine, a caller may not be held for as long as a sync takes.
	eventually(t, "the entry is of use", func() bool {
		svid, err := s.fetch()
		return err == nil && svid.ID.Path() == "/late"
	})
}

// One after another, callers without an entry do not have the server asked: the
// first has it asked at once and then each second for ten.
func TestDeniedCallersDoNotLoadTheServer(t *testing.T) {
	s := newStage(t, entryOfOthers())
	s.cfg.SyncInterval = time.Hour
	a, _ := s.start()
	eventually(t, "the first sync", func() bool { return a.Unready() == nil })
	start := time.Now()
	const calls = 5
	for range calls {
		if _, err := s.fetch(); err == nil || !strings.Contains(err.Error(), "PermissionDenied") {
			t.Fatalf("without entry: %v, want PermissionDenied", err)
		}
	}
	// Nobody calls any more, and the entry is there when somebody does.
	if err := s.server.SetEntries([]devserver.Entry{entry("/late", time.Hour)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the entry", func() bool { return len(a.Status().Identities) == 1 })
	took := time.Since(start)
	if most := 3 + took.Seconds()*1.4; s.syncs() > most {
		t.Errorf("%g syncs in %s, want %g at most", s.syncs(), took, most)
	}
}

// syncs is how many syncs were successful.
func (s *stage) syncs() (n float64) {
	s.cfg.Metrics.Each(func(sample telemetry.Sample) {
		if sample.Name == "narthex_sync_total" && slices.Equal(sample.LabelValues, []string{"ok"}) {
			n = sample.Value
		}
	})
	return n
}

func TestRestartGoesOnWithTheSavedSVID(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	_, stop := s.start()
	s.mustFetch()
	stop()
	// The token is used up: only the saved SVID can speak to the server.
	_, stop = s.start()
	s.mustFetch()
	stop()

	for file, mode := range map[string]os.FileMode{"": 0o700 | os.ModeDir, "agent.json": 0o600, "keys": 0o700 | os.ModeDir} {
		info, err := os.Stat(filepath.Join(s.cfg.DataDir, file))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != mode {
			t.Errorf("%q has mode %v, want %v", file, info.Mode(), mode)
		}
	}
}

func TestSecondAgentOnOneDataDirIsRefused(t *testing.T) {
	s := newStage(t)
	s.start()
	cfg := s.cfg
	cfg.Socket += "2"
	_, err := agent.New(cfg)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("in use by another agent (pid %d)", os.Getpid())) {
		t.Errorf("second agent: %v", err)
	}
}

func TestDataDirOfAnotherTrustDomain(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	_, stop := s.start()
	s.mustFetch()
	stop()
	s.cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.test")
	a, err := agent.New(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	err = a.Run(context.Background())
	if err == nil || !strings.Contains(err.Error(), `belongs to an agent of trust domain "example.test", not "other.test"`) {
		t.Errorf("Run: %v", err)
	}
}

func TestCorruptStateIsSetAsideAndNamed(t *testing.T) {
	for name, corrupt := range map[string]func(t *testing.T, dir string){
		"state": func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, "agent.json"), []byte(`{"version":1,`), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"key": func(t *testing.T, dir string) {
			list, err := filepath.Glob(filepath.Join(dir, "keys", "*"))
			if err != nil || len(list) != 1 {
				t.Fatalf("keys: %v, %v", list, err)
			}
			if err := os.WriteFile(list[0], []byte("no key"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, entry("/orders", time.Hour))
			_, stop := s.start()
			s.mustFetch()
			stop()
			corrupt(t, s.cfg.DataDir)
			s.cfg.Node = attestor.JoinToken{Token: s.server.JoinToken()}
			s.start()
			s.mustFetch()
			if name == "state" {
				aside, err := filepath.Glob(filepath.Join(s.cfg.DataDir, "agent.json.corrupt-*"))
				if err != nil || len(aside) != 1 {
					t.Errorf("set aside: %v, %v", aside, err)
				}
			}
		})
	}
}

func TestServerAway(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	addr := s.server.Addr().String()
	s.stop()
	token := attestor.JoinToken{File: filepath.Join(s.dir, "token")}
	s.cfg.Node = token
	if err := os.WriteFile(token.File, []byte("of-another-server"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, _ := s.start()
	eventually(t, "the reason why nobody is answered", func() bool {
		err := a.Unready()
		return err != nil && strings.Contains(err.Error(), addr)
	})
	_, err := workloadapi.FetchX509SVID(timeout(t, 2*time.Second), workloadapi.WithAddr("unix://"+s.cfg.Socket))
	if err == nil || !strings.Contains(err.Error(), addr) {
		t.Errorf("a caller is told %v, want the server's address in it", err)
	}
	s.startServer(addr, entry("/orders", time.Hour))
	if err := os.WriteFile(token.File, []byte(s.server.JoinToken()), 0o600); err != nil {
		t.Fatal(err)
	}
	s.mustFetch()
}

// An agent that waits for a bundle that is good does not wait out its pause.
func TestBundleFileIsReplaced(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	s.cfg.SetMinPause(10 * patience)
	good := s.server.BundlePEM()
	s.bundle([]byte("not yet"))
	a, _ := s.start()
	eventually(t, "the reason why nobody is answered", func() bool {
		err := a.Unready()
		return err != nil && strings.Contains(err.Error(), "no PEM certificate in it")
	})
	s.bundle(good)
	s.mustFetch()
}

func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestBannedAgentStopsServing(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	a, _ := s.start()
	s.mustFetch()
	if err := s.server.Ban(spiffeid.RequireFromString(a.Status().ID)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ban", func() bool { return a.Unready() != nil })
	if got := a.Status(); len(got.Identities) != 0 || got.ID != "" {
		t.Errorf("a banned agent still holds %+v", got)
	}
	if _, err := workloadapi.FetchX509SVID(timeout(t, 2*time.Second), workloadapi.WithAddr("unix://"+s.cfg.Socket)); err == nil ||
		!strings.Contains(err.Error(), "banned") {
		t.Errorf("a caller is told %v", err)
	}
}

func TestEvictedAgentWithoutAFreshTokenStopsServing(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	token := attestor.JoinToken{File: filepath.Join(s.dir, "token")}
	if err := os.WriteFile(token.File, []byte(s.server.JoinToken()), 0o600); err != nil {
		t.Fatal(err)
	}
	s.cfg.Node = token
	a, _ := s.start()
	s.mustFetch()
	if err := s.server.Evict(spiffeid.RequireFromString(a.Status().ID)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the refusal", func() bool {
		err := a.Unready()
		return err != nil && strings.Contains(err.Error(), "join token")
	})
	if got := a.Status(); len(got.Identities) != 0 {
		t.Errorf("an evicted agent still holds %+v", got.Identities)
	}
	if err := os.WriteFile(token.File, []byte(s.server.JoinToken()), 0o600); err != nil {
		t.Fatal(err)
	}
	s.mustFetch()
}

func TestRotation(t *testing.T) {
	s := newStage(t, entry("/orders", 3*time.Second))
	a, _ := s.start()
	serials := map[string]bool{}
	eventually(t, "three SVIDs one after another", func() bool {
		for _, id := range a.Status().Identities {
			serials[id.Serial] = true
			if left := time.Until(id.NotAfter); left <= 0 {
				t.Errorf("an SVID is held that ended %s ago", -left)
			}
		}
		return len(serials) >= 3
	})
	if len(serials) > 8 {
		t.Errorf("%d SVIDs signed, far more than half-lives passed", len(serials))
	}
}

// TestTaintedAuthority replaces the server's authority: the agent and its
// workloads leave the old one long before their SVIDs would be renewed.
func TestTaintedAuthority(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	a, _ := s.start()
	before := s.mustFetch()
	agentKey := s.keyID()
	if err := errors.Join(s.server.RotateCA(), s.server.TaintCA()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the workload's SVID is signed anew", func() bool {
		ids := a.Status().Identities
		return len(ids) == 1 && ids[0].Serial != serialOf(before)
	})
	eventually(t, "the agent's own SVID is renewed", func() bool { return s.keyID() != agentKey })
}

// keyID names the key of the SVID that the agent holds for its own.
func (s *stage) keyID() string {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(s.cfg.DataDir, "agent.json"))
	var state struct {
		KeyID string `json:"key_id"`
	}
	if err == nil {
		err = json.Unmarshal(data, &state)
	}
	if err != nil || state.KeyID == "" {
		s.t.Fatalf("the agent's state names no key: %s, %v", data, err)
	}
	return state.KeyID
}

func TestUnreadableDataDir(t *testing.T) {
	s := newStage(t)
	if err := os.WriteFile(s.cfg.DataDir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := agent.New(s.cfg)
	if err == nil || !strings.Contains(err.Error(), "data_dir") {
		t.Errorf("a file for a directory: %v", err)
	}
	var path *os.PathError
	if !errors.As(err, &path) {
		t.Errorf("%T holds no path", err)
	}
}

// busy is an attestor with work of its own.
type busy struct {
	attestor.Workload
	began, ended chan struct{}
}

func (b busy) Run(ctx context.Context) error {
	close(b.began)
	<-ctx.Done()
	close(b.ended)
	return nil
}

func TestAttestorsRunWithTheAgent(t *testing.T) {
	s := newStage(t)
	b := busy{attestor.NewUnix(attestor.UnixConfig{}), make(chan struct{}), make(chan struct{})}
	s.cfg.WorkloadAttestors = append(s.cfg.WorkloadAttestors, b)
	_, stop := s.start()
	<-b.began
	stop()
	select {
	case <-b.ended:
	default:
		t.Error("the agent has ended, the attestor runs on")
	}
}
