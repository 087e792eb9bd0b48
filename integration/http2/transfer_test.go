//go:build integration

package http2_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/pattern"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

const (
	// large is what a proxy must not hold.
	large = 100 << 20
	// held is how much more memory one may take for it: what fits in windows and
	// buffers, and the garbage of the requests beside it.
	held = 24 << 20
	// inSockets bounds what of a body fits into the buffers of three
	// connections, where nobody reads at the end.
	inSockets = 48 << 20
)

// swells looks at how much memory the proxies of a route take. What it returns
// wants it to have been little.
func (r *route) swells(t *testing.T) (check func()) {
	t.Helper()
	var growths []func() int
	for _, n := range r.nodes() {
		growths = append(growths, stage.Growth(t, n.PID()))
	}
	return func() {
		t.Helper()
		for i, growth := range growths {
			grown := growth()
			t.Logf("%s grew by %d KiB", r.nodes()[i].Name, grown>>10)
			if grown > held {
				t.Errorf("%s grew by %d KiB, want no more than %d KiB", r.nodes()[i].Name, grown>>10, held>>10)
			}
		}
	}
}

// both are a service that speaks both versions, and requests go to it by one or
// the other.
var both = []struct {
	name  string
	start func(t *testing.T) far
}{
	{"", func(t *testing.T) far { return far{address: mesh.NewService(t).Address} }},
	{"by HTTP/2, ", func(t *testing.T) far { return far{address: mesh.NewService(t).Address, all: true} }},
}

// TestLargeBodies: 100 MiB go up and come down, on one stream and on twenty of
// a connection at a time, and no proxy holds them.
func TestLargeBodies(t *testing.T) {
	t.Parallel()
	for _, f := range both {
		through(t, f.name, f.start, func(t *testing.T, r *route) {
			client := r.client(t)
			check := r.swells(t)
			for _, streams := range []int64{1, 20} {
				var g sync.WaitGroup
				for range streams {
					g.Go(func() { upAndDown(t, r, client, large/streams) })
				}
				g.Wait()
			}
			check()
		})
	}
}

// upAndDown sends so many bytes, counted or not, and fetches as many.
func upAndDown(t *testing.T, r *route, client *http.Client, size int64) {
	a, err := mesh.Fetch(client, http.MethodPost, r.url("/sum"), pattern.Of(size))
	if err != nil || a.Body != pattern.Sum(size) {
		t.Errorf("upload of %d bytes: %d %.100q, %v", size, a.Status, a.Body, err)
	}
	resp, err := client.Get(r.url(fmt.Sprintf("/flood/%d", size)))
	if err != nil {
		t.Errorf("download: %v", err)
		return
	}
	defer resp.Body.Close()
	if n, err := pattern.Compare(resp.Body); err != nil || n != size {
		t.Errorf("download: %d of %d bytes, %v", n, size, err)
	}
}

// TestBackPressureDown: where the client does not read, the service is stopped.
// What else goes on the same connection goes on.
func TestBackPressureDown(t *testing.T) {
	t.Parallel()
	for _, f := range []bool{false, true} {
		for _, w := range ways {
			t.Run(fmt.Sprintf("%s, by HTTP/2 %t", w.name, f), func(t *testing.T) {
				t.Parallel()
				service := mesh.NewService(t)
				r := w.open(t, far{address: service.Address, all: f})
				client, check := r.client(t), r.swells(t)
				resp, err := client.Get(r.url(fmt.Sprintf("/flood/%d", large)))
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				if n := stage.StandsStill(t, &service.Moved); n > inSockets {
					t.Errorf("%d bytes went to a client that reads none", n)
				}
				others(t, r, client, true)
				if n, err := pattern.Compare(resp.Body); err != nil || n != large {
					t.Errorf("%d bytes, %v", n, err)
				}
				check()
			})
		}
	}
}

// TestBackPressureUp: where the service does not read, the client is stopped.
func TestBackPressureUp(t *testing.T) {
	t.Parallel()
	for _, f := range []bool{false, true} {
		for _, w := range ways {
			t.Run(fmt.Sprintf("%s, by HTTP/2 %t", w.name, f), func(t *testing.T) {
				t.Parallel()
				service := mesh.NewService(t)
				r := w.open(t, far{address: service.Address, all: f})
				client, check := r.client(t), r.swells(t)
				var sent atomic.Int64
				answers := make(chan string)
				go func() {
					body := io.TeeReader(pattern.Of(large), mesh.Counting{Writer: io.Discard, N: &sent})
					a, err := mesh.Fetch(client, http.MethodPost, r.url("/stall"), body)
					answers <- fmt.Sprint(a.Body, err)
				}()
				if n := stage.StandsStill(t, &sent); n > inSockets {
					t.Errorf("%d bytes went to a service that reads none", n)
				}
				// A service of net/http leaves uploads nothing beside one that it
				// does not read, and does not go on with that one then.
				others(t, r, client, false)
				close(service.Open)
				if got, want := <-answers, pattern.Sum(large)+"<nil>"; got != want {
					t.Errorf("the answer is %s, want %s", got, want)
				}
				check()
			})
		}
	}
}

