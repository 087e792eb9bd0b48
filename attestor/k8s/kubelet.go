package k8s

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
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
)

// What a pod is given, and where kubelets listen.
const (
	serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount/"
	securePort     = 10250
	readOnlyPort   = 10255
)

const (
	stallTimeout  = 10 * time.Second // until an answer begins, and until more of it comes
	answerTimeout = 2 * time.Minute  // of a request, its answer read: maxList takes about one
	reloadPeriod  = time.Minute      // between two readings of the credentials
	maxCredential = 1 << 20          // bytes of a file
	maxHeaders    = 64 << 10         // bytes of the answer's headers
)

// Kubelet says where the kubelet is and how both sides prove who they are.
// The zero value is the secure port of 127.0.0.1, with what a pod has of its
// service account. Paths are of files, at most 1 MiB each, that are read anew
// each minute, and at once when the kubelet refuses what they held.
type Kubelet struct {
	Host     string // name or address; default 127.0.0.1
	Port     int    // default 10250, 10255 with ReadOnly
	ReadOnly bool   // plain HTTP to the read-only port: nobody proves anything

	CA               string // PEM; who may have signed the kubelet's certificate
	SkipVerification bool   // whoever answers is believed

	Token       string // bearer token; not used with Certificate
	Certificate string // PEM, the client's
	Key         string // PEM
}

// client asks the kubelet. It is used by one goroutine at a time.
type client struct {
	cfg  Kubelet
	node string
	url  url.URL

	files  []byte // what the credentials were made of
	token  string
	http   *http.Transport
	loaded time.Time // zero: they have to be read before they are used again
}

func newClient(cfg Kubelet, node string) *client {
	port, scheme := securePort, "https"
	if cfg.ReadOnly {
		port, scheme = readOnlyPort, "http"
	}
	cfg.Host = cmp.Or(cfg.Host, "127.0.0.1")
	cfg.Port = cmp.Or(cfg.Port, port)
	cfg.CA = cmp.Or(cfg.CA, serviceAccount+"ca.crt")
	if cfg.Certificate == "" {
		cfg.Token = cmp.Or(cfg.Token, serviceAccount+"token")
	}
	return &client{
		cfg: cfg, node: node,
		url: url.URL{Scheme: scheme, Host: net.JoinHostPort(cfg.Host, strconv.Itoa(cfg.Port)), Path: "/pods"},
	}
}

// pods asks for the pods of the node. Where the kubelet refuses credentials
// whose files have changed since they were read, it is asked once more.
func (c *client) pods(ctx context.Context, old *list) (*list, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	if err := c.load(); err != nil {
		return nil, fmt.Errorf("ask the kubelet: %w", err)
	}
	l, err := c.get(ctx, old)
	var status *statusError
	if errors.As(err, &status) && status.code == http.StatusUnauthorized && !c.cfg.ReadOnly {
		before := c.files
		c.loaded = time.Time{}
		if loadErr := c.load(); loadErr == nil && !bytes.Equal(before, c.files) {
			l, err = c.get(ctx, old)
		}
		if errors.As(err, &status) {
			c.loaded = time.Time{}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ask the kubelet at %s: %w", c.url.String(), c.explain(ctx, err))
	}
	return l, nil
}

func (c *client) get(ctx context.Context, old *list) (*list, error) {
	began := time.Now()
	// What takes time is how much the pods of the node are, and that is up to
	// their owners: so it is a kubelet that stalls which is given up early.
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	stall := time.AfterFunc(stallTimeout, func() { stop(errStalled) })
	defer stall.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url.String(), nil)
	if err != nil {
		return nil, err
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	// Without a Client around it, a transport follows no redirect: the token
	// goes to this one host.
	res, err := c.http.RoundTrip(req)
	if err != nil {
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		head, err := io.ReadAll(io.LimitReader(res.Body, maxHead))
		if err != nil {
			head = nil // the status says enough
		}
		return nil, &statusError{code: res.StatusCode, head: head}
	}
	in := &remembering{r: res.Body, more: func() { stall.Reset(stallTimeout) }}
	l, err := decode(in, c.node, old)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		err = fmt.Errorf("its answer is no list of pods: %w", err)
		// Callers read this too: what may be a list shows them no pods of others.
		if !bytes.HasPrefix(bytes.TrimSpace(in.head), []byte("{")) {
			err = fmt.Errorf("%w; it begins with %s", err, quote(in.head))
		}
		return nil, err
	}
	l.began = began
	return l, nil
}

