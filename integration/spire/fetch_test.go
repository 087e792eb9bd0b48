//go:build integration

package spire_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// fetched runs `narthex fetch` or `validate` and returns what it printed, what it
// complained of, and its exit code.
func fetched(t *testing.T, socket string, how func(*exec.Cmd), args ...string) (out, complaint string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stage.Soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, stage.Narthex, args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if how != nil {
		how(cmd)
	}
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
}

// TestFetch asks our agent and SPIRE's own for all there is.
func TestFetch(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	partner := newServer(t, serverOptions{trustDomain: "partner.example"})
	s.trust(partner.bundle())
	entries := func(parent string) []entry {
		return []entry{
			{path: "/ns/shop/sa/web", parent: parent, selector: "unix:uid:0", hint: "web", ttl: 15 * time.Second, federates: []string{"partner.example"}},
			{path: "/other", parent: parent, selector: "unix:uid:0"},
		}
	}
	ours := newNode(t, "ours", proxyUser)
	s.add(entries(ours.joins(s))...)
	ours.start("agent")
	ours.ready()
	for agent, socket := range map[string]string{"ours": ours.api, "stock": startStockAgent(t, s, entries("")...)} {
		t.Run(agent, func(t *testing.T) {
			t.Parallel()
			fetchX509(t, s, partner, socket)
			fetchDenied(t, socket)
			fetchTokens(t, s, socket)
			fetchFollows(t, s, socket)
		})
	}
}

func fetchX509(t *testing.T, s, partner *server, socket string) {
	t.Helper()
	out, complaint, code := fetched(t, socket, nil, "fetch", "x509", "--format", "json")
	var given struct {
		Identities []struct {
			SPIFFEID string `json:"spiffe_id"`
			Hint     string `json:"hint"`
			Chain    string `json:"chain"`
		} `json:"identities"`
		Bundles map[string]struct {
			X509 string `json:"x509"`
		} `json:"bundles"`
	}
	if err := json.Unmarshal([]byte(out), &given); err != nil || code != 0 || len(given.Identities) != 2 || len(given.Bundles) != 2 {
		t.Fatalf("exit code %d, %v\n%s%s", code, err, out, complaint)
	}
	for _, i := range given.Identities {
		s.verify(certificatesOf(t, "the printed chain", i.Chain), i.SPIFFEID)
	}
	if strings.Contains(out, "PRIVATE") {
		t.Error("a private key was printed")
	}
	dir := filepath.Join(stage.Folder(t, "fetched"), "certs")
	out, complaint, code = fetched(t, socket, nil, "fetch", "x509", "--hint", "web", "--write", dir, "--mode", "0640", "--owner", "daemon:daemon")
	if code != 0 {
		t.Fatalf("exit code %d: %s%s", code, out, complaint)
	}
	s.verify(certificatesIn(t, filepath.Join(dir, "svid.pem")), s.id("/ns/shop/sa/web"))
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid_key.pem")); err != nil {
		t.Error(err)
	}
	for file, of := range map[string]*server{"bundle.pem": s, "bundle.partner.example.pem": partner} {
		if got, want := certificatesIn(t, filepath.Join(dir, file)), of.authorities(); len(got) != len(want) || !got[0].Equal(want[0]) {
			t.Errorf("%s is not the bundle of %s", file, of.td)
		}
	}
	if got := strings.TrimSpace(stage.Must(t, "stat", "-L", "-c", "%a %U:%G", filepath.Join(dir, "svid_key.pem"))); got != "640 daemon:daemon" {
		t.Errorf("the key is of %s", got)
	}
}

// fetchDenied asks as somebody for whom there is no entry.
func fetchDenied(t *testing.T, socket string) {
	t.Helper()
	if _, complaint, code := fetched(t, socket, as(otherProxyUser), "fetch", "x509"); code != 1 || !strings.Contains(complaint, "has no identity for this process: is there an entry whose selectors match it?") {
		t.Errorf("without an entry: exit code %d, %s", code, complaint)
	}
}

