//go:build integration

package spire_test

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// serverOptions are what tests vary of a SPIRE Server.
type serverOptions struct {
	trustDomain string        // default: example.org
	agentTTL    time.Duration // of agents' SVIDs; default: 1 h
	cacheReload time.Duration // how stage.Soon agents see a new entry; 0: the server's own default, 5 s
	features    []string      // feature flags
	more        string        // further lines of the experimental section
	address     string        // host:port; default: a free one
	postgres    string        // folder of the socket of a PostgreSQL that has the data; default: SQLite of its own
	nodes       *authority    // of nodes' certificates; default: one of its own
}

// server is a real SPIRE Server on loopback, with a database, keys and
// sockets of its own.
type server struct {
	*stage.Process
	t       *testing.T
	td      spiffeid.TrustDomain
	dir     string
	address string // for agents
	socket  string // for administrators
	nodes   *authority
	conn    *grpc.ClientConn
	env     []string // beside the test's own
}

const serverConf = `
server {
  bind_address = "%[1]s"
  bind_port = "%[2]s"
  socket_path = "%[3]s/api.sock"
  trust_domain = "%[4]s"
  data_dir = "%[3]s"
  log_level = "INFO"
  ca_ttl = "24h"
  default_x509_svid_ttl = "1h"
  agent_ttl = "%[5]s"
  experimental {
%[6]s  }
}
plugins {
  DataStore "sql" { plugin_data { %[7]s } }
  KeyManager "disk" { plugin_data { keys_path = "%[3]s/keys.json" } }
  NodeAttestor "join_token" { plugin_data {} }
  NodeAttestor "x509pop" { plugin_data { ca_bundle_path = "%[3]s/nodes.crt" } }
}
`

// newServer starts a server and waits until it answers.
func newServer(t *testing.T, o serverOptions) *server {
	t.Helper()
	if o.trustDomain == "" {
		o.trustDomain = "example.org"
	}
	if o.agentTTL == 0 {
		o.agentTTL = time.Hour
	}
	experimental := ""
	if o.cacheReload != 0 {
		experimental = fmt.Sprintf("cache_reload_interval = %q\n", o.cacheReload)
	}
	if len(o.features) > 0 {
		experimental += "feature_flags = [\"" + strings.Join(o.features, "\", \"") + "\"]\n"
	}
	experimental += o.more
	s := &server{t: t, td: spiffeid.RequireTrustDomainFromString(o.trustDomain), dir: stage.Folder(t, "server"), address: o.address, nodes: o.nodes}
	if s.address == "" {
		s.address = stage.FreeAddress(t)
	}
	s.socket = filepath.Join(s.dir, "api.sock")
	if s.nodes == nil {
		s.nodes = newAuthority(t, "nodes of "+o.trustDomain)
	}
	database := fmt.Sprintf("database_type = \"sqlite3\" connection_string = \"%s/datastore.sqlite3\"", s.dir)
	if o.postgres != "" {
		database = fmt.Sprintf("database_type = \"postgres\" connection_string = \"host=%s user=postgres dbname=postgres sslmode=disable\"", o.postgres)
	}
	stage.WriteFile(t, filepath.Join(s.dir, "nodes.crt"), s.nodes.pem(), 0o600)
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}
	stage.WriteFile(t, s.conf(), fmt.Sprintf(serverConf, host, port, s.dir, o.trustDomain, o.agentTTL, experimental, database), 0o600)
	s.conn, err = grpc.NewClient("unix://"+s.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.conn.Close() })
	s.start()
	return s
}

// of returns s as a subtest has it, whose own failures it tells.
func (s *server) of(t *testing.T) *server {
	own := *s
	own.t = t
	return &own
}

func (s *server) conf() string { return filepath.Join(s.dir, "server.conf") }

