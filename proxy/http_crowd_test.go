package proxy

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestLongUpload: a service has its time to answer from the end of the request.
func TestLongUpload(t *testing.T) {
	p, ca := web(t, origin(t, echoes), func(c *Config) { c.Listeners[0].Timeouts.Response = 3 * time.Second })
	b := p.browser(ca)
	b.send("POST /v1/a HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n")
	go func() {
		for range 20 { // in all for longer than that
			time.Sleep(200 * time.Millisecond)
			if _, err := io.WriteString(b, "x"); err != nil {
				return
			}
		}
	}()
	if resp, _ := b.response("POST"); resp.StatusCode != 200 {
		t.Errorf("an upload that goes on: %d; %s", resp.StatusCode, p.next().Reason)
	}
}

// TestInterruptMeantForAnother: a client whose bytes come just when their time
// is over has its next read interrupted for the one before. That ends neither
// its request nor is it the service's fault.
func TestInterruptMeantForAnother(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		half := make(chan struct{})
		p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
			begun := make([]byte, 5)
			_, _ = io.ReadFull(r.Body, begun)
			close(half)
			rest, _ := io.ReadAll(r.Body)
			_, _ = w.Write(append(begun, rest...))
		}), speaking(protocol))
		b := p.browser(ca)
		b.send("POST /v1/a HTTP/1.1\r\nHost: ")
		p.until("the head has begun", func() bool { return len(p.clients(busy)) > 0 })
		p.interrupt()
		b.send("x\r\nContent-Length: 10\r\n\r\nhello")
		<-half
		p.interrupt()
		b.send("world")
		if resp, body := b.response("POST"); resp.StatusCode != 200 || body != "helloworld" {
			t.Errorf("%d %q; %s", resp.StatusCode, body, p.next().Reason)
		}
	})
}

// interrupt ends what clients are waited for, as if their time were over.
func (p *running) interrupt() {
	for _, s := range p.clients(busy) {
		s.c.mu.Lock()
		s.src.interrupt()
		s.c.mu.Unlock()
	}
}

// clients are the sleepers of clients that are in a state.
func (p *running) clients(state int32) (all []*sleeper) {
	for _, c := range p.table.of(nil) {
		c.mu.Lock()
		if s := c.streams[0]; s != nil && s.state.Load() == state {
			all = append(all, s)
		}
		c.mu.Unlock()
	}
	return all
}

