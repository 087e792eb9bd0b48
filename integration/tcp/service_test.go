//go:build integration

package tcp_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// service is what stands behind an inbound listener, or before an outbound
// one where it speaks TLS itself.
type service struct {
	address string
	dialled atomic.Int64 // connections it has been given
}

// serve answers each connection with handle, which need not close it.
func serve(t *testing.T, handle func(net.Conn)) *service {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, l, handle)
}

func serveOn(t *testing.T, l net.Listener, handle func(net.Conn)) *service {
	t.Helper()
	s := &service{address: l.Addr().String()}
	var g sync.WaitGroup
	var mu sync.Mutex
	live := map[net.Conn]bool{}
	g.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.dialled.Add(1)
			mu.Lock()
			live[c] = true
			mu.Unlock()
			g.Go(func() {
				defer c.Close()
				handle(c)
				mu.Lock()
				delete(live, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range live {
			_ = c.Close()
		}
		mu.Unlock()
		g.Wait()
	})
	return s
}

// answer is before every line that answerLines answers.
const answer = "answer: "

// answerLines answers each line with itself.
func answerLines(c net.Conn) {
	for lines := bufio.NewScanner(c); lines.Scan(); {
		if _, err := fmt.Fprintf(c, answer+"%s\n", lines.Text()); err != nil {
			return
		}
	}
}

// echo sends back what it gets, and finishes when the other side has.
func echo(c net.Conn) {
	_, _ = io.Copy(c, c)
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}

// callTime bounds one request and its answer.
const callTime = time.Minute

// ask sends one line on c and reads what answerLines answers.
func ask(c net.Conn, line string) error {
	if err := c.SetDeadline(time.Now().Add(callTime)); err != nil {
		return err
	}
	defer c.SetDeadline(time.Time{})
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return err
	}
	got, err := readLine(c)
	if err == nil && got != answer+line {
		err = fmt.Errorf("answer %q, want %q", got, answer+line)
	}
	return err
}

// readLine reads one line and not a byte more.
func readLine(c net.Conn) (string, error) {
	var line strings.Builder
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(c, b); err != nil {
			return line.String(), err
		}
		if b[0] == '\n' {
			return line.String(), nil
		}
		line.WriteByte(b[0])
	}
}

// dial connects to address, which has to work.
func dial(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, callTime)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*net.TCPConn)
}

// say sends one line on a connection of its own and returns what is answered.
func say(address, line string) (string, error) {
	c, err := net.DialTimeout("tcp", address, callTime)
	if err != nil {
		return "", err // of a refused caller too: the reset may come that early
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(callTime)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return "", err
	}
	return readLine(c)
}

// call makes one request on a connection of its own.
func call(address string) error {
	c, err := net.DialTimeout("tcp", address, callTime)
	if err != nil {
		return err
	}
	defer c.Close()
	return ask(c, "hello")
}
