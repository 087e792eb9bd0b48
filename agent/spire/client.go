// Package spire is the one room of Narthex that speaks the SPIRE Server API
// (spire-api-sdk, v1): node attestation, the agent's entries, bundles and
// signatures.
//
//	c, err := spire.New(spire.Config{Address: "spire:8081", TrustDomain: td})
//	defer c.Close()
//	a, err := c.Attest(ctx, spire.Trust{Roots: bootstrap}, node, csr)
//	// write a.Chain, its key and a.Bundle to disk, then:
//	c.SetRoots(a.Bundle.X509)
//	c.SetIdentity(&spire.Identity{Chain: a.Chain, Key: key})
//	entries, stats, err := c.Sync(ctx, known)
//
// It makes calls and leaves the rest to others: when to call, how often and
// what to do about an error is the agent's; what to keep is the registry's;
// how a node proves what it is, the attestor's. It runs no goroutine of its
// own and retries nothing: one call is one attempt, on a connection that is
// already up or is dialled for it.
//
// Every error names the step and the server's address. What a caller decides
// on is a *DeniedError, a *CallError or one of the sentinels in this package;
// Advice says what a person can do about an error.
package spire

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

const (
	// callTimeout bounds each operation. SPIRE Server's own limits make it
	// hold a call back rather than refuse it, for seconds at most.
	callTimeout = 30 * time.Second

	// attestTimeout bounds AttestAgent, which SPIRE Server admits once a
	// second and IP address: the nodes behind one NAT form a queue.
	attestTimeout = 5 * time.Minute

	// lookupTimeout bounds the search for the reason why a name does not
	// resolve, which has just failed to resolve.
	lookupTimeout = 3 * time.Second

	// maxMessage bounds what one message from the server may make us hold.
	// gRPC's default of 4 MiB is too small: GetAuthorizedEntries has no
	// pages, and an entry takes some 600 bytes.
	maxMessage = 64 << 20

	// keepaliveTime must not be below five minutes: SPIRE Server keeps
	// gRPC's default enforcement policy and ends connections that ping more
	// often. It is set at all for what gRPC does with keepaliveTimeout, which
	// becomes TCP_USER_TIMEOUT: a call on a connection whose other end has
	// vanished fails within that time.
	keepaliveTime    = 6 * time.Minute
	keepaliveTimeout = 20 * time.Second

	// roundRobin spreads calls over all addresses a name has. The service
	// config that DNS could offer is not looked up.
	roundRobin = `{"loadBalancingConfig":[{"round_robin":{}}]}`
)

// Config says which server to talk to.
type Config struct {
	// Address is the server's host:port. A host name is resolved anew for
	// every connection, and calls go round all of its addresses. A proxy
	// that HTTPS_PROXY names is used.
	Address string
	// TrustDomain is the agent's and the server's.
	TrustDomain spiffeid.TrustDomain
	// RequirePQKEM refuses a server that does not agree on X25519MLKEM768,
	// and with it any TLS below 1.3.
	RequirePQKEM bool
	// Log takes the few things that are no error. Nil discards them.
	Log hclog.Logger
}

// Trust is what the server's certificate is held against in Attest.
type Trust struct {
	// Roots are the X.509 authorities of the trust domain.
	Roots []*x509.Certificate
	// Insecure believes any server that calls itself
	// spiffe://<trust domain>/spire/server, and ignores Roots. Whoever can
	// answer at the server's address can then give this node any identity
	// and any bundle.
	Insecure bool
}

// Identity is the agent's own X509-SVID with its key. It is not changed after
// it is handed over.
type Identity struct {
	Chain [][]byte // DER certificates, leaf first
	Key   crypto.Signer
}

