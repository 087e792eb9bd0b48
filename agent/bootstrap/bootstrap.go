// Package bootstrap gets the bundle with which an agent knows its SPIRE Server
// before it has one from the server itself: from a file, by HTTPS, or by HTTP
// over a Unix socket.
//
//	s, err := bootstrap.New(bootstrap.Config{TrustDomain: td, Server: "spire:8081", File: "/run/spire/bundle.crt"})
//	roots, err := s.Bundle(ctx, bootstrap.Attempt{Number: 1, Since: started})
//	go s.Follow(ctx, changed) // a file that is replaced
//
// Nothing is kept: each attempt reads anew. It leaves to agent when there is
// an attempt, and to agent/spire what the bundle is good for.
package bootstrap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/watch"
)

const (
	// MaxSize bounds a bundle, in bytes: some hundred certificates.
	MaxSize = 1 << 20
	// timeout bounds a download, from the first packet to the last byte.
	timeout = 10 * time.Second
	// maxRedirects bounds how often a server may send us elsewhere.
	maxRedirects = 3
	// maxHeader bounds the header of an answer, in bytes.
	maxHeader = 64 << 10
)

// Formats of a bundle.
const (
	PEM    = "pem"    // certificates one after another, as `spire-server bundle show` prints them
	SPIFFE = "spiffe" // a JWK set: SPIFFE Trust Domain and Bundle §4
)

// socketURL is what is asked for over a Unix socket where no URL is given.
const socketURL = "http://localhost/"

// Config says where the bundle is. Exactly one of File, URL and Socket is
// set, or URL with Socket.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Server      string // host:port; told to who answers at Socket
	File        string
	URL         string // https; with Socket: http
	Socket      string // path of a Unix socket on which HTTP is spoken
	Format      string // PEM (default) or SPIFFE
	Log         hclog.Logger
}

// Attempt tells who answers at Config.Socket what the bundle is for. The
// names it is told by are those spire-agent uses.
type Attempt struct {
	Again  bool      // the agent had a bundle, and it is not the server's any more
	Number int       // from 1
	Since  time.Time // the first attempt
}

// Source gets bundles. It is safe for concurrent use.
type Source struct {
	Config
	client *http.Client // nil: a file
}

// New fails where c names no source, or one that could not be trusted.
func New(c Config) (*Source, error) {
	if c.Format == "" {
		c.Format = PEM
	}
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	s := &Source{Config: c}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("bootstrap bundle: %w", err)
	}
	switch {
	case c.File != "":
	case c.Socket != "":
		if s.URL == "" {
			s.URL = socketURL
		}
		s.client = newClient(func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", c.Socket)
		})
		s.client.CheckRedirect = func(*http.Request, []*http.Request) error {
			return errors.New("it redirects, which over a Unix socket leads nowhere")
		}
	default:
		s.client = newClient(nil)
		s.client.CheckRedirect = checkRedirect
	}
	return s, nil
}

// check fails unless one source is named, whose answer nobody on the way can
// change.
func (c *Config) check() error {
	switch {
	case c.File == "" && c.URL == "" && c.Socket == "":
		return errors.New("there is no file, URL or socket to get it from")
	case c.File != "" && (c.URL != "" || c.Socket != ""):
		return errors.New("a file stands alone: leave out the URL and the socket, or the file")
	case c.Format != PEM && c.Format != SPIFFE:
		return fmt.Errorf("format %q: want %s or %s", c.Format, PEM, SPIFFE)
	case c.URL == "":
		return nil
	}
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		return fmt.Errorf("URL: %w", err)
	case c.Socket == "" && u.Scheme != "https":
		return fmt.Errorf("URL %s: want https://", u.Redacted())
	case c.Socket != "" && u.Scheme != "http":
		return fmt.Errorf("URL %s: beside a Unix socket want http://", u.Redacted())
	}
	return nil
}

// newClient makes a client that keeps no connection: there are hours between
// two downloads.
func newClient(dial func(ctx context.Context, network, address string) (net.Conn, error)) *http.Client {
	t := &http.Transport{
		DialContext:            dial,
		DisableKeepAlives:      true,
		DisableCompression:     true, // what is read is what counts against MaxSize
		MaxResponseHeaderBytes: maxHeader,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
	}
	if dial == nil {
		t.Proxy = http.ProxyFromEnvironment
	}
	return &http.Client{Transport: t, Timeout: timeout}
}