// errStalled ends a request of which nothing more comes.
var errStalled = fmt.Errorf("nothing more came for %s: %w", stallTimeout, context.DeadlineExceeded)

// remembering is a reader that keeps how it began, for a person to see.
type remembering struct {
	r    io.Reader
	more func() // called when something was read
	head []byte
}

// maxHead is how much of a bad answer is shown, in bytes: the kubelet's own words
// when it refuses, who asked for what, are some 150.
const maxHead = 200

// Read implements io.Reader.
func (r *remembering) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if n > 0 {
		r.more()
	}
	if room := maxHead - len(r.head); room > 0 {
		r.head = append(r.head, p[:min(room, n)]...)
	}
	return n, err
}

// quote shows bytes of somebody else's in one line.
func quote(b []byte) string {
	shown := bytes.Clone(b[:min(len(b), maxHead)])
	for i, c := range shown {
		if c < ' ' || c > '~' {
			shown[i] = ' '
		}
	}
	return strconv.Quote(strings.Join(strings.Fields(string(shown)), " "))
}

// statusError is an answer other than 200.
type statusError struct {
	code int
	head []byte
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%d %s", e.code, http.StatusText(e.code))
}

// explain says what a request failed with, and what to do about it.
func (c *client) explain(ctx context.Context, err error) error {
	var status *statusError
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	switch {
	case errors.As(err, &status):
		return fmt.Errorf("%w%s", err, c.adviseStatus(status))
	case errors.Is(err, errStalled):
		return err
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("no whole answer within %s: %w", answerTimeout, context.DeadlineExceeded)
	case errors.As(err, &authority):
		return fmt.Errorf("%w; a kubelet signs its own serving certificate unless serverTLSBootstrap is set: give kubelet.ca the CA of %s, or set kubelet.skip_verification (chart: agent.kubelet.skipVerification) where the way there is trusted", err, c.cfg.Host)
	case errors.As(err, &name):
		return fmt.Errorf("%w; give kubelet.host or kubelet.host_env a name or address that is in the certificate, or 127.0.0.1 on the host's network", err)
	}
	return err
}

// adviseStatus is what to do about a status.
func (c *client) adviseStatus(e *statusError) string {
	said := ""
	if len(e.head) > 0 {
		said = ": " + quote(e.head)
	}
	switch {
	case e.code == http.StatusUnauthorized && c.cfg.Certificate != "":
		return fmt.Sprintf("%s; it does not accept the certificate in %s: is it signed by the kubelet's client CA, and not expired?", said, c.cfg.Certificate)
	case e.code == http.StatusUnauthorized:
		return fmt.Sprintf("%s; it does not accept the token in %s: that has to be one of this cluster for the API server's audience, not expired, and the kubelet has to review tokens (authentication.webhook.enabled)", said, c.cfg.Token)
	case e.code == http.StatusForbidden:
		return said + "; the agent's ClusterRole or its binding is missing, or lacks get on nodes/pods (Kubernetes 1.33 and later, with fine-grained kubelet authorization) or nodes/proxy (before; chart: rbac.kubelet)"
	case e.code >= 300 && e.code < 400:
		return said + "; redirects are not followed: is this the kubelet's port?"
	}
	return said
}

