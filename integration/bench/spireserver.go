package main

import (
	"bufio"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
)

// nodePath is the SPIFFE ID that every agent of the benchmark shares, and
// that the entries have as their parent.
const nodePath = "/node"

// spireServer is a running SPIRE Server.
type spireServer struct {
	*process
	host, port string
	bundle     string // file
	metrics    string // URL
	memory     string // the folder with its data
	conn       *grpc.ClientConn
}

// startServer starts a server and waits until it answers. All it writes goes to
// memory where the system has a file system for that.
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
	metrics, err := b.freePort()
	if err != nil {
		return nil, err
	}
	s := &spireServer{
		host: "127.0.0.1", port: itoa(port), bundle: filepath.Join(dir, "bundle.pem"),
		metrics: "http://127.0.0.1:" + itoa(metrics) + "/metrics",
	}
	if s.memory, err = memoryFolder(); err != nil {
		return nil, err
	}
	config, err := fill(dir, "spire-server.conf", map[string]string{
		"Host": s.host, "Port": s.port, "MetricsPort": itoa(metrics), "Dir": dir, "DataDir": s.memory, "TrustDomain": trustDomain,
	})
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
	_ = os.RemoveAll(s.memory) // what is left goes with the machine's memory
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

// tmpfs is where Linux has one.
const tmpfs = "/dev/shm"

// memoryFolder makes a folder in memory, or among other temporary files where
// there is none.
func memoryFolder() (string, error) {
	parent := tmpfs
	if _, err := os.Stat(parent); err != nil {
		parent = ""
	}
	return os.MkdirTemp(parent, "narthex-bench-")
}

// firstUser is before the first of the users for whom there are entries, beside
// the one that runs this.
const firstUser = 60_000

const (
	// entriesAtOnce are created in one call.
	entriesAtOnce = 500
	// family is how many entries have the agents, or one and the same entry of
	// theirs, as their parent. To create an entry the server looks through all
	// that have the same parent.
	family = 250
)

// addEntries adds n entries: that of who runs this, and others for one user
// each. Their X.509-SVIDs live ttl, or as long as the server has it by default
// where that is 0.
func (s *spireServer) addEntries(ctx context.Context, n int, ttl time.Duration) error {
	for begin := 0; begin < n; begin += entriesAtOnce {
		req := &entryv1.BatchCreateEntryRequest{OutputMask: &types.EntryMask{}}
		for i := begin; i < min(begin+entriesAtOnce, n); i++ {
			uid, parent := os.Geteuid(), nodePath
			if i > 0 {
				uid = firstUser + i
			}
			if i%family > 0 {
				parent = workload(i - i%family)
			}
			req.Entries = append(req.Entries, &types.Entry{
				SpiffeId:    &types.SPIFFEID{TrustDomain: trustDomain, Path: workload(i)},
				ParentId:    &types.SPIFFEID{TrustDomain: trustDomain, Path: parent},
				Selectors:   []*types.Selector{{Type: "unix", Value: "uid:" + itoa(uid)}},
				X509SvidTtl: int32(ttl.Seconds()),
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
	}
	return nil
}

// workload is the path of an entry's SPIFFE ID.
func workload(i int) string { return "/workload/" + itoa(i) }

// tokens makes n join tokens for agents that are also nodePath.
func (s *spireServer) tokens(ctx context.Context, n int) ([]string, error) {
	var list []string
	for range n {
		token, err := s.token(ctx)
		if err != nil {
			return nil, err
		}
		list = append(list, token)
	}
	return list, nil
}

func (s *spireServer) token(ctx context.Context) (string, error) {
	made, err := agentv1.NewAgentClient(s.conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{
		Ttl: 3600, AgentId: &types.SPIFFEID{TrustDomain: trustDomain, Path: nodePath},
	})
	if err != nil {
		return "", fmt.Errorf("create join token: %w", err)
	}
	return made.Value, nil
}

// signedCounter is what the server calls the X.509-SVIDs that it has signed for
// workloads.
const signedCounter = "spire_server_server_ca_sign_x509_svid"

// signed returns how many X.509-SVIDs the server has signed for workloads.
func (s *spireServer) signed(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.metrics, nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("ask the server for its metrics: %w", err)
	}
	defer resp.Body.Close()
	return sumOf(resp.Body, signedCounter)
}

// sumOf adds up the values that a counter has in a text of metrics, whatever
// their labels.
func sumOf(text io.Reader, counter string) (int, error) {
	sum := 0.0
	lines := bufio.NewScanner(text)
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), counter)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		value, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			return 0, fmt.Errorf("read the metric %s: %w", counter, err)
		}
		sum += value
	}
	return int(sum), lines.Err()
}

// signPause is how long nothing is signed once all is.
const signPause = 3 * time.Second

// settled waits until the server has signed nothing for a while, and returns
// when it last did.
func (s *spireServer) settled(ctx context.Context) (time.Time, error) {
	last, since := -1, time.Now()
	for time.Since(since) < signPause {
		now, err := s.signed(ctx)
		if err != nil {
			return time.Time{}, err
		}
		if now != last {
			last, since = now, time.Now()
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return time.Time{}, err
		}
	}
	return since, nil
}

// busy waits until the server signs again, for no longer than within.
func (s *spireServer) busy(ctx context.Context, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	before, err := s.signed(ctx)
	for now := before; err == nil && now == before; {
		if err = pause(ctx, 200*time.Millisecond); err == nil {
			now, err = s.signed(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("wait for SVIDs to be signed again: %w", err)
	}
	return nil
}
