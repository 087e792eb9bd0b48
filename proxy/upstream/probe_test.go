package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// answers serves text to whoever asks, in memory, and tells of what was asked.
func answers(t *testing.T, text string, asked chan<- string) func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			head := make([]byte, 4096)
			n, _ := far.Read(head)
			select {
			case asked <- string(head[:n]):
			default:
			}
			if text == "" { // silent
				_, _ = far.Read(head)
				return
			}
			_, _ = io.WriteString(far, text)
		}()
		return near, nil
	}
}

// TestProbe: what counts as a good answer.
func TestProbe(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\n"
	for _, c := range []struct{ name, answer, problem string }{
		{"200", head + "Content-Length: 2\r\n\r\nok", ""},
		{"204", "HTTP/1.1 204 No Content\r\n\r\n", ""},
		{"redirect", "HTTP/1.0 302 Found\r\nLocation: /login\r\n\r\n", ""},
		{"hints first", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + head + "\r\n", ""},
		{"body that is cut", head + "Content-Length: 20\r\n\r\nok", ""},
		{"body without end", head + "\r\n" + strings.Repeat("x", 2*maxAnswer), ""},
		{"404", "HTTP/1.1 404 Not Found\r\n\r\n", "GET /healthz: answered with status 404"},
		{"503", "HTTP/1.1 503 \x1b[2J\r\n\r\n", "GET /healthz: answered with status 503"},
		{"hints alone", "HTTP/1.1 103 Early Hints\r\n\r\n", "GET /healthz: the connection ended without a whole answer"},
		{"cut", head, "GET /healthz: the connection ended without a whole answer"},
		{"head without end", head + strings.Repeat("x: y\r\n", maxAnswer), "GET /healthz: no answer of HTTP/1.1 in the first 65536 bytes"},
		{"not HTTP", "220 mail.example ESMTP\r\n\r\n", "GET /healthz: no answer of HTTP/1.1 in the first 65536 bytes"},
		{"silent", "", "no answer within 2s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, s *Set) {
				asked := make(chan string, 1)
				s.Dial = answers(t, c.answer, asked)
				g := take(t, s, Settings{Health: Health{Interval: 10 * time.Second, UnhealthyAfter: 1, Path: "/healthz"}}, a)
				if got, want := <-asked, "GET /healthz HTTP/1.1\r\nHost: 10.0.0.1\r\nUser-Agent: narthex\r\nAccept: */*\r\nConnection: close\r\n\r\n"; got != want {
					t.Errorf("asked %q, want %q", got, want)
				}
				time.Sleep(3 * time.Second)
				list, _ := g.Status(1)
				want := c.problem
				if want != "" {
					want = "health check: " + want
				}
				if list[0].Problem != want || list[0].Healthy != (want == "") {
					t.Errorf("status %+v, want problem %q", list[0], want)
				}
			})
		})
	}
}

// TestProbeEnds: a check that waits for its answer ends with the set.
func TestProbeEnds(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		asked := make(chan string, 1)
		s.Dial = answers(t, "", asked)
		take(t, s, Settings{Health: Health{Interval: time.Minute, Timeout: time.Minute, Path: "/"}}, a)
		<-asked
		begin := time.Now()
		if s.Close(); time.Since(begin) != 0 {
			t.Errorf("closed after %s", time.Since(begin))
		}
	})
}

func TestHealthHost(t *testing.T) {
	s := NewSet(Options{})
	defer s.Close()
	for _, c := range []struct{ target, host, want string }{
		{"orders.shop.svc:8080", "", "orders.shop.svc:8080"},
		{"orders.shop.svc:80", "", "orders.shop.svc"},
		{"[2001:db8::1]:80", "", "[2001:db8::1]"},
		{"unix:/run/a.sock", "", "localhost"},
		{"unix:/run/a.sock", "orders.example", "orders.example"},
	} {
		g := take(t, s, Settings{Health: Health{Interval: time.Minute, Path: "/", Host: c.host}}, c.target)
		if got := g.targets[0].healthHost(); got != c.want {
			t.Errorf("%s: host %q, want %q", c.target, got, c.want)
		}
	}
}

