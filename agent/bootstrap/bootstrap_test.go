package bootstrap

import (
	"bytes"
	"context"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/narthex-id/narthex/internal/testca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.test")

// bundles returns one authority's bundle in each format.
func bundles(t testing.TB) (root *x509.Certificate, pem, jwks []byte) {
	t.Helper()
	ca := testca.New(t, td.Name())
	b := spiffebundle.FromX509Authorities(td, []*x509.Certificate{ca.Cert})
	jwks, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return ca.Cert, testca.CertPEM(ca.Cert.Raw), jwks
}

func TestNew(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		config Config
		say    string // "" where it is good
	}{
		"file":             {Config{File: "b.pem"}, ""},
		"https":            {Config{URL: "https://x/b"}, ""},
		"socket":           {Config{Socket: "/s"}, ""},
		"http over socket": {Config{URL: "http://x/b", Socket: "/s"}, ""},
		"spiffe":           {Config{File: "b", Format: SPIFFE}, ""},
		"nothing":          {Config{}, "no file, URL or socket"},
		"two":              {Config{File: "b", URL: "https://x/b"}, "a file stands alone"},
		"http":             {Config{URL: "http://x/b"}, "want https://"},
		"tls over socket":  {Config{URL: "https://x/b", Socket: "/s"}, "want http://"},
		"a file's url":     {Config{URL: "file:///b"}, "want https://"},
		"no url":           {Config{URL: "https://x\x00"}, "URL"},
		"format":           {Config{File: "b", Format: "der"}, `format "der"`},
	} {
		_, err := New(test.config)
		if (err == nil) != (test.say == "") || err != nil && !strings.Contains(err.Error(), test.say) {
			t.Errorf("%s: %v, want %q", name, err, test.say)
		}
	}
}

func TestFile(t *testing.T) {
	t.Parallel()
	root, pem, jwks := bundles(t)
	key := []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
	tokens := spiffebundle.New(td)
	if err := tokens.AddJWTAuthority("one", testca.NewKey(t).Public()); err != nil {
		t.Fatal(err)
	}
	other, err := tokens.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		format  string
		content []byte
		say     string
	}{
		"pem":                  {PEM, pem, ""},
		"spiffe":               {SPIFFE, jwks, ""},
		"empty":                {PEM, nil, "no PEM certificate in it"},
		"a key":                {PEM, append(key, pem...), "certificates only"},
		"no certificate":       {PEM, testca.CertPEM([]byte("x")), "certificate 1"},
		"too much":             {PEM, make([]byte, MaxSize+1), "more than 1048576 bytes"},
		"pem for spiffe":       {SPIFFE, pem, "no SPIFFE bundle"},
		"spiffe for pem":       {PEM, jwks, "no PEM certificate in it"},
		"without authority":    {SPIFFE, other, "no X.509 authority"},
		"truncated":            {SPIFFE, jwks[:len(jwks)/2], "no SPIFFE bundle"},
		"garbage after, as is": {PEM, append(bytes.Clone(pem), "tail"...), ""},
	} {
		file := filepath.Join(t.TempDir(), "bundle")
		if err := os.WriteFile(file, test.content, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := New(Config{TrustDomain: td, File: file, Format: test.format})
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Bundle(t.Context(), Attempt{})
		switch {
		case test.say == "" && (err != nil || len(got) != 1 || !got[0].Equal(root)):
			t.Errorf("%s: %d authorities, %v", name, len(got), err)
		case test.say != "" && (err == nil || !strings.Contains(err.Error(), test.say) || !strings.Contains(err.Error(), file)):
			t.Errorf("%s: %v, want %q and the file's name", name, err, test.say)
		}
	}
}

// served is a source that asks an HTTPS server of the test's.
func served(t *testing.T, answer http.HandlerFunc) *Source {
	t.Helper()
	server := httptest.NewTLSServer(answer)
	t.Cleanup(server.Close)
	s, err := New(Config{TrustDomain: td, URL: server.URL + "/bundle?key=secret"})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	s.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = roots
	return s
}