func fetchTokens(t *testing.T, s *server, socket string) {
	t.Helper()
	dir := filepath.Join(stage.Folder(t, "fetched"), "tokens")
	id := s.id("/ns/shop/sa/web")
	out, complaint, code := fetched(t, socket, nil, "fetch", "jwt", "--audience", "orders,billing", "--id", id, "--write", dir)
	token := filepath.Join(dir, "jwt_svid.token")
	if code != 0 || !strings.Contains(out, id) || strings.Contains(out, stage.ReadFile(t, token)) {
		t.Fatalf("exit code %d: %s%s", code, out, complaint)
	}
	if bundle := stage.ReadFile(t, filepath.Join(dir, "jwt_bundle.json")); !strings.Contains(bundle, tokenKey(t, stage.ReadFile(t, token))) {
		t.Errorf("the token's key is not in the bundle: %s", bundle)
	}
	bad := filepath.Join(dir, "..", "bad.token")
	text := stage.ReadFile(t, token)
	stage.WriteFile(t, bad, text[:len(text)-8]+"AAAAAAAA", 0o600)
	for _, c := range []struct {
		audience, file string
		code           int
		want           string
	}{
		{"billing", token, 0, id},
		{"shipping", token, 1, "not valid: "},
		{"orders", bad, 1, "not valid: "},
	} {
		out, complaint, code := fetched(t, socket, nil, "validate", "jwt", "--audience", c.audience, "--token-file", c.file)
		if code != c.code || !strings.Contains(out+complaint, c.want) {
			t.Errorf("%s for %s: exit code %d: %s%s", filepath.Base(c.file), c.audience, code, out, complaint)
		}
		if strings.Contains(out+complaint, text) {
			t.Error("the token is printed")
		}
	}
	if out, complaint, code := fetched(t, socket, nil, "fetch", "bundles", "--write", filepath.Join(dir, "..", "bundles")); code != 0 || !strings.Contains(out, "jwt_bundle.example.org.json") || !strings.Contains(out, "bundle.example.org.pem") {
		t.Errorf("bundles: exit code %d: %s%s", code, out, complaint)
	}
}

// fetchFollows waits for the SVID after the first.
func fetchFollows(t *testing.T, s *server, socket string) {
	t.Helper()
	dir := stage.Folder(t, "followed")
	cert, key := filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid_key.pem")
	p := stage.Start(t, "narthex fetch", stage.Narthex, []string{
		"fetch", "x509", "--socket", "unix:" + socket, "--hint", "web", "--write", dir, "--watch", "--exec", `sh -c "echo told"`,
	})
	p.Says(stage.Soon, "told")
	first := certificatesIn(t, cert)[0]
	stage.Eventually(t, stage.Soon, "the next SVID", func() error {
		if next := certificatesIn(t, cert)[0]; next.SerialNumber.Cmp(first.SerialNumber) == 0 {
			return fmt.Errorf("it ends in %s", time.Until(next.NotAfter))
		}
		return nil
	})
	stage.Eventually(t, stage.Soon, "told again", func() error {
		if n := p.Count("told"); n < 2 {
			return fmt.Errorf("told %d times", n)
		}
		return nil
	})
	if _, err := tls.LoadX509KeyPair(cert, key); err != nil {
		t.Error(err)
	}
	s.verify(certificatesIn(t, cert), s.id("/ns/shop/sa/web"))
}

// serialsOf gathers what a server has presented.
type serialsOf struct {
	mu   sync.Mutex
	seen []string
}

func (s *serialsOf) note(state tls.ConnectionState) {
	serial := state.PeerCertificates[0].SerialNumber.String()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(s.seen, serial) {
		s.seen = append(s.seen, serial)
	}
}

// rotationTime is how long nginx and PostgreSQL are under load, with SVIDs that
// live 10 s and are renewed after 5.
const rotationTime = 35 * time.Second

// TestFetchForServers has nginx, which `narthex fetch` runs, and PostgreSQL, which
// it signals, take connections through five rotations and more. None fails.
func TestFetchForServers(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "servers", proxyUser)
	s.add(entry{path: "/web", parent: n.joins(s), selector: "unix:uid:0", ttl: 10 * time.Second})
	n.start("agent")
	n.ready()
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+n.api)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(s.id("/web"))))

	web := nginxOnFetched(t, n)
	database, dir := postgresOnFetched(t, n)
	var ofWeb, ofDatabase serialsOf
	var calls, probes atomic.Int64
	var g sync.WaitGroup
	end := time.Now().Add(rotationTime)
	for range 3 {
		g.Go(func() {
			client := &http.Client{Timeout: callTime, Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
			for time.Now().Before(end) {
				if err := getOK(client, "https://"+web+"/", ofWeb.note); err != nil {
					t.Errorf("nginx, call %d: %v", calls.Load(), err)
				}
				calls.Add(1)
			}
		})
	}
	g.Go(func() {
		for time.Now().Before(end) {
			if err := probePostgres(database, config, ofDatabase.note); err != nil {
				t.Errorf("PostgreSQL, connection %d: %v", probes.Load(), err)
			}
			probes.Add(1)
			time.Sleep(100 * time.Millisecond)
		}
	})
	host, port, err := net.SplitHostPort(database)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), rotationTime+stage.Soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, "pgbench", "-n", "-C", "-S", "-c", "2", "-R", "30", "-T", strconv.Itoa(int(rotationTime.Seconds())), "-h", host, "-p", port, "-U", "postgres", "postgres")
	cmd.Env = append(os.Environ(), "PGSSLMODE=verify-ca", "PGSSLROOTCERT="+filepath.Join(dir, "bundle.pem"), "PGGSSENCMODE=disable", "PGCONNECT_TIMEOUT=60")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "number of failed transactions: 0 ") {
		t.Errorf("pgbench: %v\n%s", err, out)
	}
	g.Wait()
	t.Logf("nginx: %d calls, %d SVIDs; PostgreSQL: %d connections beside pgbench's, %d SVIDs", calls.Load(), len(ofWeb.seen), probes.Load(), len(ofDatabase.seen))
	if len(ofWeb.seen) < 6 || len(ofDatabase.seen) < 6 {
		t.Errorf("nginx has presented %d SVIDs, PostgreSQL %d, want 6 or more", len(ofWeb.seen), len(ofDatabase.seen))
	}
}