// Client makes the calls. It is safe for concurrent use.
type Client struct {
	address      string
	trustDomain  spiffeid.TrustDomain
	serverID     spiffeid.ID
	requirePQKEM bool
	log          hclog.Logger

	// callTimeout and attestTimeout are the constants, but in tests.
	callTimeout, attestTimeout time.Duration

	// roots is read in the middle of handshakes, so that a new bundle counts
	// for every handshake after SetRoots.
	roots atomic.Pointer[[]*x509.Certificate]

	// known are the entries that the last Sync was given.
	known atomic.Pointer[knownEntries]

	mu sync.Mutex // guards the following
	// identity is what later calls present.
	identity *Identity
	// current is the connection of identity, nil until a call needs it.
	current *conn
	// open holds every connection that is not closed yet: current, those
	// whose last calls still run, and those of attestations under way.
	open   map[*conn]struct{}
	closed bool
	// attesting counts attestations under way, and unset says that one has
	// succeeded since identity was set. In both cases the server may have
	// dropped identity already.
	attesting int
	unset     bool
}

// conn is a connection to the server as one identity, or as none.
type conn struct {
	cc       *grpc.ClientConn
	identity *Identity
	id       spiffeid.ID // of identity
	verifier *verifier
	// unpaged says that the server has no SyncAuthorizedEntries. It is
	// remembered here and not in the Client: the server may be upgraded, and
	// connections end often enough to find out.
	unpaged atomic.Bool

	// The Client's mutex guards the following.
	calls   int
	retired bool // closed when calls reaches zero
}

// New returns a client. It does not connect: the first call does.
func New(cfg Config) (*Client, error) {
	host, port, err := net.SplitHostPort(cfg.Address)
	if err == nil && (host == "" || port == "") {
		err = errors.New("want host:port")
	}
	if err != nil {
		return nil, fmt.Errorf("server address %q: %w", cfg.Address, err)
	}
	if cfg.TrustDomain.IsZero() {
		return nil, fmt.Errorf("server %s: no trust domain given", cfg.Address)
	}
	serverID, err := spiffeid.FromPath(cfg.TrustDomain, "/spire/server")
	if err != nil {
		return nil, fmt.Errorf("server %s: %w", cfg.Address, err)
	}
	log := cfg.Log
	if log == nil {
		log = hclog.NewNullLogger()
	}
	return &Client{
		address:      cfg.Address,
		trustDomain:  cfg.TrustDomain,
		serverID:     serverID,
		requirePQKEM: cfg.RequirePQKEM,
		log:          log,

		callTimeout:   callTimeout,
		attestTimeout: attestTimeout,

		open: map[*conn]struct{}{},
	}, nil
}

// SetIdentity makes later calls present id. Calls under way end on the
// connection they began on, which is closed after the last of them. Nil takes
// the identity away: calls other than Attest then return ErrNoIdentity.
func (c *Client) SetIdentity(id *Identity) {
	c.mu.Lock()
	c.unset = false
	same := id != nil && c.identity != nil && sameChain(id.Chain, c.identity.Chain)
	var done *conn
	if !same {
		c.identity = id
		done = c.retire(c.current)
	}
	c.mu.Unlock()
	done.close()
}

// Identity returns what later calls present, nil for nothing.
func (c *Client) Identity() *Identity {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.identity
}

// SetRoots makes later handshakes trust roots and nothing else. A connection
// that is up stays up: the server ends it within minutes by itself.
func (c *Client) SetRoots(roots []*x509.Certificate) {
	c.roots.Store(&roots)
}

// Close ends the calls under way, which return ErrClosed, and all connections.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.current = nil
	open := c.open
	c.open = map[*conn]struct{}{}
	c.mu.Unlock()
	var errs []error
	for cn := range open {
		errs = append(errs, cn.cc.Close())
	}
	return errors.Join(errs...)
}

// call runs one operation on the connection of the current identity. What f
// returns is a gRPC status, or an error of ours about an answer that makes no
// sense.
func (c *Client) call(ctx context.Context, step string, f func(context.Context, *conn) error) error {
	cn, err := c.acquire(step)
	if err != nil {
		return err
	}
	defer c.release(cn)
	bounded, cancel := context.WithTimeout(ctx, c.callTimeout)
	defer cancel()
	if err := f(bounded, cn); err != nil {
		c.dropBroken(ctx, cn, err)
		return c.explain(ctx, step, cn, err)
	}
	return nil
}

