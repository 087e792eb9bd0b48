package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	// maxAnswer bounds what is read of the answer to a check.
	maxAnswer = 64 << 10
	// maxPath and maxHost bound what a check asks for.
	maxPath = 2048
	maxHost = 255
)

// checkPath returns why a path cannot be asked for, or nil.
func (h *Health) checkPath() error {
	switch {
	case h.Path == "" && h.Host == "":
		return nil
	case h.Path == "" && !h.GRPC:
		return errors.New("health: a host without a path or grpc")
	case h.Path != "" && h.Interval == 0:
		return errors.New("health: a path without an interval")
	case h.Path != "" && (h.Path[0] != '/' || len(h.Path) > maxPath || !visible(h.Path) || strings.Contains(h.Path, "#")):
		return fmt.Errorf("health: path %q: want at most %d visible ASCII characters from / on, without #", h.Path, maxPath)
	case len(h.Host) > maxHost || !visible(h.Host):
		return fmt.Errorf("health: host %q: want at most %d visible ASCII characters", h.Host, maxHost)
	}
	return nil
}

// visible reports whether a text has nothing but visible ASCII characters, so
// that it cannot end a line or a word of a request.
func visible(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}

// probe asks for the health path, or by gRPC, over a connection that stands. It ends with
// ctx, and leaves c to the caller, who closes it.
func (e *endpoint) probe(ctx context.Context, c net.Conn) error {
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	t := e.target
	if t.key.health.GRPC {
		return t.askGRPC(ctx, c)
	}
	if secure := t.set.Secure; secure != nil {
		over, err := secure(ctx, t.key.owner, t.key.address, c)
		if err != nil {
			return err
		}
		if over != c {
			defer func() { _ = over.Close() }()
		}
		c = over
	}
	if t.key.health.HTTP2 {
		return t.askPath(ctx, c)
	}
	return ask(c, t.key.health.Path, t.healthHost())
}

// healthHost is the host that a check is sent with.
func (t *target) healthHost() string {
	switch address := t.key.address; {
	case t.key.health.Host != "":
		return t.key.health.Host
	case strings.HasPrefix(address, unixPrefix):
		return "localhost"
	default:
		return strings.TrimSuffix(address, ":80") // as clients send it (RFC 9110, section 4.2.1)
	}
}

// ask sends a GET and returns why the answer is not good, or nil. What the far
// end sent is in no error but for the status.
func ask(c io.ReadWriter, path, host string) error {
	_, err := io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: "+host+"\r\nUser-Agent: narthex\r\nAccept: */*\r\nConnection: close\r\n\r\n")
	if err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	r := bufio.NewReader(io.LimitReader(c, maxAnswer))
	for {
		answer, err := http.ReadResponse(r, nil)
		if err != nil {
			return fmt.Errorf("GET %s: %w", path, unreadable(err))
		}
		if answer.StatusCode < 200 { // that is not it yet (RFC 9110, section 15.2)
			continue
		}
		// Read, so that the service sees no connection that was reset; what
		// comes of it changes nothing.
		_, _ = io.Copy(io.Discard, answer.Body)
		_ = answer.Body.Close()
		if answer.StatusCode >= 400 {
			return fmt.Errorf("GET %s: %w", path, statusError(answer.StatusCode))
		}
		return nil
	}
}

// unreadable says why there is no answer: in our words, unless the network
// failed.
func unreadable(err error) error {
	var network net.Error
	switch {
	case errors.As(err, &network):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the connection ended without a whole answer")
	}
	return fmt.Errorf("no answer of HTTP/1.1 in the first %d bytes", maxAnswer)
}