func checkRedirect(next *http.Request, before []*http.Request) error {
	switch {
	case len(before) > maxRedirects:
		return fmt.Errorf("it redirects more than %d times", maxRedirects)
	case next.URL.Scheme != "https":
		return fmt.Errorf("it redirects to %s: want https", next.URL.Redacted())
	}
	return nil
}

// Bundle returns the X.509 authorities, of which there is at least one. It
// takes at most 10 s and reads at most MaxSize. The error names the place, and
// what is wrong with what is there.
func (s *Source) Bundle(ctx context.Context, a Attempt) ([]*x509.Certificate, error) {
	where := s.where()
	data, err := s.read(ctx, a)
	if err != nil {
		return nil, err // names where
	}
	roots, err := Parse(data, s.Format)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	return roots, nil
}

func (s *Source) where() string {
	switch {
	case s.File != "":
		return s.File
	case s.Socket != "":
		return "unix:" + s.Socket
	}
	shown, _, _ := strings.Cut(s.URL, "?") // a signature may follow, which is as good as a password
	return shown
}

func (s *Source) read(ctx context.Context, a Attempt) ([]byte, error) {
	if s.client == nil {
		f, err := os.Open(s.File)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return readAll(f, s.File)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.address(a), nil)
	if err != nil {
		return nil, err
	}
	answer, err := s.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.where(), withoutQuery(err))
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: it answers %s: want 200 and the bundle", s.where(), answer.Status)
	}
	return readAll(answer.Body, s.where())
}

// withoutQuery takes off what net/http puts before an error: where has said it.
func withoutQuery(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func readAll(r io.Reader, where string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err == nil && len(data) > MaxSize {
		err = fmt.Errorf("more than %d bytes", MaxSize)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	return data, nil
}

// address is the URL, with what is told about the attempt over a socket.
func (s *Source) address(a Attempt) string {
	if s.Socket == "" {
		return s.URL
	}
	u, err := url.Parse(s.URL)
	if err != nil {
		return s.URL // New has parsed it before
	}
	q := u.Query()
	q.Set("spire-attest-mode", "bootstrap")
	if a.Again {
		q.Set("spire-attest-mode", "rebootstrap")
	}
	q.Set("spire-connection-attempts", strconv.Itoa(a.Number))
	q.Set("spire-attest-start-time", a.Since.Format(time.RFC3339))
	if host, port, err := net.SplitHostPort(s.Server); err == nil {
		q.Set("spire-server-address", host)
		q.Set("spire-server-port", port)
	}
	q.Set("spiffe-trust-domain", s.TrustDomain.Name())
	u.RawQuery = q.Encode()
	return u.String()
}

// Parse reads a bundle. The error says what it is not.
func Parse(data []byte, format string) ([]*x509.Certificate, error) {
	if format == SPIFFE {
		return parseSPIFFE(data)
	}
	var roots []*x509.Certificate
	for len(data) > 0 {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a PEM block %.40q; a bundle holds certificates only", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(roots)+1, err)
		}
		roots = append(roots, cert)
	}
	if len(roots) == 0 {
		return nil, errors.New("no PEM certificate in it; write it with `spire-server bundle show`")
	}
	return roots, nil
}

// Follow calls changed once it watches, and whenever a file has another content
// since, until ctx ends. Other sources announce nothing: it returns at once.
func (s *Source) Follow(ctx context.Context, changed func()) {
	if s.File == "" {
		return
	}
	var last [sha256.Size]byte
	first := true
	watch.Files(ctx, watch.Config{
		Paths: func() []string { return []string{s.File} },
		Changed: func() {
			data, err := s.read(ctx, Attempt{})
			if err != nil {
				data = nil // as good as empty: changed is called when it can be read
			}
			sum := sha256.Sum256(bytes.TrimSpace(data))
			if first || sum != last {
				changed()
			}
			first, last = false, sum
		},
		Log: s.Log,
	})
}