// TestSecure: a check goes over what the hook makes of the connection, and says
// nothing of the endpoint where the hook cannot.
func TestSecure(t *testing.T) {
	var over net.Conn
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "orders" || !r.Close || r.URL.Path != "/ready" {
			w.WriteHeader(http.StatusBadRequest)
		}
	}))
	t.Cleanup(service.Close)
	for _, c := range []struct {
		name    string
		err     error
		healthy bool
	}{
		{"secured", nil, true},
		{"no identity", fmt.Errorf("no SVID yet: %w", context.Canceled), true},
		{"bad peer", errors.New("the peer is somebody else"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := NewSet(Options{Secure: func(_ context.Context, owner, target string, conn net.Conn) (net.Conn, error) {
				if owner != "orders" || target != service.Listener.Addr().String() {
					t.Errorf("asked to secure %s of %s", target, owner)
				}
				if c.err != nil {
					return nil, c.err
				}
				over = &secured{Conn: conn}
				return over, nil
			}})
			defer s.Close()
			g := take(t, s, Settings{Health: Health{Interval: time.Hour, UnhealthyAfter: 1, Path: "/ready", Host: "orders"}}, service.Listener.Addr().String())
			g.targets[0].addresses()[0].check(t.Context())
			if list, _ := g.Status(1); list[0].Healthy != c.healthy {
				t.Errorf("status %+v", list[0])
			}
			if sec, ok := over.(*secured); c.err == nil && (!ok || !sec.closed) {
				t.Error("what the hook made is not closed")
			}
		})
	}
}

type secured struct {
	net.Conn
	closed bool
}

func (s *secured) Close() error { s.closed = true; return s.Conn.Close() }

func TestHealthRefused(t *testing.T) {
	for _, h := range []Health{
		{Path: "/", Interval: 0},
		{Host: "x", Interval: 1},
		{Path: "healthz", Interval: 1},
		{Path: "/a b", Interval: 1},
		{Path: "/a\r\nx: y", Interval: 1},
		{Path: "/ä", Interval: 1},
		{Path: "/a#b", Interval: 1},
		{Path: "/" + strings.Repeat("x", maxPath), Interval: 1},
		{Path: "/", Host: "a\r\nb", Interval: 1},
		{Path: "/", Host: strings.Repeat("x", maxHost+1), Interval: 1},
		{Path: "/", GRPC: true, Interval: 1},
		{GRPC: true},
		{Service: "shop.v1.Orders", Interval: 1},
		{GRPC: true, Service: "a b", Interval: 1},
		{GRPC: true, Service: "a\x00", Interval: 1},
		{GRPC: true, Service: strings.Repeat("x", maxService+1), Interval: 1},
		{GRPC: true, Host: "a b", Interval: 1},
	} {
		if err := (Settings{Health: h}).Check(); err == nil {
			t.Errorf("%+v is taken", h)
		}
	}
	for _, s := range []Settings{{IdleTimeout: -1}, {MaxRequests: -1}, {MaxConnections: -1}, {RetryPercent: 101}} {
		if err := s.Check(); err == nil {
			t.Errorf("%+v is taken", s)
		}
	}
	for _, h := range []Health{
		{},
		{Path: "/healthz?full=1", Host: "[::1]:8080", Interval: 1},
		{GRPC: true, Interval: 1},
		{GRPC: true, Service: strings.Repeat("x", maxService), Host: "orders", Interval: 1},
	} {
		if err := (Settings{Health: h}).Check(); err != nil {
			t.Errorf("%+v: %v", h, err)
		}
	}
}

// pipe is a far end that has sent all it sends.
type pipe struct {
	io.Reader
	io.Writer
}

// FuzzAsk: whatever a service answers, a check says no more of it than its
// status, in one short line.
func FuzzAsk(f *testing.F) {
	for _, seed := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 103 x\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
		"HTTP/1.1 404 \x1b[2J\r\n\r\n", "SSH-2.0-x\r\n", "", "HTTP/9.9 999 x\n\n", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		err := ask(pipe{bytes.NewReader(answer), io.Discard}, "/", "x")
		if err == nil {
			if !bytes.HasPrefix(answer, []byte("HTTP/")) {
				t.Errorf("%q is good", answer)
			}
			return
		}
		if text := err.Error(); len(text) > 100 || strings.ContainsAny(text, "\r\n\x1b") {
			t.Errorf("error %q", text)
		}
	})
}
