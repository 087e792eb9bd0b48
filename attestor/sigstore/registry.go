package sigstore

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"
)

const (
	maxManifest  = 512 << 10 // bytes; a signature with its certificates has about 10 KiB
	maxFile      = 1 << 20   // bytes of a PEM file or trusted root
	maxPassword  = 16 << 10  // bytes
	maxHeader    = 64 << 10  // bytes of an answer's header
	maxRedirects = 3         // registries send to their storage once

	connectTimeout = 5 * time.Second

	mediaOCIManifest    = "application/vnd.oci.image.manifest.v1+json"
	mediaDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
)

// errAbsent is returned for what the registry says it does not have.
var errAbsent = errors.New("not in the registry")

// registry is how to ask one registry, or all of those without settings.
type registry struct {
	Registry
	name string // empty: any
}

func newRegistries(settings map[string]Registry) (others *registry, known map[string]*registry, err error) {
	known = make(map[string]*registry, len(settings))
	for name, s := range settings {
		host := canonicalRegistry(name)
		if !validHost(host) {
			return nil, nil, fmt.Errorf("registries: %q is not a host or host:port, such as docker.io", name)
		}
		if _, ok := known[host]; ok {
			return nil, nil, fmt.Errorf("registries: %q is there twice", host)
		}
		if (s.Username == "") != (s.PasswordFile == "") {
			return nil, nil, fmt.Errorf("registries: %q needs a user name and a password file, or neither", name)
		}
		if s.TokenHost != "" && !validHost(strings.ToLower(s.TokenHost)) {
			return nil, nil, fmt.Errorf("registries: %q: token_host %q is not a host or host:port", name, s.TokenHost)
		}
		if s.PlainHTTP && (s.Username != "" || s.CA != "") {
			return nil, nil, fmt.Errorf("registries: %q speaks plain HTTP: it has no use for a CA, and a password would be readable on the way", name)
		}
		r := &registry{Registry: s, name: host}
		if _, err := r.roots(); err != nil {
			return nil, nil, fmt.Errorf("registries: %q: %w", name, err)
		}
		known[host] = r
	}
	return &registry{}, known, nil
}

// roots returns the CAs of this registry, nil for the system's.
func (r *registry) roots() (*x509.CertPool, error) {
	if r.CA == "" {
		return nil, nil
	}
	pem, err := readBounded(r.CA, maxFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no PEM certificate", r.CA)
	}
	return pool, nil
}

// session asks a registry about one image. Its connections, credentials and
// tokens end with it.
type session struct {
	ref       reference
	registry  *registry
	transport *http.Transport
	authorize string // header for the registry's own host, once it has asked for it
}

func (r *registry) open(ref reference) (*session, error) {
	roots, err := r.roots()
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: connectTimeout, Control: refuseLinkLocal}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true) // a handful of requests; HTTP/2 would only need memory
	return &session{ref: ref, registry: r, transport: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    connectTimeout,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true,
		Protocols:              protocols,
	}}, nil
}

func (s *session) close() { s.transport.CloseIdleConnections() }

// refuseLinkLocal keeps the agent from asking the metadata service of a
// cloud, which is on such an address and where no registry is. Private
// addresses are allowed: clusters have registries of their own.
func refuseLinkLocal(_, address string, _ syscall.RawConn) error {
	if a, err := netip.ParseAddrPort(address); err == nil && a.Addr().Unmap().IsLinkLocalUnicast() {
		return fmt.Errorf("%s is a link-local address", a.Addr())
	}
	return nil
}

// manifest returns the manifest under a tag, or errAbsent.
func (s *session) manifest(ctx context.Context, tag string) ([]byte, error) {
	body, err := s.get(ctx, "manifests/"+tag, mediaOCIManifest+", "+mediaDockerManifest, maxManifest)
	if err != nil {
		return nil, fmt.Errorf("get manifest %s from %s: %w", tag, s.ref.registry, err)
	}
	return body, nil
}

// blob returns the content with a SHA-256 in hexadecimal and exactly size
// bytes.
func (s *session) blob(ctx context.Context, digest string, size int64) ([]byte, error) {
	body, err := s.get(ctx, "blobs/sha256:"+digest, "", size)
	if err != nil {
		return nil, fmt.Errorf("get blob sha256:%s from %s: %w", digest, s.ref.registry, err)
	}
	if int64(len(body)) != size || digestOf(body) != digest {
		return nil, fmt.Errorf("get blob sha256:%s from %s: it sent other content", digest, s.ref.registry)
	}
	return body, nil
}

