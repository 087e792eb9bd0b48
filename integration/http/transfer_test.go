//go:build integration

package http_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/pattern"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestTrailers: a body in chunks goes and comes back, with a trailer each way.
func TestTrailers(t *testing.T) {
	t.Parallel()
	for _, s := range []struct{ name, address string }{{"go", mesh.NewService(t).Address}, {"node", nodeServer(t)}} {
		t.Run(s.name, func(t *testing.T) {
			p := mesh.NewPair(t, s.address)
			client := clientOf(t, nil)
			for _, size := range []int64{0, 1 << 10, 1 << 20} {
				req, err := http.NewRequest(http.MethodPost, "http://"+p.Entry+"/echo", io.MultiReader(pattern.Of(size)))
				if err != nil {
					t.Fatal(err)
				}
				req.Trailer = http.Header{"X-Sent": {"all of it"}}
				resp, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err != nil || !bytes.Equal(body, pattern.Bytes(int(size))) {
					t.Errorf("%d of %d bytes came back, %v", len(body), size, err)
				}
				if got := resp.Trailer.Get("X-Sum"); got != pattern.Sum(size) {
					t.Errorf("the service's trailer is %q, all of them %v", got, resp.Trailer)
				}
				if got := resp.Trailer.Get("X-Got"); got != "all of it" {
					t.Errorf("the service got the trailer %q", got)
				}
			}
		})
	}
}

// TestEarlyHints: 103 reaches the client before the answer does.
func TestEarlyHints(t *testing.T) {
	t.Parallel()
	for _, s := range []struct{ name, address string }{{"go", mesh.NewService(t).Address}, {"node", nodeServer(t)}} {
		t.Run(s.name, func(t *testing.T) {
			p := mesh.NewPair(t, s.address)
			var hints []string
			ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
				hints = append(hints, fmt.Sprint(code, " ", header.Get("Link")))
				return nil
			}})
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.Entry+"/hints", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := clientOf(t, nil).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok\n" {
				t.Errorf("%q, %v", body, err)
			}
			if len(hints) != 1 || hints[0] != "103 </style.css>; rel=preload" {
				t.Errorf("hints: %q", hints)
			}
		})
	}
}

// TestPipelined: requests that come all at once are answered in their order.
func TestPipelined(t *testing.T) {
	t.Parallel()
	p := mesh.NewPair(t, mesh.NewService(t).Address)
	c := dialTLS(t, p.Secure, p.Client)
	var all strings.Builder
	for i := range 50 {
		switch i % 3 {
		case 0:
			fmt.Fprintf(&all, "GET /bytes/%d HTTP/1.1\r\nHost: a.example\r\n\r\n", 100*i)
		case 1:
			body := pattern.Bytes(100 * i)
			fmt.Fprintf(&all, "POST /sum HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		case 2:
			body := pattern.Bytes(100 * i)
			fmt.Fprintf(&all, "POST /sum HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body)
		}
	}
	var g sync.WaitGroup
	defer g.Wait()
	g.Go(func() { _, _ = io.WriteString(c, all.String()) })
	in := bufio.NewReader(c)
	for i := range 50 {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		want := string(pattern.Bytes(100 * i))
		if i%3 > 0 {
			want = pattern.Sum(int64(100 * i))
		}
		if err != nil || resp.StatusCode != http.StatusOK || string(body) != want {
			t.Fatalf("answer %d: %s, %d bytes, %v", i, resp.Status, len(body), err)
		}
	}
}

// dialTLS connects to address as own, which has to work.
func dialTLS(t *testing.T, address string, own *mesh.SVID) *tls.Conn {
	t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: mesh.CallTime}, "tcp", address, own.Client())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	return c
}

// dialPlain connects to address in plaintext, which has to work.
func dialPlain(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, mesh.CallTime)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	return c
}

const (
	// large is a body that a proxy must not hold.
	large = 100 << 20
	// held is how much more memory one may take for it, in the race of all
	// tests for two cores: what it has measured is a few MiB.
	held = 24 << 20
	// inSockets bounds what of a body fits into the buffers of three
	// connections, where nobody reads at the end.
	inSockets = 48 << 20
)

// TestLargeBodies: 100 MiB go up and come down, and no proxy holds them.
func TestLargeBodies(t *testing.T) {
	t.Parallel()
	p := mesh.NewPair(t, mesh.NewService(t).Address)
	client := clientOf(t, nil)
	out, in := stage.Growth(t, p.Out.PID()), stage.Growth(t, p.In.PID())
	for how, body := range map[string]io.Reader{"counted": pattern.Of(large), "chunked": pattern.Of(large)} {
		req, err := http.NewRequest(http.MethodPost, "http://"+p.Entry+"/sum", body)
		if err != nil {
			t.Fatal(err)
		}
		if how == "counted" {
			req.ContentLength = large
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s upload: %v", how, err)
		}
		sum, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || string(sum) != pattern.Sum(large) {
			t.Errorf("%s upload: %s %q, %v", how, resp.Status, sum, err)
		}
	}
	resp, err := client.Get(fmt.Sprintf("http://%s/flood/%d", p.Entry, large))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := pattern.Compare(resp.Body); err != nil || n != large {
		t.Errorf("download: %d bytes, %v", n, err)
	}
	checkMemory(t, out(), in())
}

