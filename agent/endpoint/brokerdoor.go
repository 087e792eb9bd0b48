package endpoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// Bounds on those of whom nothing is proven yet. One address or user cannot keep
// brokers out, whatever it does.
const (
	brokerHandshake    = 5 * time.Second
	maxHandshakes      = 256 // at a time
	maxHandshakesOfOne = 16  // of one address or user
)

// door lets brokers in by mutual TLS (SPIFFE Broker Endpoint §5), and out again
// once what let them in does not hold any more: their SVID has ended, or the
// trust bundle has no authority for it.
type door struct {
	agent       BrokerAgent
	trustDomain spiffeid.TrustDomain
	brokers     map[spiffeid.ID]permissions
	local       bool // the socket is a Unix socket
	server      *Server
	watch       *registry.Watch // of the trust bundle; its selectors match nobody

	mu         sync.Mutex               // guards the following
	bundle     *registry.Bundle         // nil until keep has seen one
	inside     map[*brokerConn]struct{} // connections whose broker is known
	handshakes map[string]int           // those under way, by where they are from
	underway   int                      // all of them
}

// permissions says by which types of reference a broker may name workloads, and
// of each whether over TCP too.
type permissions map[string]bool

func newDoor(cfg *BrokerConfig) (*door, error) {
	d := &door{
		agent: cfg.Agent, trustDomain: cfg.TrustDomain, brokers: map[spiffeid.ID]permissions{},
		inside: map[*brokerConn]struct{}{}, handshakes: map[string]int{},
	}
	for _, b := range cfg.Brokers {
		if !b.ID.MemberOf(cfg.TrustDomain) {
			return nil, fmt.Errorf("listen for brokers: %s is not of trust domain %s", b.ID, cfg.TrustDomain)
		}
		may := permissions{}
		for _, r := range b.References {
			may[r.TypeURL] = r.OverTCP
		}
		d.brokers[b.ID] = may
	}
	if len(d.brokers) == 0 {
		return nil, errors.New("listen for brokers: nobody is one")
	}
	return d, nil
}

// open makes it the door of s. It is followed by close.
func (d *door) open(s *Server) {
	d.server = s
	d.watch = d.agent.Watch(nil)
	d.watch.Early()
}

func (d *door) close() { d.watch.Close() }

// keep looks after connections until close. wait returns when it has ended.
func (d *door) keep() (wait func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for d.look() {
		}
	}()
	return func() { <-done }
}

// look waits until the trust bundle is another one, somebody came in or the time
// of somebody is up, and closes the connections that do not stand any more. It
// returns false after close.
func (d *door) look() bool {
	ctx := context.Background()
	if until := d.soonest(time.Now()); !until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	view, err := d.watch.Next(ctx)
	if errors.Is(err, registry.ErrClosed) {
		return false
	}
	for c, reason := range d.fallen(view) {
		d.server.log.Info("broker's connection closed", "broker", c.id.String(), "reason", reason)
		c.cut()
	}
	return true
}

// soonest returns when the next certificate of somebody inside ends, zero where
// there is nobody.
func (d *door) soonest(now time.Time) (at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.inside {
		for _, cert := range c.chain {
			ended := cert.NotAfter.Add(time.Millisecond) // at NotAfter it is good still
			if ended.After(now) && (at.IsZero() || ended.Before(at)) {
				at = ended
			}
		}
	}
	return at
}

// fallen returns the connections that do not stand, with the reasons. view may be
// nil: the bundle is the one before.
func (d *door) fallen(view *registry.View) map[*brokerConn]error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if view != nil && view.Bundle != nil {
		d.bundle = view.Bundle
	}
	fallen := map[*brokerConn]error{}
	for c := range maps.Keys(d.inside) {
		if err := d.verified(c.chain); err != nil {
			fallen[c] = err
		}
	}
	return fallen
}

// config is the server's end of a handshake.
func (d *door) config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2"},
		ClientAuth: tls.RequireAnyClientCert, // VerifyConnection verifies it
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return d.agent.Certificate()
		},
		VerifyConnection: func(cs tls.ConnectionState) error { return d.verify(cs.PeerCertificates) },
		// Every connection is verified against the bundle of its day.
		SessionTicketsDisabled: true,
	}
}

func (d *door) verify(chain []*x509.Certificate) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.verified(chain)
}

// verified checks an X.509-SVID (SPIFFE X509-SVID §5) against the authorities of
// the agent's trust domain. It is called with d.mu held.
func (d *door) verified(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the broker presented no certificate")
	}
	id, err := x509svid.IDFromCert(chain[0])
	switch {
	case err != nil:
		return fmt.Errorf("the broker's certificate is no X.509-SVID: %w", err)
	case !id.MemberOf(d.trustDomain):
		return fmt.Errorf("%.255s is of another trust domain than the agent: brokers are of %s", id, d.trustDomain)
	case d.bundle == nil || len(d.bundle.X509) == 0:
		return errors.New("the agent has no bundle of its trust domain yet")
	}
	if _, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(d.trustDomain, d.bundle.X509)); err != nil {
		return fmt.Errorf("verify the SVID of %s: %w", id, err)
	}
	return nil
}

// brokerConn is a connection of which it is known whose it is.
type brokerConn struct {
	conn
	door  *door
	id    spiffeid.ID
	chain []*x509.Certificate
	may   permissions
	// pids tells whether a PID means the same to the broker as to the agent.
	pids bool
}

// AuthType implements credentials.AuthInfo.
func (*brokerConn) AuthType() string { return "mutual-tls" }