// start starts the server, for the first time or again.
func (s *server) start() {
	s.t.Helper()
	s.Process = stage.Start(s.t, "spire-server "+s.td.Name(), filepath.Join(tools, "spire-server"), []string{"run", "-config", s.conf()},
		func(cmd *exec.Cmd) { cmd.Env = append(os.Environ(), s.env...) })
	stage.Eventually(s.t, stage.Soon, "spire-server answers", func() error {
		if err := s.Alive(); err != nil {
			return err
		}
		if _, err := bundlev1.NewBundleClient(s.conn).GetBundle(s.t.Context(), &bundlev1.GetBundleRequest{}, grpc.WaitForReady(false)); err != nil {
			return err
		}
		c, err := net.DialTimeout("tcp", s.address, time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// anew stops the server and sets up another one in its place, with the same
// name and address and nothing else of it.
func (s *server) anew() {
	s.t.Helper()
	s.Stop()
	for _, pattern := range []string{"datastore.sqlite3*", "keys.json", "journal.pem"} {
		files, err := filepath.Glob(filepath.Join(s.dir, pattern))
		if err != nil {
			s.t.Fatal(err)
		}
		for _, file := range files {
			if err := os.Remove(file); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	s.start()
}

// cli runs the spire-server command.
func (s *server) cli(args ...string) string {
	s.t.Helper()
	return stage.Must(s.t, filepath.Join(tools, "spire-server"), append(args, "-socketPath", s.socket)...)
}

// token makes a join token, which names the agent that uses it.
func (s *server) token() (token, agentID string) {
	s.t.Helper()
	made, err := agentv1.NewAgentClient(s.conn).CreateJoinToken(s.t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		s.t.Fatalf("create join token: %v", err)
	}
	return made.Value, s.id("/spire/agent/join_token/" + made.Value)
}

// id returns a SPIFFE ID of the server's trust domain.
func (s *server) id(path string) string { return s.td.IDString() + path }

// entry is a registration entry as the tests write it.
type entry struct {
	path       string // of the SPIFFE ID
	parent     string // the agent's SPIFFE ID
	selector   string // unix:uid:1
	ttl        time.Duration
	federates  []string
	hint       string
	identifier string // given by the server; for updates
}

func (s *server) wire(e entry) *types.Entry {
	kind, value, ok := strings.Cut(e.selector, ":")
	if !ok {
		s.t.Fatalf("selector %q", e.selector)
	}
	parent := spiffeid.RequireFromString(e.parent)
	return &types.Entry{
		Id:            e.identifier,
		SpiffeId:      &types.SPIFFEID{TrustDomain: s.td.Name(), Path: e.path},
		ParentId:      &types.SPIFFEID{TrustDomain: parent.TrustDomain().Name(), Path: parent.Path()},
		Selectors:     []*types.Selector{{Type: kind, Value: value}},
		X509SvidTtl:   int32(e.ttl / time.Second),
		FederatesWith: e.federates,
		Hint:          e.hint,
	}
}

// add creates entries and returns their identifiers.
func (s *server) add(entries ...entry) []string {
	s.t.Helper()
	req := &entryv1.BatchCreateEntryRequest{}
	for _, e := range entries {
		req.Entries = append(req.Entries, s.wire(e))
	}
	resp, err := entryv1.NewEntryClient(s.conn).BatchCreateEntry(s.t.Context(), req)
	if err != nil {
		s.t.Fatalf("create entries: %v", err)
	}
	ids := make([]string, len(entries))
	for i, r := range resp.Results {
		s.good("create entry", r.Status)
		ids[i] = r.Entry.Id
	}
	return ids
}

// change replaces entries, which must name their identifiers.
func (s *server) change(entries ...entry) {
	s.t.Helper()
	req := &entryv1.BatchUpdateEntryRequest{}
	for _, e := range entries {
		req.Entries = append(req.Entries, s.wire(e))
	}
	resp, err := entryv1.NewEntryClient(s.conn).BatchUpdateEntry(s.t.Context(), req)
	if err != nil {
		s.t.Fatalf("update entries: %v", err)
	}
	for _, r := range resp.Results {
		s.good("update entry", r.Status)
	}
}

// remove deletes entries.
func (s *server) remove(ids ...string) {
	s.t.Helper()
	resp, err := entryv1.NewEntryClient(s.conn).BatchDeleteEntry(s.t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: ids})
	if err != nil {
		s.t.Fatalf("delete entries: %v", err)
	}
	for _, r := range resp.Results {
		s.good("delete entry", r.Status)
	}
}

func (s *server) good(what string, st *types.Status) {
	s.t.Helper()
	if code := codes.Code(st.GetCode()); code != codes.OK {
		s.t.Fatalf("%s: %s: %s", what, code, st.GetMessage())
	}
}

// agent returns what the server knows of an agent.
func (s *server) agent(id string) (*types.Agent, error) {
	parsed := spiffeid.RequireFromString(id)
	return agentv1.NewAgentClient(s.conn).GetAgent(s.t.Context(), &agentv1.GetAgentRequest{
		Id: &types.SPIFFEID{TrustDomain: parsed.TrustDomain().Name(), Path: parsed.Path()},
	})
}

// bundle returns the server's bundle.
func (s *server) bundle() *types.Bundle {
	s.t.Helper()
	b, err := bundlev1.NewBundleClient(s.conn).GetBundle(s.t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		s.t.Fatalf("get bundle: %v", err)
	}
	return b
}

// trust gives the server another trust domain's bundle.
func (s *server) trust(b *types.Bundle) {
	s.t.Helper()
	resp, err := bundlev1.NewBundleClient(s.conn).BatchSetFederatedBundle(s.t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
	if err != nil {
		s.t.Fatalf("set federated bundle: %v", err)
	}
	s.good("set federated bundle", resp.Results[0].Status)
}

// distrust takes another trust domain's bundle away again, from the entries
// that federate with it too.
func (s *server) distrust(td string) {
	s.t.Helper()
	resp, err := bundlev1.NewBundleClient(s.conn).BatchDeleteFederatedBundle(s.t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{
		TrustDomains: []string{td}, Mode: bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE,
	})
	if err != nil {
		s.t.Fatalf("delete federated bundle: %v", err)
	}
	s.good("delete federated bundle", resp.Results[0].Status)
}

// bundlePEM returns what `spire-server bundle show` prints.
func (s *server) bundlePEM() string { s.t.Helper(); return s.cli("bundle", "show") }

// authorities returns the certificates of bundlePEM.
func (s *server) authorities() []*x509.Certificate {
	s.t.Helper()
	return certificatesOf(s.t, "`spire-server bundle show`", s.bundlePEM())
}

// verify fails the test unless the chain (leaf first) was signed by this
// server for the given SPIFFE ID.
func (s *server) verify(chain []*x509.Certificate, id string) {
	s.t.Helper()
	if len(chain) == 0 {
		s.t.Fatal("no certificate to verify")
	}
	if uris := chain[0].URIs; len(uris) != 1 || uris[0].String() != id {
		s.t.Errorf("the certificate is for %v, want %s", uris, id)
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range s.authorities() {
		roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		s.t.Errorf("the certificate of %s was not signed by the server: %v", id, err)
	}
}

// mint has the server sign an SVID that belongs to no agent, and returns the
// files with it, its key and the bundle.
func (s *server) mint(path string, ttl time.Duration) (cert, key, bundle string) {
	s.t.Helper()
	dir := stage.Folder(s.t, "minted")
	s.cli("x509", "mint", "-spiffeID", s.id(path), "-ttl", ttl.String(), "-write", dir)
	return filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "bundle.pem")
}

// certificatesIn returns the certificates of a PEM file.
func certificatesIn(t *testing.T, path string) []*x509.Certificate {
	t.Helper()
	return certificatesOf(t, path, stage.ReadFile(t, path))
}

func certificatesOf(t *testing.T, what, text string) []*x509.Certificate {
	t.Helper()
	var certs []*x509.Certificate
	for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		t.Fatalf("%s: no certificate in it", what)
	}
	return certs
}