// get returns a resource of the repository, of at most limit bytes. It
// authenticates when the registry asks for that.
func (s *session) get(ctx context.Context, resource, accept string, limit int64) ([]byte, error) {
	u := &url.URL{Scheme: "https", Host: s.ref.host(), Path: "/v2/" + s.ref.repository + "/" + resource}
	if s.registry.PlainHTTP {
		u.Scheme = "http"
	}
	asked := s.authorize != ""
	for {
		resp, from, err := s.follow(ctx, u, accept)
		if err != nil {
			return nil, err
		}
		// Whoever the registry redirects to may not ask for its password.
		if resp.StatusCode == http.StatusUnauthorized && !asked && from == u.Scheme+"://"+u.Host {
			challenges := resp.Header.Values("WWW-Authenticate")
			resp.Body.Close()
			if s.authorize, err = s.answer(ctx, challenges); err != nil {
				return nil, err
			}
			asked = true
			continue
		}
		defer resp.Body.Close()
		return readAnswer(resp, limit)
	}
}

// follow sends a GET to u and wherever the registry sends it from there. It
// returns the answer and from which scheme and host it came.
func (s *session) follow(ctx context.Context, u *url.URL, accept string) (resp *http.Response, from string, err error) {
	home := u.Scheme + "://" + u.Host
	for range maxRedirects + 1 {
		if resp, err = s.send(ctx, u, accept, s.authorize, home); err != nil {
			return nil, "", err
		}
		if !redirects(resp.StatusCode) {
			return resp, u.Scheme + "://" + u.Host, nil
		}
		location := resp.Header.Get("Location")
		resp.Body.Close()
		next, err := u.Parse(location)
		if err != nil || location == "" || next.Host == "" {
			return nil, "", errors.New("it redirects to no URL")
		}
		if next.Scheme != "https" && (next.Scheme != "http" || !s.registry.PlainHTTP) {
			return nil, "", fmt.Errorf("it redirects to %q, which is not https", next.Scheme)
		}
		next.User = nil
		u = next
	}
	return nil, "", fmt.Errorf("it redirects more than %d times", maxRedirects)
}

func redirects(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// send sends one GET. What authorizes it goes to home alone, whose scheme,
// host and port are the registry's or the token server's.
func (s *session) send(ctx context.Context, u *url.URL, accept, authorize, home string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, errors.New("its URL is malformed")
	}
	req.Header.Set("User-Agent", "narthex")
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	if authorize != "" && u.Scheme+"://"+u.Host == home {
		req.Header.Set("Authorization", authorize)
	}
	// Not through http.Client, which would add the URL to errors (that of a
	// storage holds a signature) and carry headers along redirects.
	resp, err := s.transport.RoundTrip(req)
	if err != nil {
		return nil, errors.New(strings.Join(strings.Fields(err.Error()), " "))
	}
	return resp, nil
}

// readAnswer returns the body of resp. What an answer that is no success says
// of itself is a stranger's text and not repeated.
func readAnswer(resp *http.Response, limit int64) ([]byte, error) {
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return nil, errAbsent
	case http.StatusUnauthorized, http.StatusForbidden:
		return nil, fmt.Errorf("it refuses with HTTP %d; give a user name and password that may pull the repository", resp.StatusCode)
	default:
		return nil, fmt.Errorf("it answers with HTTP %d", resp.StatusCode)
	}
	if resp.ContentLength > limit {
		return nil, fmt.Errorf("its answer has %d bytes, more than %d", resp.ContentLength, limit)
	}
	// The size is mostly known, and growing a buffer takes twice of it.
	var body bytes.Buffer
	if resp.ContentLength > 0 {
		body.Grow(int(resp.ContentLength) + bytes.MinRead)
	}
	if _, err := body.ReadFrom(io.LimitReader(resp.Body, limit+1)); err != nil {
		return nil, fmt.Errorf("its answer breaks off: %w", err)
	}
	if int64(body.Len()) > limit {
		return nil, fmt.Errorf("its answer has more than %d bytes", limit)
	}
	return body.Bytes(), nil
}

// readBounded returns the content of a file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return b, nil
}