// acquire returns the connection of the current identity and counts a call on
// it, which release ends.
func (c *Client) acquire(step string) (*conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return nil, fmt.Errorf("%s: %w", step, ErrClosed)
	case c.identity == nil:
		return nil, fmt.Errorf("%s: %w", step, ErrNoIdentity)
	}
	if c.current == nil {
		v := &verifier{serverID: c.serverID, roots: func() []*x509.Certificate {
			if roots := c.roots.Load(); roots != nil {
				return *roots
			}
			return nil
		}}
		cn, err := c.dial(v, c.identity)
		if err != nil {
			return nil, fmt.Errorf("%s: server %s: %w", step, c.address, err)
		}
		c.current = cn
	}
	c.current.calls++
	return c.current, nil
}

// acquireAnonymous returns a new connection that presents no certificate. It
// ends with the call.
func (c *Client) acquireAnonymous(step string, v *verifier) (*conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("%s: %w", step, ErrClosed)
	}
	cn, err := c.dial(v, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: server %s: %w", step, c.address, err)
	}
	cn.calls, cn.retired = 1, true
	return cn, nil
}

// dial makes a connection, which gRPC brings up with the first call on it.
// The mutex is held.
func (c *Client) dial(v *verifier, id *Identity) (*conn, error) {
	cn := &conn{identity: id, verifier: v}
	config := tlsConfig(v, c.requirePQKEM)
	if id != nil {
		if err := cn.present(config); err != nil {
			return nil, fmt.Errorf("own SVID: %w", err)
		}
	}
	var err error
	cn.cc, err = grpc.NewClient("dns:///"+c.address,
		grpc.WithTransportCredentials(alertCredentials{credentials.NewTLS(config)}),
		grpc.WithDefaultServiceConfig(roundRobin),
		grpc.WithDisableServiceConfig(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, err
	}
	c.open[cn] = struct{}{}
	return cn, nil
}

func (c *Client) release(cn *conn) {
	c.mu.Lock()
	cn.calls--
	var done *conn
	if cn.retired && cn.calls == 0 {
		done = cn
		delete(c.open, cn)
	}
	c.mu.Unlock()
	done.close()
}

// retire takes cn out of use and returns it if it is to be closed now, nil if
// its last call will do that. The mutex is held.
func (c *Client) retire(cn *conn) *conn {
	if cn == nil {
		return nil
	}
	if c.current == cn {
		c.current = nil
	}
	cn.retired = true
	if cn.calls > 0 {
		return nil
	}
	delete(c.open, cn)
	return cn
}

// dropBroken takes a connection out of use that did not carry a call. gRPC
// would keep it and answer with its last error while it backs off; the next
// call shall be an attempt of its own, on names resolved anew.
func (c *Client) dropBroken(ctx context.Context, cn *conn, err error) {
	code := status.Code(err)
	if ctx.Err() != nil || code != codes.Unavailable && code != codes.DeadlineExceeded {
		return
	}
	c.mu.Lock()
	c.retire(cn) // closed by release: the failed call still counts
	c.mu.Unlock()
}

// superseded tells whether the server may rightly have stopped to accept the
// identity of cn, because there is a newer one.
func (c *Client) superseded(cn *conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cn.identity != nil && (cn.identity != c.identity || c.attesting > 0 || c.unset)
}

// close closes the connection; nil is none. The error of a ClientConn is only
// ever that it is closed already.
func (cn *conn) close() {
	if cn != nil {
		_ = cn.cc.Close()
	}
}

// present makes config present the connection's identity, whatever
// authorities the server names: that list may lag behind.
func (cn *conn) present(config *tls.Config) error {
	if len(cn.identity.Chain) == 0 || cn.identity.Key == nil {
		return errors.New("no certificate or no key")
	}
	leaf, err := x509.ParseCertificate(cn.identity.Chain[0])
	if err != nil {
		return err
	}
	if cn.id, err = x509svid.IDFromCert(leaf); err != nil {
		return err
	}
	cert := &tls.Certificate{Certificate: cn.identity.Chain, PrivateKey: cn.identity.Key, Leaf: leaf}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	return nil
}

func sameChain(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}
