//go:build integration

package http_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// callTime bounds one request and its answer.
const callTime = time.Minute

// pattern is what services give out: as many bytes as are asked for.
func pattern(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i % period)
	}
	return b
}

// endless reads a pattern of any size without holding it.
type endless struct{ at int64 }

func (e *endless) Read(b []byte) (int, error) {
	for n := 0; n < len(b); {
		k := copy(b[n:], turns[e.at%period:])
		n, e.at = n+k, e.at+int64(k)
	}
	return len(b), nil
}

// turns is a pattern that begins anew after each period.
var turns = pattern(period * 256)

const period = 251

// service is one in Go.
type service struct {
	address string
	open    chan struct{} // closed: /stall reads and /flood has somebody who reads
	began   atomic.Int64  // requests
	moved   atomic.Int64  // bytes that /stall has read or /flood has written
	told    sync.Map      // by path: the http.Header that came last

	mu    sync.Mutex // guards the following
	store map[string][]byte
}

// newService starts one.
func newService(t *testing.T) *service {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{address: l.Addr().String(), open: make(chan struct{}), store: map[string][]byte{}}
	server := &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Minute}
	var g sync.WaitGroup
	g.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		_ = server.Close()
		g.Wait()
	})
	return s
}

// ServeHTTP implements http.Handler.
func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.began.Add(1)
	s.told.Store(r.URL.Path, r.Header.Clone())
	_, rest, _ := strings.Cut(r.URL.Path, "/")
	kind, name, _ := strings.Cut(rest, "/")
	size, _ := strconv.ParseInt(name, 10, 64)
	switch kind {
	case "bytes":
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, io.NewSectionReader(patternAt{}, 0, size))
	case "store":
		s.keep(w, r)
	case "echo":
		echo(w, r)
	case "hints":
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		_, _ = io.WriteString(w, "ok\n")
	case "sum":
		sum := sha256.New()
		_, _ = io.Copy(sum, r.Body)
		_, _ = io.WriteString(w, hexOf(sum))
	case "stall":
		s.stall(w, r)
	case "flood":
		w.Header().Set("Content-Length", name)
		_, _ = io.Copy(counting{w, &s.moved}, io.LimitReader(&endless{}, size))
	default:
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "ok\n")
	}
}

// patternAt is a pattern of any size.
type patternAt struct{}

func (patternAt) ReadAt(b []byte, at int64) (int, error) { return (&endless{at}).Read(b) }

func (s *service) keep(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Method == http.MethodPut {
		s.store[r.URL.Path] = body
		w.WriteHeader(http.StatusCreated)
		return
	}
	body, ok := s.store[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
}

// echo answers what it reads, as it comes, and says in trailers what it was.
func echo(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).EnableFullDuplex()
	w.Header().Set("Trailer", "X-Sum, X-Got")
	w.WriteHeader(http.StatusOK)
	sum := sha256.New()
	_, _ = io.Copy(io.MultiWriter(w, sum), r.Body)
	w.Header().Set("X-Sum", hexOf(sum))
	w.Header().Set("X-Got", r.Trailer.Get("X-Sent"))
}

// stall reads nothing before it is let, and says what the body was.
func (s *service) stall(w http.ResponseWriter, r *http.Request) {
	select {
	case <-s.open:
	case <-r.Context().Done():
		return
	}
	sum := sha256.New()
	_, _ = io.Copy(counting{sum, &s.moved}, r.Body)
	_, _ = io.WriteString(w, hexOf(sum))
}

func hexOf(sum hash.Hash) string { return hex.EncodeToString(sum.Sum(nil)) }

// sumOf is the sum of a pattern of that size.
func sumOf(size int64) string {
	sum := sha256.New()
	_, _ = io.Copy(sum, io.LimitReader(&endless{}, size))
	return hexOf(sum)
}

// counting counts what is written.
type counting struct {
	io.Writer
	n *atomic.Int64
}

func (c counting) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// header returns what came with the last request for a path.
func (s *service) header(t *testing.T, path string) http.Header {
	t.Helper()
	got, ok := s.told.Load(path)
	if !ok {
		t.Fatalf("the service was not asked for %s", path)
	}
	return got.(http.Header)
}

// clientOf returns a client of HTTP/1.1 that keeps its connections. It proves
// who it is where own is given.
func clientOf(t *testing.T, own *svid) *http.Client {
	t.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 100, DisableCompression: true}
	if own != nil {
		transport.TLSClientConfig = own.client()
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 5 * time.Minute}
}

// answer is a response that was read to its end.
type answer struct {
	status int
	header http.Header
	length int64 // that it says it has
	last   bool  // the connection closes behind it
	body   string
}

// fetch makes a request and reads all of its answer.
func fetch(client *http.Client, method, url string, body io.Reader, fields ...string) (answer, error) {
	req, err := http.NewRequest(method, url, body)
	if err != nil {
		return answer{}, err
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		req.Header.Add(name, value)
	}
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, resp.ContentLength, resp.Close, string(data)}, err
}

// fetchOK wants 200 and returns the body.
func fetchOK(client *http.Client, url string) (body string, err error) {
	a, err := fetch(client, http.MethodGet, url, nil)
	if err == nil && a.status != http.StatusOK {
		err = fmt.Errorf("%s: %d %.200q", url, a.status, a.body)
	}
	return a.body, err
}
