package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

// startTestBackend starts a backend that ends with the test.
func startTestBackend(t *testing.T) *backend {
	b, err := startBackend()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.close)
	return b
}

// dialTest connects to an address until the test ends.
func dialTest(t *testing.T, address string) net.Conn {
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// What the client asks for is what the backend answers, however many streams
// there are.
func TestStreamsToTheBackend(t *testing.T) {
	t.Parallel()
	c, err := openH2(dialTest(t, startTestBackend(t).address()), h2Request(0, kib))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ up, down, n, atATime int }{
		{0, kib, 3, 1}, {0, kib, 1000, 100}, {kib, 0, 500, 100}, {0, 64 * kib, 40, 20}, {0, mib, 9, 4}, {0, 0, 10, 3},
	} {
		took, err := c.ask(h2Request(test.up, test.down), test.n, test.atATime)
		if err != nil || len(took) != test.n {
			t.Fatalf("%+v: %d answers, %v", test, len(took), err)
		}
	}
	if _, err := c.ask(h2Standing(), 100, 100); err != nil {
		t.Fatalf("answers that stand still: %v", err)
	}
	if _, err := c.ask(h2Request(0, 64*kib), 10, 10); err != nil {
		t.Fatalf("beside answers that stand still: %v", err)
	}
	if _, err := c.ask(h2Request(mib, 0), 1, 1); err != nil {
		t.Errorf("a body of many frames: %v", err)
	}
	if _, err := c.ask(h2Request(h2StreamWindow+1, 0), 1, 1); err == nil {
		t.Error("a body that is larger than the window was sent")
	}
}