// load reads the credentials, unless they were read within the last minute.
// Connections are kept where nothing has changed.
func (c *client) load() error {
	now := time.Now()
	if c.http != nil && !c.loaded.IsZero() && now.Sub(c.loaded) < reloadPeriod {
		return nil
	}
	if c.cfg.ReadOnly {
		c.renew(nil, "", nil, now)
		return nil
	}
	conf, token, files, err := c.read()
	if err != nil {
		return err
	}
	c.renew(conf, token, files, now)
	return nil
}

func (c *client) renew(conf *tls.Config, token string, files []byte, now time.Time) {
	c.loaded = now
	if c.http != nil && bytes.Equal(files, c.files) {
		return
	}
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
	c.files, c.token = files, token
	c.http = &http.Transport{
		Proxy:                  nil, // the kubelet is on this node, whatever the environment says
		DialContext:            (&net.Dialer{Timeout: stallTimeout}).DialContext,
		TLSClientConfig:        conf,
		TLSHandshakeTimeout:    stallTimeout,
		DisableCompression:     true, // what is bounded is what comes
		MaxIdleConns:           1,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxHeaders,
	}
}

// read reads the files of the credentials, and returns them joined as well.
func (c *client) read() (conf *tls.Config, token string, files []byte, err error) {
	conf = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.cfg.Host}
	keep := func(content []byte) { files = append(append(files, content...), 0) }
	if c.cfg.Certificate != "" {
		cert, key, pair, err := readPair(c.cfg.Certificate, c.cfg.Key)
		if err != nil {
			return nil, "", nil, err
		}
		keep(cert)
		keep(key)
		conf.Certificates = []tls.Certificate{pair}
	} else {
		content, err := readFile(c.cfg.Token)
		if err != nil {
			return nil, "", nil, fmt.Errorf("token: %w", err)
		}
		if token = string(bytes.TrimSpace(content)); token == "" || strings.ContainsAny(token, " \r\n\t") {
			return nil, "", nil, fmt.Errorf("token: %s holds none", c.cfg.Token)
		}
		keep(content)
	}
	if c.cfg.SkipVerification {
		conf.InsecureSkipVerify = true // what the operator asked for
		return conf, token, files, nil
	}
	content, err := readFile(c.cfg.CA)
	if err != nil {
		return nil, "", nil, fmt.Errorf("CA: %w", err)
	}
	keep(content)
	conf.RootCAs = x509.NewCertPool()
	if !conf.RootCAs.AppendCertsFromPEM(content) {
		return nil, "", nil, fmt.Errorf("CA: no certificate in %s", c.cfg.CA)
	}
	if isLoopback(c.cfg.Host) {
		verifyChainOnly(conf)
	}
	return conf, token, files, nil
}

// verifyChainOnly lets the certificate be for any name. Kubelets have theirs
// for the node's name and address, and nobody but this node answers on its
// loopback addresses.
func verifyChainOnly(conf *tls.Config) {
	roots := conf.RootCAs
	conf.InsecureSkipVerify = true // VerifyConnection verifies all but the name
	conf.VerifyConnection = func(state tls.ConnectionState) error {
		opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
		for _, cert := range state.PeerCertificates[1:] {
			opts.Intermediates.AddCert(cert)
		}
		_, err := state.PeerCertificates[0].Verify(opts)
		return err
	}
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func readPair(certFile, keyFile string) (cert, key []byte, pair tls.Certificate, err error) {
	if cert, err = readFile(certFile); err != nil {
		return nil, nil, pair, fmt.Errorf("certificate: %w", err)
	}
	if key, err = readFile(keyFile); err != nil {
		return nil, nil, pair, fmt.Errorf("key: %w", err)
	}
	if pair, err = tls.X509KeyPair(cert, key); err != nil {
		return nil, nil, pair, fmt.Errorf("certificate %s and key %s: %w", certFile, keyFile, err)
	}
	return cert, key, pair, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxCredential+1))
	if err == nil && len(content) > maxCredential {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxCredential)
	}
	return content, err
}
