package http1

import "testing"

const (
	typicalRequest = "POST /v1/orders/4711?expand=items HTTP/1.1\r\nHost: orders.prod.svc.cluster.local:8443\r\n" +
		"User-Agent: Go-http-client/1.1\r\nAccept: application/json\r\nAccept-Encoding: gzip\r\nContent-Type: application/json\r\n" +
		"Authorization: Bearer eyJhbGciOiJFUzI1NiIsImtpZCI6IjEifQ.e30.c2lnbmF0dXJl\r\nTraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n" +
		"X-Request-Id: 0af76519-16cd-43dd-8448-eb211c80319c\r\nConnection: keep-alive\r\nContent-Length: 11\r\n\r\n{\"items\":1}"
	typicalResponse = "HTTP/1.1 200 OK\r\nServer: orders\r\nDate: Thu, 26 Nov 2026 10:00:00 GMT\r\nContent-Type: application/json\r\n" +
		"Cache-Control: no-store\r\nX-Request-Id: 0af76519-16cd-43dd-8448-eb211c80319c\r\nVary: Accept\r\nTransfer-Encoding: chunked\r\n" +
		"Strict-Transport-Security: max-age=63072000\r\nX-Content-Type-Options: nosniff\r\n\r\nb\r\n{\"items\":1}\r\n0\r\n\r\n"
)

// exchange is what a proxy does for one request and its response.
type exchange struct {
	in, out  []byte
	request  Request
	response Response
	body     Body
	edit     Edit
}

func newExchange() *exchange {
	return &exchange{
		in: make([]byte, 0, 8<<10), out: make([]byte, 0, 8<<10),
		edit: Edit{Drop: identity, Append: []Field{{Name: "x-spiffe-id", Value: "spiffe://example.org/web"}}},
	}
}

func (x *exchange) requests(t testing.TB) {
	x.in = append(x.in[:0], typicalRequest...)
	n, err := x.request.Parse(x.in)
	if err != nil || n == 0 {
		t.Fatal(n, err)
	}
	x.out = x.request.Append(x.out[:0], &x.edit)
	x.passBody(t, n, x.request.Body, x.request.Length)
}

func (x *exchange) responds(t testing.TB) {
	x.in = append(x.in[:0], typicalResponse...)
	n, err := x.response.Parse(x.in, Asked{Method: "POST"})
	if err != nil || n == 0 {
		t.Fatal(n, err)
	}
	x.out = x.response.Append(x.out[:0], &x.edit)
	x.passBody(t, n, x.response.Body, x.response.Length)
}

func (x *exchange) passBody(t testing.TB, at int, framing Framing, length int64) {
	x.body.Start(framing, length, identity)
	n, done, err := x.body.Next(x.in[at:])
	if err != nil || !done {
		t.Fatal(n, done, err)
	}
	x.out = append(x.out, x.in[at:at+n]...)
}

func TestNoAllocations(t *testing.T) {
	x := newExchange()
	if n := testing.AllocsPerRun(100, func() { x.requests(t); x.responds(t) }); n != 0 {
		t.Errorf("%v allocations for a request and its response", n)
	}
}

func BenchmarkRequest(b *testing.B) {
	x := newExchange()
	b.SetBytes(int64(len(typicalRequest)))
	b.ReportAllocs()
	for b.Loop() {
		x.requests(b)
	}
}

func BenchmarkResponse(b *testing.B) {
	x := newExchange()
	b.SetBytes(int64(len(typicalResponse)))
	b.ReportAllocs()
	for b.Loop() {
		x.responds(b)
	}
}