// Other clients get the same answers of the backend, however small their
// windows are.
func TestBackendObeysWindows(t *testing.T) {
	t.Parallel()
	b := startTestBackend(t)
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols, HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: 64 * kib, MaxReceiveBufferPerStream: 20_000}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 20 * time.Second}
	var g errgroup.Group
	for i := range 20 {
		g.Go(func() error {
			size := []int{0, kib, 64 * kib, mib}[i%4]
			r, err := client.Get(fmt.Sprintf("http://%s/v19/items/%d", b.address(), size))
			if err != nil {
				return err
			}
			defer r.Body.Close()
			body, err := io.ReadAll(r.Body)
			if err != nil || r.ProtoMajor != 2 || len(body) != size {
				return fmt.Errorf("%s %s, %d bytes of %d, %w", r.Proto, r.Status, len(body), size, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// answers is what a server writes: its settings, then what frames add.
func answers(t *testing.T, frames func(f *http2.Framer, fields func(...string) http2.HeadersFrameParam) error) []byte {
	var all, block bytes.Buffer
	f := http2.NewFramer(&all, nil)
	encode := hpack.NewEncoder(&block)
	err := f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
	if err == nil {
		err = frames(f, func(list ...string) http2.HeadersFrameParam {
			block.Reset()
			for i := 0; i < len(list); i += 2 {
				_ = encode.WriteField(hpack.HeaderField{Name: list[i], Value: list[i+1]})
			}
			return http2.HeadersFrameParam{StreamID: 1, BlockFragment: bytes.Clone(block.Bytes()), EndHeaders: true}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return all.Bytes()
}

func TestClientReadsAnswersOfHTTP2(t *testing.T) {
	t.Parallel()
	type fields = func(...string) http2.HeadersFrameParam
	for _, test := range []struct {
		name, want string
		calls      bool
		frames     func(*http2.Framer, fields) error
	}{
		{"whole", "", false, func(f *http2.Framer, fields fields) error {
			return join(f.WriteHeaders(fields(":status", "200")), f.WriteData(1, false, make([]byte, 1000)), f.WritePing(false, [8]byte{}), f.WriteData(1, true, make([]byte, 24)))
		}},
		{"of a call", "", true, func(f *http2.Framer, fields fields) error {
			return join(f.WriteHeaders(fields(":status", "200")), f.WriteData(1, false, make([]byte, kib)), f.WriteHeaders(ends(fields("grpc-status", "0"))))
		}},
		{"of a call without trailers", "grpc-status", true, func(f *http2.Framer, fields fields) error {
			return join(f.WriteHeaders(fields(":status", "200")), f.WriteData(1, true, make([]byte, kib)))
		}},
		{"of a call that failed", `grpc-status "7"`, true, func(f *http2.Framer, fields fields) error {
			return f.WriteHeaders(ends(fields(":status", "200", "grpc-status", "7")))
		}},
		{"another status", `"403"`, false, func(f *http2.Framer, fields fields) error {
			return join(f.WriteHeaders(fields(":status", "403")), f.WriteData(1, true, make([]byte, kib)))
		}},
		{"too short", "1023 bytes", false, func(f *http2.Framer, fields fields) error {
			return join(f.WriteHeaders(fields(":status", "200")), f.WriteData(1, true, make([]byte, 1023)))
		}},
		{"cut short", "EOF", false, func(f *http2.Framer, fields fields) error { return f.WriteHeaders(fields(":status", "200")) }},
		{"reset", "REFUSED_STREAM", false, func(f *http2.Framer, _ fields) error { return f.WriteRSTStream(1, http2.ErrCodeRefusedStream) }},
		{"the end", "ENHANCE_YOUR_CALM", false, func(f *http2.Framer, _ fields) error {
			return f.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, []byte("no"))
		}},
		{"of another stream", "not open", false, func(f *http2.Framer, fields fields) error {
			p := fields(":status", "200")
			p.StreamID = 3
			return f.WriteHeaders(p)
		}},
	} {
		q := h2Request(0, kib)
		q.calls = test.calls
		_, err := openH2(&answering{Reader: bytes.NewReader(answers(t, test.frames))}, q)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// join returns the first error.
func join(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func ends(p http2.HeadersFrameParam) http2.HeadersFrameParam {
	p.EndStream = true
	return p
}

// A client that may have fewer streams than it wants says so.
func TestClientObeysStreamLimit(t *testing.T) {
	t.Parallel()
	c, err := openH2(&answering{Reader: bytes.NewReader(answers(t, func(f *http2.Framer, fields func(...string) http2.HeadersFrameParam) error {
		return join(f.WriteHeaders(fields(":status", "200")), f.WriteData(1, true, make([]byte, kib)))
	}))}, h2Request(0, kib))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ask(h2Request(0, kib), 2, 2); err == nil || !strings.Contains(err.Error(), "1 streams") {
		t.Errorf("two streams where one is allowed: %v", err)
	}
}

// Both clients of gRPC call the service: the benchmark's own, and grpc-go's,
// which also does with mTLS.
func TestCalls(t *testing.T) {
	t.Parallel()
	certs := t.TempDir()
	if _, _, err := makeCertificates(certs); err != nil {
		t.Fatal(err)
	}
	for name, folder := range map[string][]string{"plaintext": nil, "mTLS": {certs}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := startTestGRPC(t, folder)
			secure, err := grpcCredentials(roleClient, folder)
			if err != nil {
				t.Fatal(err)
			}
			var told bytes.Buffer
			if err := callGRPC(address, secure, strings.NewReader("1 1\n160 16\n"), &told); err != nil {
				t.Error(err)
			}
			if lines := strings.Count(told.String(), "\n"); lines != 2 {
				t.Errorf("told %q", told.String())
			}
			if folder != nil {
				return
			}
			c, err := openH2(dialTest(t, address), grpcQuestion())
			if err == nil {
				_, err = c.ask(grpcQuestion(), 200, 16)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// startTestGRPC starts a service until the test ends.
func startTestGRPC(t *testing.T, certs []string) (address string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	secure, err := grpcCredentials(roleService, certs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(startGRPC(l, secure))
	return l.Addr().String()
}

// How long requests took has a table of its own, in both forms of the report.
func TestReportTellsWaits(t *testing.T) {
	t.Parallel()
	r := &report{results: results{}, p99: results{}}
	for side, value := range map[string]float64{ours: 20, nginx: 40} {
		r.results.add(h2Rows[0], side, value)
		r.p99.add(h2Rows[0], side, 10*value)
	}
	r.results[rowH2Idle.id] = map[string]figures.Series{ours: {1}}
	for name, text := range map[string]string{"text": r.text(), "markdown": r.markdown()} {
		if !strings.Contains(text, "400 (0.50×)") || strings.Count(text, "h2-1x1") < 2 {
			t.Errorf("%s: %s", name, text)
		}
	}
}
