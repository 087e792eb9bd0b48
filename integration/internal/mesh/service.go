package mesh

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

	"github.com/narthex-id/narthex/integration/internal/pattern"
)

// CallTime bounds one request and its answer.
const CallTime = time.Minute

// FieldSize is of the fields that /fields has many of: a larger one nobody
// needs to take.
const FieldSize = 6 << 10

// Service is one in Go, of HTTP/1.1 and of HTTP/2 with prior knowledge.
type Service struct {
	Address string
	Open    chan struct{} // closed: /stall reads and /flood has somebody who reads
	Began   atomic.Int64  // requests
	Busy    atomic.Int64  // requests that are not answered yet
	Moved   atomic.Int64  // bytes that /stall has read or /flood has written
	told    sync.Map      // by path: the http.Header that came last

	mu    sync.Mutex // guards the following
	store map[string][]byte
}

// NewService starts one.
func NewService(t *testing.T) *Service {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Service{Address: l.Addr().String(), Open: make(chan struct{}), store: map[string][]byte{}}
	server := &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Minute, Protocols: &http.Protocols{}}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	var g sync.WaitGroup
	g.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		_ = server.Close()
		g.Wait()
	})
	return s
}

// ServeHTTP implements http.Handler.
func (s *Service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.Began.Add(1)
	s.Busy.Add(1)
	defer s.Busy.Add(-1)
	s.told.Store(r.URL.Path, r.Header.Clone())
	_, rest, _ := strings.Cut(r.URL.Path, "/")
	kind, name, _ := strings.Cut(rest, "/")
	size, _ := strconv.ParseInt(name, 10, 64)
	switch kind {
	case "bytes":
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Etag", `"pattern"`)
		http.ServeContent(w, r, "", time.Time{}, io.NewSectionReader(pattern.At{}, 0, size))
	case "store":
		s.keep(w, r)
	case "echo":
		echo(w, r)
	case "hints":
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		_, _ = io.WriteString(w, "ok\n")
	case "fields": // of so many bytes together
		for i := 0; size > 0; i++ {
			n := min(size, FieldSize)
			w.Header().Set(fmt.Sprintf("X-Large-%d", i), strings.Repeat("y", int(n)))
			size -= n
		}
		_, _ = io.WriteString(w, "ok\n")
	case "sum":
		sum := sha256.New()
		_, _ = io.Copy(sum, r.Body)
		_, _ = io.WriteString(w, hexOf(sum))
	case "stall":
		s.stall(w, r)
	case "flood":
		w.Header().Set("Content-Length", name)
		_, _ = io.Copy(Counting{w, &s.Moved}, pattern.Of(size))
	default:
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "ok\n")
	}
}

func (s *Service) keep(w http.ResponseWriter, r *http.Request) {
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
func (s *Service) stall(w http.ResponseWriter, r *http.Request) {
	select {
	case <-s.Open:
	case <-r.Context().Done():
		return
	}
	sum := sha256.New()
	_, _ = io.Copy(Counting{sum, &s.Moved}, r.Body)
	_, _ = io.WriteString(w, hexOf(sum))
}

func hexOf(sum hash.Hash) string { return hex.EncodeToString(sum.Sum(nil)) }

// Counting counts what is written.
type Counting struct {
	io.Writer
	N *atomic.Int64 // grows by what is written
}

// Write implements io.Writer.
func (c Counting) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.N.Add(int64(n))
	return n, err
}

// Header returns what came with the last request for a path.
func (s *Service) Header(t *testing.T, path string) http.Header {
	t.Helper()
	got, ok := s.told.Load(path)
	if !ok {
		t.Fatalf("the service was not asked for %s", path)
	}
	return got.(http.Header)
}