// Close closes the connection and lets the broker go.
func (c *brokerConn) Close() error {
	c.door.mu.Lock()
	delete(c.door.inside, c)
	c.door.mu.Unlock()
	return c.conn.Close()
}

// cut closes the connection without a word, for which Close could wait where the
// broker does not read.
func (c *brokerConn) cut() {
	_ = c.Conn.(*tls.Conn).NetConn().Close()
	_ = c.Close()
}

// sealed is a brokerConn as gRPC reads and writes it: what is beneath TLS is none
// of its business (see conn.ReadOnReady).
type sealed struct{ net.Conn }

// brokerOf returns the connection of the broker who calls.
func brokerOf(ctx context.Context) *brokerConn {
	p, _ := peer.FromContext(ctx)
	return p.AuthInfo.(*brokerConn) // all connections came in by the door
}

// admit proves who is at the other end of a connection. After an error its caller
// closes raw.
func (d *door) admit(raw net.Conn) (*brokerConn, error) {
	from, pids, err := d.origin(raw)
	if err != nil {
		return nil, err
	}
	if !d.enter(from) {
		return nil, fmt.Errorf("as many brokers' handshakes are under way as may be, or as one may have: %s", from)
	}
	defer d.leave(from)
	ctx, cancel := context.WithTimeout(d.server.stop, brokerHandshake)
	defer cancel()
	secure := tls.Server(raw, d.config())
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("handshake with a broker from %s: %w", from, err)
	}
	state := secure.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		return nil, fmt.Errorf("handshake with a broker from %s: it does not ask for HTTP/2 (ALPN h2)", from)
	}
	id, err := x509svid.IDFromCert(state.PeerCertificates[0])
	if err != nil {
		return nil, err // verified has found one
	}
	c := &brokerConn{
		conn: conn{Conn: secure, limits: d.server.limits}, door: d,
		id: id, chain: state.PeerCertificates, may: d.brokers[id], pids: pids,
	}
	return c, d.count(c)
}

// count counts the connection against the limits of its broker, and looks after
// it from now on.
func (d *door) count(c *brokerConn) error {
	var ok bool
	if c.may == nil {
		c.refusal = status.Errorf(codes.PermissionDenied, "%s is no broker: it is not among agent.broker.brokers", c.id)
		d.server.complain("not a broker", "spiffe_id", c.id.String(), "hint", "add it to agent.broker.brokers if it may have the identities of others")
		ok = c.limits.refuse()
	} else {
		c.user, c.refusal, ok = c.limits.connect(origin{broker: c.id.String()}, time.Now())
	}
	if !ok {
		return errors.Join(errors.New("too many connections are open"), c.refusal)
	}
	c.counted = true
	if c.refusal != nil {
		time.AfterFunc(refusedTime, func() { _ = c.Close() })
	}
	// First it is among those that keep looks after, then it is looked at: the
	// bundle may be another one since the handshake.
	d.mu.Lock()
	d.inside[c] = struct{}{}
	err := d.verified(c.chain)
	d.mu.Unlock()
	if err != nil {
		return errors.Join(err, c.Close())
	}
	d.watch.Interrupt() // its end may be the soonest
	return nil
}

// enter counts a handshake from somewhere, unless there are too many. It is
// followed by leave where it returns true.
func (d *door) enter(from string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.underway >= maxHandshakes || d.handshakes[from] >= maxHandshakesOfOne {
		return false
	}
	d.underway++
	d.handshakes[from]++
	return true
}

func (d *door) leave(from string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.underway--
	if d.handshakes[from]--; d.handshakes[from] == 0 {
		delete(d.handshakes, from)
	}
}

// origin tells where a connection is from, before anything is proven: its user,
// or its address, of IPv6 the /64 of it. pids tells whether a PID that comes from
// there means the process that has it here.
func (d *door) origin(raw net.Conn) (from string, pids bool, err error) {
	u, ok := raw.(*net.UnixConn)
	if !ok {
		addr, err := netip.ParseAddrPort(raw.RemoteAddr().String())
		if err != nil {
			return "", false, err
		}
		ip := addr.Addr().Unmap().WithZone("")
		if ip.Is6() {
			prefix, _ := ip.Prefix(64)
			return prefix.String(), false, nil
		}
		return ip.String(), false, nil
	}
	p, err := attestor.PeerOf(u)
	if errors.Is(err, attestor.ErrPIDNamespace) {
		return "a PID namespace that is hidden from the agent", false, nil
	}
	if err != nil {
		return "", false, err
	}
	defer p.Close()
	nested, err := p.Nested()
	return fmt.Sprintf("uid %d", p.UID), err == nil && !nested, nil
}

// brokerCredentials has gRPC ask the door.
type brokerCredentials struct{ door *door }

// ServerHandshake lets a broker in.
func (b brokerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, err := b.door.admit(raw)
	if err != nil {
		b.door.server.complain("connection closed", "error", err)
		return nil, nil, err // gRPC closes raw
	}
	return sealed{c}, c, nil
}

// ClientHandshake is refused: these are a server's credentials.
func (brokerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("credentials for brokers are a server's")
}

// Info implements credentials.TransportCredentials.
func (brokerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (b brokerCredentials) Clone() credentials.TransportCredentials { return b }

// OverrideServerName implements credentials.TransportCredentials.
func (brokerCredentials) OverrideServerName(string) error {
	return errors.New("credentials for brokers have no server name")
}

// credentials are those by which callers of s are known.
func (s *Server) credentials() credentials.TransportCredentials {
	if s.door != nil {
		return brokerCredentials{s.door}
	}
	return peerCredentials{s}
}