// nginxOnFetched has `narthex fetch` run nginx, and returns its address.
func nginxOnFetched(t *testing.T, n *node) (address string) {
	t.Helper()
	address = stage.FreeAddress(t)
	dir := stage.Folder(t, "nginx")
	conf := filepath.Join(dir, "nginx.conf")
	stage.WriteFile(t, conf, fmt.Sprintf(`daemon off; user root; worker_processes 1; pid %[1]s/pid; error_log stderr warn;
events { worker_connections 1000; }
http { access_log off; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy;
  server {
    listen %[2]s ssl;
    ssl_certificate %[1]s/certs/svid.pem;
    ssl_certificate_key %[1]s/certs/svid_key.pem;
    ssl_client_certificate %[1]s/certs/bundle.pem;
    ssl_verify_client on;
    return 200 "hello";
  }
}
`, dir, address), 0o644)
	p := stage.Start(t, "narthex fetch -- nginx", stage.Narthex, []string{
		"fetch", "x509", "--socket", "unix:" + n.api, "--write", filepath.Join(dir, "certs"),
		"--", "nginx", "-c", conf, "-p", dir, "-e", "stderr",
	})
	accepts(t, p, address)
	return address
}

// accepts waits until a process accepts connections.
func accepts(t *testing.T, p *stage.Process, address string) {
	t.Helper()
	stage.Eventually(t, stage.Soon, p.Name+" accepts connections", func() error {
		if err := p.Alive(); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", address)
		if err == nil {
			_ = c.Close()
		}
		return err
	})
}

// postgresOnFetched starts PostgreSQL beside a `narthex fetch` that signals it,
// and returns its address and the directory of its files.
func postgresOnFetched(t *testing.T, n *node) (address, certs string) {
	t.Helper()
	db, certs := stage.NewPostgres(t), stage.Folder(t, "certs")
	fetch := stage.Start(t, "narthex fetch for PostgreSQL", stage.Narthex, []string{
		"fetch", "x509", "--socket", "unix:" + n.api, "--write", certs, "--owner", "postgres", "--watch", "--pid-file", filepath.Join(db.Data, "postmaster.pid"),
	})
	fetch.Says(stage.Soon, "wrote new files")
	address = stage.FreeAddress(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-p", port, "-c", "listen_addresses=127.0.0.1", "-c", "ssl=on"}
	for key, file := range map[string]string{"ssl_cert_file": "svid.pem", "ssl_key_file": "svid_key.pem", "ssl_ca_file": "bundle.pem"} {
		args = append(args, "-c", key+"="+filepath.Join(certs, file))
	}
	db.Start(args...)
	if out, err := stage.Tell(t, "pgbench", "-i", "-q", "-s", "1", "-h", db.Dir, "-p", port, "-U", "postgres", "postgres"); err != nil {
		t.Fatalf("pgbench -i: %v\n%s", err, out)
	}
	return address, certs
}

// getOK fetches a page on a connection of its own.
func getOK(client *http.Client, url string, note func(tls.ConnectionState)) error {
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "hello" {
		return fmt.Errorf("%s: %q, %w", resp.Status, body, err)
	}
	note(*resp.TLS)
	return nil
}

// probePostgres asks PostgreSQL for TLS (its protocol, "SSLRequest") and shakes
// hands.
func probePostgres(address string, config *tls.Config, note func(tls.ConnectionState)) error {
	c, err := net.DialTimeout("tcp", address, callTime)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(callTime)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f}); err != nil {
		return err
	}
	answer := make([]byte, 1)
	if _, err := io.ReadFull(c, answer); err != nil || answer[0] != 'S' {
		return fmt.Errorf("asked for TLS, it says %q, %w", answer, err)
	}
	secured := tls.Client(c, config)
	if err := secured.Handshake(); err != nil {
		return err
	}
	note(secured.ConnectionState())
	return nil
}
