package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// maxAnswerHead bounds the heads of an answer in HTTP/2, interim ones included,
// in bytes.
const maxAnswerHead = 16 << 10

// errNotHTTP2 is about a far end that sent something else, or not all of it.
var errNotHTTP2 = errors.New("no whole answer of HTTP/2 without TLS: set upstream.protocol and health to what the service speaks")

// askHTTP2 sends a request for a path over a connection that stands, in HTTP/2
// with prior knowledge (RFC 9113, section 3.3), and has the answer read. It ends
// with ctx and with the connection's deadline. What the far end sent is in no
// error of its own, and c is closed.
func askHTTP2(ctx context.Context, c net.Conn, host, path string, r *http.Request, read func(*http.Response) error) error {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{
		DialContext:            func(context.Context, string, string) (net.Conn, error) { return c, nil },
		Protocols:              &protocols,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxAnswerHead,
		HTTP2:                  &http.HTTP2Config{MaxReceiveBufferPerConnection: maxAnswer, MaxReceiveBufferPerStream: maxAnswer},
	}
	client, err := transport.NewClientConn(ctx, "http", "endpoint:80") // where c leads
	if err != nil {
		return unanswered(ctx, err)
	}
	defer func() { _ = client.Close() }()
	// Opaque has the path go as it is written, as in HTTP/1.1.
	r.URL, r.Host = &url.URL{Scheme: "http", Host: host, Opaque: "//" + host + path}, host
	r.Header.Set("User-Agent", "narthex")
	answer, err := client.RoundTrip(r.WithContext(ctx))
	if err != nil {
		return unanswered(ctx, err)
	}
	defer func() { _ = answer.Body.Close() }()
	return read(answer)
}

// unanswered says why there is no answer of HTTP/2: in our words, unless it came
// too late. Who speaks something else may also just close or reset.
func unanswered(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case timedOut(err):
		return context.DeadlineExceeded // which ctx may be late to say
	}
	return errNotHTTP2
}

// askPath asks for the health path over HTTP/2. It returns why the answer is not
// good, or nil.
func (t *target) askPath(ctx context.Context, c net.Conn) error {
	path := t.key.health.Path
	r := &http.Request{Method: http.MethodGet, Header: http.Header{"Accept": {"*/*"}}}
	err := askHTTP2(ctx, c, t.healthHost(), path, r, func(answer *http.Response) error {
		_, _ = io.Copy(io.Discard, io.LimitReader(answer.Body, maxAnswer)) // as over HTTP/1.1
		if answer.StatusCode >= http.StatusBadRequest {
			return statusError(answer.StatusCode)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	return nil
}
