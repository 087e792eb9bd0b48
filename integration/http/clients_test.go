//go:build integration

package http_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/pattern"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// clients are those that come to the services, all in HTTP/1.1. Each fetches
// bytes of all sizes and stores some, counted and in chunks, and compares them.
// With an SVID it speaks mutual TLS itself.
var clients = []struct {
	name string
	run  func(t *testing.T, base string, own *mesh.SVID)
}{
	{"go", goClient},
	{"curl", curlClient},
	{"python http.client", func(t *testing.T, base string, own *mesh.SVID) {
		succeeds(t, stage.PythonScript(t, "python http.client", "client.py", append([]string{"http", base}, files(own)...)...))
	}},
	{"python urllib", func(t *testing.T, base string, own *mesh.SVID) {
		succeeds(t, stage.PythonScript(t, "python urllib", "client.py", append([]string{"urllib", base}, files(own)...)...))
	}},
	{"node http", func(t *testing.T, base string, own *mesh.SVID) {
		succeeds(t, stage.NodeScript(t, "node http", "client.js", append([]string{"http", base}, files(own)...)...))
	}},
	{"node undici", func(t *testing.T, base string, own *mesh.SVID) {
		succeeds(t, stage.NodeScript(t, "node undici", "client.js", append([]string{"undici", base}, files(own)...)...))
	}},
}

// files are the arguments by which a script proves who it is.
func files(own *mesh.SVID) []string {
	if own == nil {
		return nil
	}
	return []string{own.CertFile, own.KeyFile, own.CA.Bundle}
}

// succeeds waits until a script has said ok.
func succeeds(t *testing.T, p *stage.Process) {
	t.Helper()
	p.Says(stage.Soon, "ok\n")
	<-p.Done
	if code := p.Cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("%s ended with %d", p.Name, code)
	}
}

// TestClients goes with every client to every server, through an outbound and
// an inbound proxy, and with each to one that it speaks mutual TLS to.
func TestClients(t *testing.T) {
	t.Parallel()
	for _, s := range servers {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			p := mesh.NewPair(t, s.start(t))
			for _, c := range clients {
				t.Run(c.name, func(t *testing.T) {
					c.run(t, "http://"+p.Entry, nil)
					if s.name == "go" {
						c.run(t, "https://"+p.Secure, p.Client)
					}
				})
			}
		})
	}
}

func goClient(t *testing.T, base string, own *mesh.SVID) {
	client := clientOf(t, own)
	for _, size := range []int{0, 1 << 10, 1 << 20} {
		want := pattern.Bytes(size)
		if got, err := mesh.FetchOK(client, fmt.Sprintf("%s/bytes/%d", base, size)); err != nil || got != string(want) {
			t.Errorf("GET of %d bytes: %d bytes, %v", size, len(got), err)
		}
		for how, body := range map[string]io.Reader{"counted": bytes.NewReader(want), "chunked": io.MultiReader(bytes.NewReader(want))} {
			url := fmt.Sprintf("%s/store/go-%s-%d", base, how, size)
			if a, err := mesh.Fetch(client, http.MethodPut, url, body); err != nil || a.Status/100 != 2 {
				t.Errorf("PUT of %d bytes: %d, %v", size, a.Status, err)
			}
			if got, err := mesh.FetchOK(client, url); err != nil || got != string(want) {
				t.Errorf("%s: %d bytes came back, %v", url, len(got), err)
			}
		}
	}
	if a, err := mesh.Fetch(client, http.MethodHead, base+"/bytes/1024", nil); err != nil || a.Length != 1024 || a.Body != "" {
		t.Errorf("HEAD: %+v, %v", a, err)
	}
}

func curlClient(t *testing.T, base string, own *mesh.SVID) {
	dir := stage.Folder(t, "curl")
	curl := func(args ...string) string {
		t.Helper()
		if own != nil {
			args = append([]string{"--cert", own.CertFile, "--key", own.KeyFile, "--cacert", own.CA.Bundle}, args...)
		}
		return stage.Must(t, "curl", append([]string{"-sS", "--http1.1", "--fail-with-body", "--max-time", "60"}, args...)...)
	}
	sum := func(name string) [32]byte { return sha256.Sum256([]byte(stage.ReadFile(t, filepath.Join(dir, name)))) }

	// One connection for three.
	said := curl("-w", "%{num_connects} ", "-o", dir+"/0", base+"/bytes/0", "-o", dir+"/1024", base+"/bytes/1024", "-o", dir+"/1048576", base+"/bytes/1048576")
	if said != "1 0 0 " {
		t.Errorf("connections that curl made: %s", said)
	}
	for _, size := range []int{0, 1 << 10, 1 << 20} {
		if sum(fmt.Sprint(size)) != sha256.Sum256(pattern.Bytes(size)) {
			t.Errorf("GET of %d bytes: not what it should be", size)
		}
	}
	stage.WriteFile(t, dir+"/up", string(pattern.Bytes(1<<20)), 0o644)
	for how, args := range map[string][]string{
		"counted":  {"-T", dir + "/up"},
		"expected": {"-H", "Expect: 100-continue", "-v", "-T", dir + "/up"},
		"chunked":  {"-H", "Transfer-Encoding: chunked", "-T", dir + "/up"},
		"1.0":      {"-0", "-T", dir + "/up"},
	} {
		url := base + "/store/curl-" + how
		if said := curl(append(args, url)...); how == "expected" && !strings.Contains(said, "HTTP/1.1 100") {
			t.Errorf("nobody asked for the body:\n%s", said)
		}
		curl("-o", dir+"/down", url)
		if sum("down") != sum("up") {
			t.Errorf("%s: something else came back", url)
		}
	}
	if said := curl("-I", base+"/bytes/1024"); !strings.Contains(strings.ToLower(said), "content-length: 1024") {
		t.Errorf("HEAD:\n%s", said)
	}
	if said := curl("-0", base+"/bytes/1024"); said != string(pattern.Bytes(1024)) {
		t.Errorf("HTTP/1.0: %d bytes", len(said))
	}
}

// clientOf returns a client of HTTP/1.1 that keeps its connections. It proves
// who it is where own is given.
func clientOf(t *testing.T, own *mesh.SVID) *http.Client {
	t.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 100, DisableCompression: true}
	if own != nil {
		transport.TLSClientConfig = own.Client()
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 5 * time.Minute}
}

// TestRange: parts of a thing are asked for and given.
func TestRange(t *testing.T) {
	t.Parallel()
	p := mesh.NewPair(t, mesh.NewService(t).Address)
	said := stage.Must(t, "curl", "-sS", "-i", "-r", "100-109", "http://"+p.Entry+"/bytes/1024")
	head, body, _ := strings.Cut(said, "\r\n\r\n")
	if !strings.HasPrefix(head, "HTTP/1.1 206") || !strings.Contains(strings.ToLower(head), "content-range: bytes 100-109/1024") || body != string(pattern.Bytes(1024)[100:110]) {
		t.Errorf("%q", said)
	}
}

// TestWrk: two seconds of as many requests as there can be, without an error.
func TestWrk(t *testing.T) {
	t.Parallel()
	p := mesh.NewPair(t, nginxServer(t))
	said := stage.Must(t, "wrk", "-t", "1", "-c", "20", "-d", "2s", "--timeout", "30s", "--latency", "http://"+p.Entry+"/bytes/1024")
	t.Log(said)
	if !strings.Contains(said, "requests in") || strings.Contains(said, "Socket errors") || strings.Contains(said, "Non-2xx") {
		t.Errorf("wrk:\n%s", said)
	}
}
