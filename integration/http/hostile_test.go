//go:build integration

package http_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// smuggled is an answer that no client may get: none asked for it.
const smuggled = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled"

// hostileAnswers are what a service says to one request, as it stands, by
// the path of that. The connection ends behind each.
var hostileAnswers = []struct {
	name, raw string
	method    string // GET where empty
	asks      string // further field lines of the request
	status    int    // that the client gets
	body      string
	cut       bool // the client learns that the body is not whole
}{
	{name: "a good one", raw: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", status: 200, body: "ok"},
	{name: "another one behind it", raw: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + smuggled, status: 200, body: "ok"},
	{name: "another one behind that to HEAD", method: "HEAD", raw: "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n" + smuggled, status: 200},
	{name: "another one behind 204", raw: "HTTP/1.1 204 No Content\r\n\r\n" + smuggled, status: 204},
	{name: "204 with a body", raw: "HTTP/1.1 204 No Content\r\nContent-Length: 8\r\n\r\nsmuggled", status: 502},
	{name: "304 with a body", raw: "HTTP/1.1 304 Not Modified\r\nContent-Length: 8\r\n\r\n" + smuggled, status: 304},
	{name: "100 with a length", raw: "HTTP/1.1 100 Continue\r\nContent-Length: 8\r\n\r\nsmuggled", status: 502},
	{name: "Content-Length beside Transfer-Encoding", raw: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, status: 502},
	{name: "two Content-Lengths", raw: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 100\r\n\r\nok" + smuggled, status: 502},
	{name: "Content-Length with a sign", raw: "HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok", status: 502},
	{name: "Transfer-Encoding of another kind", raw: "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", status: 502},
	{name: "Transfer-Encoding in HTTP/1.0", raw: "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", status: 502},
	{name: "a folded field", raw: "HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 2\r\n\r\nok", status: 502},
	{name: "a bare line feed", raw: "HTTP/1.1 200 OK\nContent-Length: 2\n\nok", status: 502},
	{name: "a CR in a value", raw: "HTTP/1.1 200 OK\r\nX: y\rSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\nok", status: 502},
	{name: "a NUL in a value", raw: "HTTP/1.1 200 OK\r\nX: y\x00\r\nContent-Length: 2\r\n\r\nok", status: 502},
	{name: "a CR in the phrase", raw: "HTTP/1.1 200 O\rK\r\nContent-Length: 2\r\n\r\nok", status: 502},
	{name: "a status of four digits", raw: "HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok", status: 502},
	{name: "status 99", raw: "HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\nok", status: 502},
	{name: "HTTP/2.0", raw: "HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok", status: 502},
	{name: "another protocol", raw: "220 mail.example ESMTP\r\n", status: 502},
	{name: "nothing", raw: "", status: 502},
	{name: "half of a head", raw: "HTTP/1.1 200 OK\r\nContent-Le", status: 502},
	{name: "a head of 100,000 bytes", raw: "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: "+strings.Repeat("y", 995)+"\r\n", 100) + "\r\n", status: 502},
	{name: "101 that nobody asked for", raw: "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" + smuggled, status: 502},
	{name: "101 of another protocol", asks: "Connection: upgrade\r\nUpgrade: websocket\r\n", raw: "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" + smuggled, status: 502},
	{name: "103, then a good one", raw: "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", status: 200, body: "ok"},
	{name: "half of a counted body", raw: "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nok", status: 200, body: "ok", cut: true},
	{name: "half of a chunked body", raw: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", status: 200, body: "ok", cut: true},
	{name: "a chunk with an extension", raw: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n2;a\r\nok\r\n0\r\n\r\n", status: 200, body: "ok", cut: true},
	{name: "a chunk without a size", raw: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\nx\r\nok\r\n0\r\n\r\n", status: 200, body: "ok", cut: true},
	{name: "a body until the end", raw: "HTTP/1.1 200 OK\r\n\r\nok", status: 200, body: "ok"},
	{name: "HTTP/1.0 with a body until the end", raw: "HTTP/1.0 200 OK\r\n\r\nok", status: 200, body: "ok"},
}

// TestHostileServices: whatever a service answers, the client gets an answer to
// what it asked, can tell when that is not whole, and gets nothing else; nor
// does the next client.
func TestHostileServices(t *testing.T) {
	t.Parallel()
	answers := stage.Serve(t, func(c net.Conn) {
		req, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		var n int
		if _, err := fmt.Sscanf(req.URL.Path, "/answer/%d", &n); err != nil {
			n = 0
		}
		_, _ = io.WriteString(c, hostileAnswers[n].raw)
		// What the proxy does not read any more must not take away what it does.
		_ = c.(*net.TCPConn).CloseWrite()
		_ = c.SetReadDeadline(time.Now().Add(mesh.CallTime))
		_, _ = io.Copy(io.Discard, c)
	})
	p := mesh.NewPair(t, answers)
	for n, a := range hostileAnswers {
		before := len(p.In.Records())
		c := dialTLS(t, p.Secure, p.Client)
		method := http.MethodGet
		if a.method != "" {
			method = a.method
		}
		fmt.Fprintf(c, "%s /answer/%d HTTP/1.1\r\nHost: a.example\r\n%s\r\nGET /answer/0 HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n", method, n, a.asks)
		all, _ := io.ReadAll(c)
		if strings.Contains(string(all), "smuggled") {
			t.Errorf("%s: the client gets %q", a.name, all)
		}
		in := bufio.NewReader(strings.NewReader(string(all)))
		status, body, err := finalResponse(in, method)
		if status != a.status || a.status == http.StatusOK && (!a.cut && body != a.body || !strings.HasPrefix(a.body, body)) || (err != nil) != a.cut {
			t.Errorf("%s: the client gets %q: %d %q, %v", a.name, all, status, body, err)
		}
		if next, _, _ := finalResponse(in, http.MethodGet); next != 0 && (a.cut || next != http.StatusOK) {
			t.Errorf("%s: behind it there is another answer: %d", a.name, next)
		}
		if a.status == http.StatusBadGateway || a.cut {
			p.In.Record(before, a.name, func(r telemetry.Access) bool {
				return r.HTTP != nil && r.HTTP.Path == fmt.Sprint("/answer/", n) && r.Outcome == "failure" && r.Reason != ""
			})
		}
	}
	client := clientOf(t, nil)
	for range 20 {
		if body, err := mesh.FetchOK(client, "http://"+p.Entry+"/answer/0"); err != nil || string(body) != "ok" {
			t.Errorf("a client after all that: %q, %v", body, err)
		}
	}
	stage.Eventually(t, stage.Soon, "nothing is left", func() error {
		client.CloseIdleConnections()
		if live := p.In.Live() + p.Out.Live(); live > 1 { // the outbound proxy may keep one
			return fmt.Errorf("%d are", live)
		}
		return nil
	})
}

// finalResponse reads a response with its body, and passes over those that
// come before it. The status is 0 where there is none.
func finalResponse(in *bufio.Reader, method string) (status int, body string, err error) {
	for {
		resp, err := http.ReadResponse(in, &http.Request{Method: method})
		if err != nil {
			return 0, "", err
		}
		data, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode >= 200 {
			return resp.StatusCode, string(data), err
		}
	}
}
