package http1_test

import (
	"fmt"

	"github.com/narthex-id/narthex/proxy/http1"
)

// A request is read, told who the client is, and written for the service.
func Example() {
	identity, err := http1.NewNames("x-spiffe-id")
	if err != nil {
		panic(err)
	}
	buf := []byte("POST /a HTTP/1.1\r\nHost: Example.ORG\r\nX_Spiffe_ID: forged\r\nTransfer-Encoding: chunked\r\n\r\n" +
		"3\r\nabc\r\n0\r\n\r\nGET /next")
	var r http1.Request
	head, err := r.Parse(buf)
	if err != nil {
		panic(err)
	}
	out := r.Append(nil, &http1.Edit{Drop: identity, Append: []http1.Field{{Name: "x-spiffe-id", Value: "spiffe://example.org/web"}}})
	var body http1.Body
	body.Start(r.Body, r.Length, identity)
	n, done, err := body.Next(buf[head:])
	out = append(out, buf[head:head+n]...)
	fmt.Printf("%q\n%t %v, then %q\n", out, done, err, buf[head+n:])
	// Output:
	// "POST /a HTTP/1.1\r\nhost: example.org\r\ntransfer-encoding: chunked\r\nx-spiffe-id: spiffe://example.org/web\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
	// true <nil>, then "GET /next"
}