func TestURL(t *testing.T) {
	t.Parallel()
	_, pem, _ := bundles(t)
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		say    string
	}{
		"good":      {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(pem) }, ""},
		"not found": {http.NotFound, "it answers 404 Not Found"},
		"plaintext": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1/b", http.StatusFound)
		}, "want https"},
		"circle":   {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }, "more than 3 times"},
		"too much": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 2*MaxSize)) }, "more than 1048576 bytes"},
		"headers": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 2*maxHeader))
			_, _ = w.Write(pem)
		}, "header"},
	} {
		_, err := served(t, test.answer).Bundle(t.Context(), Attempt{})
		switch {
		case (err == nil) != (test.say == ""), err != nil && !strings.Contains(err.Error(), test.say):
			t.Errorf("%s: %v, want %q", name, err, test.say)
		case err != nil && strings.Contains(err.Error(), "secret"):
			t.Errorf("%s: the error shows what may be a signature: %v", name, err)
		}
	}

	// The system does not know the authority of a test's server.
	s := served(t, http.NotFound)
	s.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = x509.NewCertPool()
	if _, err := s.Bundle(t.Context(), Attempt{}); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("a server that nobody vouches for: %v", err)
	}
}

func TestURLEndsWithItsContext(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{})
	s := served(t, func(_ http.ResponseWriter, r *http.Request) { close(arrived); <-r.Context().Done() })
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-arrived; cancel() }()
	if _, err := s.Bundle(ctx, Attempt{}); err == nil {
		t.Error("a server that does not answer has answered")
	}
	if s.client.Timeout != timeout {
		t.Errorf("without one, a download ends after %s", s.client.Timeout)
	}
}

// What is told over the socket is what spire-agent tells there.
func TestSocket(t *testing.T) {
	t.Parallel()
	_, pem, _ := bundles(t)
	dir, err := os.MkdirTemp("", "bundle") // short: socket paths have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan *url.URL, 2)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL
		_, _ = w.Write(pem)
	}))
	server.Listener.Close()
	server.Listener = listener
	server.Start()
	t.Cleanup(server.Close)

	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, test := range []struct {
		url     string
		attempt Attempt
		path    string
		query   string
	}{
		{
			"",
			Attempt{Number: 1, Since: since},
			"/",
			"spiffe-trust-domain=example.test&spire-attest-mode=bootstrap&spire-attest-start-time=2026-01-02T03%3A04%3A05Z&" +
				"spire-connection-attempts=1&spire-server-address=spire&spire-server-port=8081",
		},
		{
			"http://x/b?a=1",
			Attempt{Again: true, Number: 7, Since: since},
			"/b",
			"a=1&spiffe-trust-domain=example.test&spire-attest-mode=rebootstrap&spire-attest-start-time=2026-01-02T03%3A04%3A05Z&" +
				"spire-connection-attempts=7&spire-server-address=spire&spire-server-port=8081",
		},
	} {
		s, err := New(Config{TrustDomain: td, Server: "spire:8081", URL: test.url, Socket: path})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Bundle(t.Context(), test.attempt); err != nil {
			t.Fatal(err)
		}
		if got := <-asked; got.Path != test.path || got.RawQuery != test.query {
			t.Errorf("asked for %s\n?%s, want %s\n?%s", got.Path, got.RawQuery, test.path, test.query)
		}
	}
}

func TestFollow(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "bundle.pem")
	s, err := New(Config{TrustDomain: td, File: file})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	changed, done := make(chan struct{}, 10), make(chan struct{})
	go func() { defer close(done); s.Follow(ctx, func() { changed <- struct{}{} }) }()
	t.Cleanup(func() { cancel(); <-done })
	<-changed
	for _, content := range []string{"one", "two"} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		<-changed
	}
}

func FuzzParse(f *testing.F) {
	_, pem, jwks := bundles(f)
	f.Add(pem, false)
	f.Add(jwks, true)
	f.Fuzz(func(t *testing.T, data []byte, spiffe bool) {
		format := PEM
		if spiffe {
			format = SPIFFE
		}
		roots, err := Parse(data, format)
		if (err == nil) != (len(roots) > 0) {
			t.Errorf("%d authorities and %v", len(roots), err)
		}
	})
}