func checkMemory(t *testing.T, out, in int) {
	t.Helper()
	t.Logf("the outbound proxy grew by %d KiB, the inbound one by %d KiB", out>>10, in>>10)
	if out > held || in > held {
		t.Errorf("want no more than %d KiB", held>>10)
	}
}

// TestBackPressureUp: where the service does not read, the client is stopped,
// and nothing is held for it. Nothing is lost when it goes on.
func TestBackPressureUp(t *testing.T) {
	t.Parallel()
	service := mesh.NewService(t)
	p := mesh.NewPair(t, service.Address)
	out, in := stage.Growth(t, p.Out.PID()), stage.Growth(t, p.In.PID())
	var sent atomic.Int64
	body := io.TeeReader(pattern.Of(large), mesh.Counting{Writer: io.Discard, N: &sent})
	answers := make(chan string)
	go func() {
		a, err := mesh.Fetch(clientOf(t, nil), http.MethodPost, "http://"+p.Entry+"/stall", body)
		answers <- fmt.Sprint(a.Body, err)
	}()
	if n := stage.StandsStill(t, &sent); n > inSockets {
		t.Errorf("%d bytes went to a service that reads none", n)
	} else {
		t.Logf("%d KiB are on their way", n>>10)
	}
	close(service.Open)
	if got, want := <-answers, pattern.Sum(large)+"<nil>"; got != want {
		t.Errorf("the answer is %s, want %s", got, want)
	}
	checkMemory(t, out(), in())
}

// TestBackPressureDown: where the client does not read, the service is
// stopped.
func TestBackPressureDown(t *testing.T) {
	t.Parallel()
	service := mesh.NewService(t)
	p := mesh.NewPair(t, service.Address)
	out, in := stage.Growth(t, p.Out.PID()), stage.Growth(t, p.In.PID())
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/flood/%d", p.Entry, large), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := clientOf(t, nil).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n := stage.StandsStill(t, &service.Moved); n > inSockets {
		t.Errorf("%d bytes went to a client that reads none", n)
	} else {
		t.Logf("%d KiB are on their way", n>>10)
	}
	if n, err := pattern.Compare(resp.Body); err != nil || n != large {
		t.Errorf("%d bytes, %v", n, err)
	}
	checkMemory(t, out(), in())
}

// TestClientLeaves: a client that goes in the midst of its body or its answer
// takes the service's work with it, and nobody else's.
func TestClientLeaves(t *testing.T) {
	t.Parallel()
	service := mesh.NewService(t)
	p := mesh.NewPair(t, service.Address)
	good := clientOf(t, p.Client)
	defer good.CloseIdleConnections()
	for what, raw := range map[string]string{
		"within a counted body":   "POST /sum HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1000\r\n\r\nhello",
		"within a chunk":          "POST /sum HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
		"while the service works": "POST /stall HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhello",
		"within the answer":       fmt.Sprintf("GET /flood/%d HTTP/1.1\r\nHost: a.example\r\n\r\n", large),
	} {
		before, records := service.Began.Load(), len(p.In.Records())
		c := dialTLS(t, p.Secure, p.Client)
		if _, err := io.WriteString(c, raw); err != nil {
			t.Fatal(err)
		}
		stage.Eventually(t, stage.Soon, "the service has been asked", func() error {
			if service.Began.Load() == before {
				return fmt.Errorf("not yet")
			}
			return nil
		})
		_ = c.NetConn().(*net.TCPConn).SetLinger(0)
		_ = c.NetConn().Close()
		if body, err := mesh.FetchOK(good, "https://"+p.Secure+"/bytes/10"); err != nil || body != string(pattern.Bytes(10)) {
			t.Errorf("another client after one left %s: %q, %v", what, body, err)
		}
		good.CloseIdleConnections()
		stage.Eventually(t, stage.Soon, "who left "+what+" is not there", func() error {
			if live := p.In.Live(); live > 0 {
				return fmt.Errorf("%d are", live)
			}
			return nil
		})
		p.In.Record(records, "of who left "+what, func(a telemetry.Access) bool {
			return a.HTTP != nil && a.Outcome == "failure" && strings.Contains(a.Reason, "the client") && a.HTTP.Status != http.StatusGatewayTimeout
		})
	}
}