// TestHostileCrowd: among hostile clients and services nobody gets what is another's, and nothing is left over.
func TestHostileCrowd(t *testing.T) {
	svc := func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			word := req.URL.Path + req.Header.Get("X-Mark")
			switch rand.IntN(14) {
			case 0:
				return
			case 1: // early answer
				_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nX-Mark: %s\r\nContent-Length: %d\r\n\r\n%s", word, len(word), word)
				if rand.IntN(2) == 0 {
					return
				}
				continue
			case 2:
				_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nx-mark: "+word+"\r\n\r\n")
			case 3:
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Le")
				return
			case 4:
				_, _ = io.CopyN(io.Discard, req.Body, 10)
				return
			case 5:
				time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
			}
			body, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			switch rand.IntN(5) {
			case 0: // in chunks, in pieces
				_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nX-Mark: %s\r\nTransfer-Encoding: chunked\r\n\r\n", word)
				out := word + string(body)
				for len(out) > 0 {
					n := min(len(out), 1+rand.IntN(9000))
					_, _ = fmt.Fprintf(c, "%x\r\n%s\r\n", n, out[:n])
					out = out[n:]
				}
				_, _ = io.WriteString(c, "0\r\nx-t: "+word+"\r\n\r\n")
			case 1:
				_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nX-Mark: %s\r\n\r\n%s%s", word, word, body)
				return
			case 2:
				_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nX-Mark: %s\r\nContent-Length: %d\r\n\r\n%s", word, len(word)+len(body)+5, word)
				return // cut
			default:
				_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nX-Mark: %s\r\nContent-Length: %d\r\n\r\n%s%s", word, len(word)+len(body), word, body)
			}
		}
	}
	a1, a2 := serve(t, svc), serve(t, svc)
	p, ca := web(t, a1, func(c *Config) {
		c.Listeners[0].Targets = []string{a1, a2}
		c.Listeners[0].Timeouts.Response = 2 * time.Second
		c.Listeners[0].Mode = ModePermissive
		c.Listeners[0].Upstream.MaxRequests = 30
		c.Policy = rulesOf(t, webReads+"  - {id: plain, effect: allow, from: [unauthenticated], http: {methods: [GET, PUT, POST], paths: [\"/v1/**\"]}}\n")
	})
	enough := make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			select {
			case <-p.records:
			case <-enough:
				return
			}
		}
	})
	defer reading.Wait()
	defer close(enough)
	var good, bad atomic.Int64
	var wg sync.WaitGroup
	end := time.Now().Add(6 * time.Second)
	for w := range 24 {
		wg.Go(func() {
			for n := 0; time.Now().Before(end); n++ {
				var c net.Conn
				if w%2 == 0 {
					c = dialPlain(t, p.addr("web"))
				} else {
					c = dialTLS(t, p.addr("web"), clientConfig(ca.SVID("/web")))
				}
				r := bufio.NewReader(c)
				for k := range 1 + rand.IntN(6) {
					mark := fmt.Sprintf("w%dn%dk%d-", w, n, k)
					mark += strings.Repeat(mark, rand.IntN(40))
					size := rand.IntN(3) * rand.IntN(90000)
					body := strings.Repeat(strconv.Itoa(w%10), size)
					method := []string{"GET", "PUT", "POST"}[rand.IntN(3)]
					var text string
					switch rand.IntN(3) {
					case 0:
						body = ""
						text = fmt.Sprintf("%s /v1/p HTTP/1.1\r\nHost: x\r\nX-Mark: %s\r\n\r\n", method, mark)
					case 1:
						text = fmt.Sprintf("%s /v1/p HTTP/1.1\r\nHost: x\r\nX-Mark: %s\r\nContent-Length: %d\r\n\r\n%s", method, mark, len(body), body)
					case 2:
						text = fmt.Sprintf("%s /v1/p HTTP/1.1\r\nHost: x\r\nX-Mark: %s\r\nTransfer-Encoding: chunked\r\n\r\n", method, mark)
						for rest := body; len(rest) > 0; {
							m := min(len(rest), 1+rand.IntN(20000))
							text += fmt.Sprintf("%x\r\n%s\r\n", m, rest[:m])
							rest = rest[m:]
						}
						text += "0\r\n\r\n"
					}
					if rand.IntN(12) == 0 { // leaves in the midst
						_, _ = io.WriteString(c, text[:rand.IntN(len(text))])
						break
					}
					go func() {
						for text != "" {
							m := min(len(text), 1+rand.IntN(30000))
							if _, err := io.WriteString(c, text[:m]); err != nil {
								return
							}
							text = text[m:]
							if rand.IntN(10) == 0 {
								time.Sleep(time.Millisecond)
							}
						}
					}()
					if rand.IntN(15) == 0 {
						break
					}
					var resp *http.Response
					var err error
					for {
						if resp, err = http.ReadResponse(r, &http.Request{Method: method}); err != nil || resp.StatusCode != 103 && resp.StatusCode != 100 { //nolint:bodyclose // its connection is closed
							break
						}
						if m := resp.Header.Get("X-Mark"); m != "" && m != "/v1/p"+mark {
							t.Errorf("103: %.60q for %.60q", m, mark)
						}
					}
					if err != nil {
						bad.Add(1)
						break
					}
					if m := resp.Header.Get("X-Mark"); resp.StatusCode == 200 && m != "/v1/p"+mark {
						t.Errorf("mark %.60q for %.60q", m, mark)
					}
					all, err := io.ReadAll(resp.Body)
					if resp.StatusCode == 200 {
						want := "/v1/p" + mark + body
						if !strings.HasPrefix(want, string(all)) {
							t.Errorf("%d bytes that are not ours: %.80q, want %.80q", len(all), all, want)
						}
					}
					if err != nil || resp.Close {
						bad.Add(1)
						break
					}
					good.Add(1)
				}
				_ = c.Close()
			}
		})
	}
	for n := 0; time.Now().Before(end); n++ {
		time.Sleep(150 * time.Millisecond)
		c := p.config
		c.Listeners[0].Timeouts.Stall = time.Duration(30+n%3) * time.Second
		if n%4 == 0 {
			c.Listeners[0].Targets = []string{a1, a2}
		} else {
			c.Listeners[0].Targets = []string{a2, a1}
		}
		c.Policy = rulesOf(t, webReads+fmt.Sprintf("  - {id: plain%d, effect: allow, from: [unauthenticated], http: {methods: [GET, PUT, POST], paths: [\"/v1/**\"]}}\n", n%3))
		if _, err := p.Apply(c); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	p.until("no loan is out", func() bool { return p.active() == 0 })
	t.Logf("%d good, %d bad; %d loans out, %d live", good.Load(), bad.Load(), p.active(), len(p.table.of(nil)))
	if p.active() != 0 {
		t.Errorf("%d loans are out", p.active())
	}
}