// others go on beside a stream that stands still.
func others(t *testing.T, r *route, client *http.Client, upload bool) {
	t.Helper()
	const size = 64 << 10
	for range 20 {
		if got, err := mesh.FetchOK(client, r.url(fmt.Sprint("/bytes/", size))); err != nil || got != string(pattern.Bytes(size)) {
			t.Fatalf("another stream: %d bytes, %v", len(got), err)
		}
		if !upload {
			continue
		}
		if a, err := mesh.Fetch(client, http.MethodPost, r.url("/sum"), pattern.Of(size)); err != nil || a.Body != pattern.Sum(size) {
			t.Fatalf("another stream: %d %.100q, %v", a.Status, a.Body, err)
		}
	}
}

// TestTrailers: content goes and comes back, with a trailer each way.
func TestTrailers(t *testing.T) {
	t.Parallel()
	for _, f := range append(both, struct {
		name  string
		start func(t *testing.T) far
	}{"node, ", nodeService}) {
		through(t, f.name, f.start, func(t *testing.T, r *route) {
			client := r.client(t)
			for _, size := range []int64{0, 1 << 10, 1 << 20} {
				req, err := http.NewRequest(http.MethodPost, r.url("/echo"), pattern.Of(size))
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
				if sum, got := resp.Trailer.Get("X-Sum"), resp.Trailer.Get("X-Got"); sum != pattern.Sum(size) || got != "all of it" {
					t.Errorf("trailers of %d bytes: %v", size, resp.Trailer)
				}
			}
		})
	}
}

// TestForms: interim responses, and those that have no content.
func TestForms(t *testing.T) {
	t.Parallel()
	for _, f := range both {
		through(t, f.name, f.start, func(t *testing.T, r *route) {
			client := r.client(t)
			var hints []string
			req, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
				Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
					hints = append(hints, fmt.Sprint(code, " ", header.Get("Link")))
					return nil
				},
			}), http.MethodGet, r.url("/hints"), nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if len(hints) != 1 || hints[0] != "103 </style.css>; rel=preload" {
				t.Errorf("hints: %q", hints)
			}
			if a, err := mesh.Fetch(client, http.MethodHead, r.url("/bytes/1024"), nil); err != nil || a.Status != http.StatusOK || a.Length != 1024 || a.Body != "" {
				t.Errorf("HEAD: %+v, %v", a, err)
			}
			if a, err := mesh.Fetch(client, http.MethodGet, r.url("/bytes/1024"), nil, `If-None-Match: "pattern"`); err != nil || a.Status != http.StatusNotModified || a.Body != "" {
				t.Errorf("304: %+v, %v", a, err)
			}
			if a, err := mesh.Fetch(client, http.MethodGet, r.url("/bytes/1024"), nil, "Range: bytes=100-109"); err != nil || a.Status != http.StatusPartialContent || a.Body != string(pattern.Bytes(1024)[100:110]) {
				t.Errorf("206: %+v, %v", a, err)
			}
		})
	}
}

// TestLargeFields: heads of 60 KiB pass. Larger ones are refused, by 431 or,
// where the service has them, by 502.
func TestLargeFields(t *testing.T) {
	t.Parallel()
	for _, f := range both {
		through(t, f.name, f.start, func(t *testing.T, r *route) {
			const most, more = 60 << 10, 68 << 10
			client := r.client(t)
			a, err := mesh.Fetch(client, http.MethodGet, r.url(fmt.Sprint("/fields/", most)), nil)
			got := 0
			for name := range a.Header {
				if strings.HasPrefix(name, "X-Large-") {
					got += len(a.Header.Get(name))
				}
			}
			if err != nil || a.Status != http.StatusOK || got != most {
				t.Errorf("fields of %d bytes that the service sends: %d, %d bytes, %v", most, a.Status, got, err)
			}
			if got := statusOfLarge(t, r, most); got != "200" {
				t.Errorf("fields of %d bytes that the client sends: %s", most, got)
			}
			if len(r.nodes()) == 0 {
				return // net/http takes more
			}
			if a, err := mesh.Fetch(client, http.MethodGet, r.url(fmt.Sprint("/fields/", more)), nil); err != nil || a.Status != http.StatusBadGateway {
				t.Errorf("fields of %d bytes that the service sends: %d, %v", more, a.Status, err)
			}
			if got := statusOfLarge(t, r, more); got != "431" {
				t.Errorf("fields of %d bytes that the client sends: %s", more, got)
			}
			if _, err := mesh.FetchOK(client, r.url("/bytes/10")); err != nil {
				t.Errorf("what comes behind it: %v", err)
			}
		})
	}
}

// statusOfLarge sends fields of so many bytes together, also where they are
// more than the other end says that it takes, and returns the status.
func statusOfLarge(t *testing.T, r *route, size int) (status string) {
	t.Helper()
	p := newPeer(t, r)
	p.handshake(t)
	if err := p.askLarge("/any", size); err != nil {
		t.Fatal(err)
	}
	stage.Eventually(t, stage.Soon, "there is an answer", func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		for status = range p.begun {
			return nil
		}
		return fmt.Errorf("there is none, %s", p.seen)
	})
	return status
}
