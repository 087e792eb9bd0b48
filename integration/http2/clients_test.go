//go:build integration

package http2_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/pattern"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// clients are those of HTTP/2 that come to the services. Each fetches bytes of
// all sizes, and most store some and compare them.
var clients = []struct {
	name string
	run  func(t *testing.T, r *route)
}{
	{"go", goClient},
	{"curl", curlClient},
	{"nghttp", nghttpClient},
	{"node", func(t *testing.T, r *route) {
		succeeds(t, stage.NodeScript(t, "node client", "client.js", append([]string{r.url("")}, r.files()...)...))
	}},
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

// TestClients goes with every client to every service, on every way.
func TestClients(t *testing.T) {
	t.Parallel()
	for _, s := range services {
		through(t, s.name+", ", s.start, func(t *testing.T, r *route) {
			if len(r.nodes()) == 0 && s.old {
				return // they do not understand each other without us
			}
			for _, c := range clients {
				t.Run(c.name, func(t *testing.T) { c.run(t, r) })
			}
		})
	}
}

func goClient(t *testing.T, r *route) {
	client := r.client(t)
	var g sync.WaitGroup
	defer g.Wait()
	for _, size := range []int{0, 1 << 10, 1 << 20} {
		want := pattern.Bytes(size)
		for how, body := range map[string]io.Reader{"counted": bytes.NewReader(want), "uncounted": io.MultiReader(bytes.NewReader(want))} {
			g.Go(func() {
				url := r.url(fmt.Sprintf("/store/go-%s-%d", how, size))
				if a, err := mesh.Fetch(client, http.MethodPut, url, body); err != nil || a.Status/100 != 2 {
					t.Errorf("PUT of %d bytes: %d, %v", size, a.Status, err)
				}
				if got, err := mesh.FetchOK(client, url); err != nil || got != string(want) {
					t.Errorf("%s: %d bytes came back, %v", url, len(got), err)
				}
			})
		}
		for range 10 {
			g.Go(func() {
				if got, err := mesh.FetchOK(client, r.url(fmt.Sprintf("/bytes/%d", size))); err != nil || got != string(want) {
					t.Errorf("GET of %d bytes: %d bytes, %v", size, len(got), err)
				}
			})
		}
	}
	if a, err := mesh.Fetch(client, http.MethodHead, r.url("/bytes/1024"), nil); err != nil || a.Length != 1024 || a.Body != "" {
		t.Errorf("HEAD: %+v, %v", a, err)
	}
}

func curlClient(t *testing.T, r *route) {
	dir := stage.Folder(t, "curl")
	curl := func(args ...string) string {
		t.Helper()
		if r.own != nil {
			args = append([]string{"--http2", "--cert", r.own.CertFile, "--key", r.own.KeyFile, "--cacert", r.own.CA.Bundle}, args...)
		} else {
			args = append([]string{"--http2-prior-knowledge"}, args...)
		}
		return stage.Must(t, "curl", append([]string{"-sS", "--fail-with-body", "--max-time", "20"}, args...)...)
	}
	sum := func(name string) [32]byte { return sha256.Sum256([]byte(stage.ReadFile(t, filepath.Join(dir, name)))) }

	get := []string{"-w", "%{http_version} %{num_connects} "}
	for _, size := range []string{"0", "1024", "1048576"} {
		if get = append(get, "-o", dir+"/"+size, r.url("/bytes/"+size)); r.own == nil {
			curl(get...) // which of this version cannot use such a connection again
			get = nil
		}
	}
	if r.own != nil { // one connection for three
		if said := curl(get...); said != "2 1 2 0 2 0 " {
			t.Errorf("versions and connections: %s", said)
		}
	}
	for _, size := range []int{0, 1 << 10, 1 << 20} {
		if sum(fmt.Sprint(size)) != sha256.Sum256(pattern.Bytes(size)) {
			t.Errorf("GET of %d bytes: not what it should be", size)
		}
	}
	stage.WriteFile(t, dir+"/up", string(pattern.Bytes(1<<20)), 0o644)
	for how, args := range map[string][]string{
		"counted":   {"-T", dir + "/up"},
		"expected":  {"-H", "Expect: 100-continue", "-T", dir + "/up"},
		"uncounted": {"-H", "Content-Length:", "-T", dir + "/up"},
	} {
		url := r.url("/store/curl-" + how)
		curl(append(args, url)...)
		curl("-o", dir+"/down", url)
		if sum("down") != sum("up") {
			t.Errorf("%s: something else came back", url)
		}
	}
	if said := curl("-I", r.url("/bytes/1024")); !strings.HasPrefix(said, "HTTP/2 200") || !strings.Contains(said, "content-length: 1024") {
		t.Errorf("HEAD:\n%s", said)
	}
}

// nghttpClient asks for 50 at a time with padding, a head in CONTINUATION
// frames and small windows.
func nghttpClient(t *testing.T, r *route) {
	args := []string{"-v", "--no-dep", "-m", "50", "-b", "64", "--continuation", "-w", "12", "-W", "16", "-t", "20s", r.url("/bytes/1024"), r.url("/bytes/1048576")}
	if r.own != nil {
		args = append([]string{"--cert", r.own.CertFile, "--key", r.own.KeyFile}, args...)
	}
	said := stage.Must(t, "nghttp", append([]string{"-n"}, args...)...)
	if n := strings.Count(said, ":status: 200"); n != 100 {
		t.Errorf("%d of 100 requests are answered\n%s", n, said[max(0, len(said)-4000):])
	}
}

// TestLibraries makes calls with gRPC's libraries of other languages.
func TestLibraries(t *testing.T) {
	t.Parallel()
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			service := newCalls(t)
			r := w.open(t, service.far)
			for name, start := range map[string]func(args ...string) *stage.Process{
				"node": func(args ...string) *stage.Process {
					return stage.Start(t, "grpc-js", "env", append([]string{"NODE_PATH=" + filepath.Join(grpcjsModules, "node_modules"), "node", stage.Testdata(t, "calls.js")}, args...))
				},
				"python": func(args ...string) *stage.Process { return stage.PythonScript(t, "grpcio", "calls.py", args...) },
			} {
				t.Run(name, func(t *testing.T) {
					cancelled := service.cancelled.Load()
					succeeds(t, start(append([]string{r.address}, r.files()...)...))
					stage.Eventually(t, stage.Soon, "the service learns what was left", func() error {
						if n := service.cancelled.Load() - cancelled; n != 2 || service.began.Load() != service.ended.Load() {
							return fmt.Errorf("%d of 2 calls, %d of all %d have ended", n, service.ended.Load(), service.began.Load())
						}
						return nil
					})
				})
			}
		})
	}
}

// TestH2load: two seconds of as many requests as there can be, without an
// error.
func TestH2load(t *testing.T) {
	t.Parallel()
	r := way{in: true, out: true}.open(t, nginxService(t))
	said := stage.Must(t, "h2load", "-t", "1", "-c", "4", "-m", "50", "-D", "2", r.url("/bytes/1024"))
	t.Log(said)
	if !strings.Contains(said, " 0 failed, 0 errored, 0 timeout") || strings.Contains(said, " 0 succeeded") {
		t.Errorf("h2load:\n%s", said)
	}
}
