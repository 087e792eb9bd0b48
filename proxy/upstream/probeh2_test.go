package upstream

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// serveHTTP2 serves HTTP/2 without TLS, and nothing else, until the test ends.
func serveHTTP2(t *testing.T, answer http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewUnstartedServer(answer)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// TestProbeHTTP2: what counts as a good answer over HTTP/2.
func TestProbeHTTP2(t *testing.T) {
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	for _, c := range []struct {
		name, path, problem string
		answer              http.HandlerFunc
	}{
		{"200", "/healthz", "", status(200)},
		{"redirect", "/healthz", "", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/login", http.StatusFound) }},
		{"hints first", "/healthz", "", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(103); w.WriteHeader(204) }},
		{"body without end", "/healthz", "", func(w http.ResponseWriter, _ *http.Request) {
			for range 2 * maxAnswer / 1024 {
				if _, err := io.WriteString(w, strings.Repeat("x", 1024)); err != nil {
					return
				}
			}
		}},
		{"404", "/healthz", "answered with status 404", status(404)},
		{"503", "/healthz", "answered with status 503", status(503)},
		{"long head", "/healthz", errNotHTTP2.Error(), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 2*maxAnswerHead))
		}},
		{"broken off", "/healthz", errNotHTTP2.Error(), func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
		{"asked as it should", "//healthz/?a=%2F;b", "", func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || r.ProtoMajor != 2 || r.Host != "orders" || r.RequestURI != "//healthz/?a=%2F;b" || r.UserAgent() != "narthex" || r.Header.Get("Accept-Encoding") != "" {
				w.WriteHeader(http.StatusTeapot)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			want := c.problem
			if want != "" {
				want = "health check: GET " + c.path + ": " + want
			}
			got := checkOnce(t, serveHTTP2(t, c.answer), Health{Path: c.path, HTTP2: true, Host: "orders", Timeout: 20 * time.Second})
			if got != want {
				t.Errorf("problem %q, want %q", got, want)
			}
		})
	}
}

// TestProbeHTTP2Elsewhere: far ends that speak HTTP/1.1 alone, or nothing.
func TestProbeHTTP2Elsewhere(t *testing.T) {
	t.Parallel()
	old := httptest.NewServer(http.NotFoundHandler())
	defer old.Close()
	h := Health{Path: "/", HTTP2: true, Timeout: 20 * time.Second}
	if got, want := checkOnce(t, old.Listener.Addr().String(), h), "health check: GET /: "+errNotHTTP2.Error(); got != want {
		t.Errorf("of HTTP/1.1: problem %q, want %q", got, want)
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close() // which the kernel answers for
	h.Timeout = 100 * time.Millisecond
	if got, want := checkOnce(t, silent.Addr().String(), h), "health check: no answer within 100ms"; got != want {
		t.Errorf("silent: problem %q, want %q", got, want)
	}
}

// fuzzHTTP2 has a far end send bytes to a check, which is to say no more of them
// than a status, in one short line, and nothing good of what is no HTTP/2.
func fuzzHTTP2(f *testing.F, h Health) {
	const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	for _, seed := range []string{
		"", settings, settings + "\x00\x00\x00\x04\x01\x00\x00\x00\x00", "HTTP/1.1 200 OK\r\n\r\n",
		settings + "\x00\x00\x01\x01\x05\x00\x00\x00\x01\x88",                             // a head with :status 200 and nothing else
		settings + "\x00\x00\x08\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0b", // GOAWAY
	} {
		f.Add([]byte(seed))
	}
	s := NewSet(Options{})
	f.Cleanup(s.Close)
	h.Interval = time.Hour
	g, err := s.Take("orders", []string{a}, Settings{Health: h})
	if err != nil {
		f.Fatal(err)
	}
	e := g.targets[0].addresses()[0]
	f.Fuzz(func(t *testing.T, answer []byte) {
		near, far := net.Pipe()
		served := make(chan struct{})
		go func() {
			defer close(served)
			var both sync.WaitGroup
			both.Go(func() { _, _ = io.Copy(io.Discard, far) })
			_, _ = far.Write(answer)
			_ = far.Close()
			both.Wait()
		}()
		err := e.probe(t.Context(), near)
		_ = near.Close()
		<-served
		if err == nil {
			if h.GRPC || len(answer) < len(settings) || answer[3] != settings[3] {
				t.Errorf("%q is good", answer)
			}
		} else if text := err.Error(); len(text) > 150 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("error %q", text)
		}
	})
}

// FuzzAskHTTP2: a check of a path, over HTTP/2.
func FuzzAskHTTP2(f *testing.F) { fuzzHTTP2(f, Health{Path: "/", HTTP2: true}) }
