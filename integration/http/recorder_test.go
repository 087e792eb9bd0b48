//go:build integration

package http_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// recorder is a service that keeps what it is sent, byte by byte, and answers
// what net/http reads in it.
type recorder struct {
	address string

	mu    sync.Mutex // guards the following
	conns []*recorded
	came  int // requests
}

// recorded is what came on one connection.
type recorded struct {
	raw      []byte
	requests []*request
	bad      string // why net/http does not read what followed them
}

// request is one that net/http has read.
type request struct {
	number                      int // in the order in which they came
	method, target, host, proto string
	body                        string
	whole                       bool // its body has ended
	header, trailer             http.Header
	length                      int64
}

func newRecorder(t *testing.T) *recorder {
	t.Helper()
	r := &recorder{}
	r.address = stage.Serve(t, r.answer)
	return r
}

// answer serves one connection.
func (r *recorder) answer(c net.Conn) {
	kept := &recorded{}
	r.mu.Lock()
	r.conns = append(r.conns, kept)
	r.mu.Unlock()
	in := bufio.NewReader(io.TeeReader(c, writer(func(b []byte) {
		r.mu.Lock()
		defer r.mu.Unlock()
		kept.raw = append(kept.raw, b...)
	})))
	for {
		if _, err := in.Peek(1); err != nil {
			return
		}
		got, err := http.ReadRequest(in)
		if err != nil {
			r.mu.Lock()
			kept.bad = err.Error()
			r.mu.Unlock()
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			return
		}
		if strings.EqualFold(got.Header.Get("Expect"), "100-continue") && got.ProtoAtLeast(1, 1) {
			_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
		}
		this := &request{method: got.Method, target: got.RequestURI, host: got.Host, proto: got.Proto, header: got.Header, length: got.ContentLength}
		r.mu.Lock()
		r.came++
		this.number = r.came
		kept.requests = append(kept.requests, this)
		r.mu.Unlock()
		body, err := io.ReadAll(got.Body)
		r.mu.Lock()
		this.body, this.trailer, this.whole = string(body), got.Trailer, err == nil
		r.mu.Unlock()
		if err != nil {
			return
		}
		const text = "ok\n"
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", len(text))
		if got.Method != http.MethodHead {
			_, _ = io.WriteString(c, text)
		}
		if got.Close {
			return
		}
	}
}

// all returns what has come so far. It is not changed any more.
func (r *recorder) all() []recorded {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []recorded
	for _, c := range r.conns {
		kept := recorded{raw: slices.Clone(c.raw), bad: c.bad}
		for _, q := range c.requests {
			copied := *q
			kept.requests = append(kept.requests, &copied)
		}
		all = append(all, kept)
	}
	return all
}

// writer is a function as an io.Writer.
type writer func([]byte)

func (w writer) Write(b []byte) (int, error) {
	w(b)
	return len(b), nil
}
