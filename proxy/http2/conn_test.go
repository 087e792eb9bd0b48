package http2

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/http1"
)

// echo answers every request with its content.
type echo struct{ t *testing.T }

func (e echo) Settled() {}
func (e echo) Leaving() {}

func (e echo) Opened(s *Stream, p *http1.Parts, large bool) {
	s.Attend(&echoed{s: s})
	if err := s.Answer(http.StatusOK, []http1.Field{{Name: "x-path", Value: p.Path}}, p.Ended); err != nil {
		e.t.Log(err)
	}
	if p.Ended {
		s.Release(NoError)
	}
}

type echoed struct{ s *Stream }

func (e *echoed) Head(*http1.Parts, bool) {}

func (e *echoed) Data(b []byte, ended bool) int {
	n, err := e.s.Write(b, ended)
	if err != nil {
		return len(b)
	}
	return n
}
func (e *echoed) Trailers(f []http1.Field) { _ = e.s.Trailers(f) }
func (e *echoed) Room()                    { e.s.Held(e.Data) }
func (e *echoed) Ended(*Error)             {}

// run serves a connection until it ends.
func run(c *Conn, raw net.Conn) error {
	buf := make([]byte, 0, 256<<10)
	flush := func() error {
		for out := c.Take(); out != nil; out = c.Take() {
			if _, err := raw.Write(*out); err != nil {
				return err
			}
			c.Sent(out)
			c.Pump()
		}
		return nil
	}
	for {
		if err := flush(); err != nil {
			return err
		}
		n, err := raw.Read(buf[len(buf):cap(buf)])
		if err != nil {
			return err
		}
		buf = buf[:len(buf)+n]
		used, err := c.Receive(buf)
		if err != nil {
			return err
		}
		buf = buf[:copy(buf, buf[used:])]
	}
}

func TestAgainstGo(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		raw, err := l.Accept()
		if err == nil {
			err = run(NewServer(Settings{}, echo{t}), raw)
		}
		done <- err
	}()
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	client := &http.Client{Transport: transport}
	for _, size := range []int{0, 1, 100, 16384, 16385, 1 << 20, 10 << 20} {
		body := strings.Repeat("x", size)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+l.Addr().String()+"/some/path", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(size, err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(got) != body || resp.Header.Get("x-path") != "/some/path" {
			t.Fatalf("%d: got %d bytes, %v, %v", size, len(got), err, resp.Header)
		}
	}
	transport.CloseIdleConnections()
	<-done
}
