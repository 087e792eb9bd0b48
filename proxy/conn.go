package proxy

import (
	"cmp"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/proxyproto"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// conn is one accepted connection. Its own goroutine walks it from accept to
// close in serve; what others may do to it meanwhile (ask it again, end it)
// is in live.go.
type conn struct {
	l      *listener
	down   end // as accepted, without TLS
	source string
	start  time.Time

	header *proxyproto.Header // what a proxy before us said; nil where none had to
	via    string             // that proxy's own address
	chosen upstream.Chosen    // belongs to serve
	lent   loan               // of a request that changed the protocol

	in, out atomic.Uint64 // bytes from source to target, and back

	record  telemetry.Access // belongs to serve, then to finish
	streams [2]*sleeper      // set before phase becomes copying; of a client of an HTTP listener only one
	live    atomic.Int32     // streams that have not ended

	counted bool          // in listener.shares
	silent  *list.Element // in listener.silent; guarded by listener.mu

	due   time.Time // guarded by table.mu
	index int       // guarded by table.mu

	mu      sync.Mutex // guards the following
	phase   phase
	latest  *settings // the last in force that it knew of
	closing *closing  // why it was ended by us or broke off; set once
	orderly bool      // it was not broken off: who ends it closes both ends
	http    requests  // it carries; nil where it has none, or no more

	question                 // what the policy is asked about it, and about its request
	protocol string          // the ALPN protocol that was negotiated
	counter  decisionCounter // of the last decision
	metered  bool            // it passed its limits
	stakes   []stake         // in those of them that count live connections

	drainedAt time.Time // when it was told to end with the next answer; of HTTP
	moved     time.Time // when bytes were last seen to have moved
	movedSum  uint64
	firstDone side // the one that was the first to be done
	unread    bool // the target took no more of what the client sends
}

// loan is what of a target is given back with the connection.
type loan interface{ Close() }

// phase is how far a connection has come.
type phase int

const (
	opening phase = iota // nobody known yet: it has not been asked
	decided              // the peer is known: every change asks it again
	copying
	finished // nobody asks it any more
)

// newConn returns a connection that was accepted under s.
func newConn(l *listener, down end, s *settings) *conn {
	c := &conn{l: l, down: down, start: time.Now(), latest: s}
	c.c, c.began = c, s
	return c
}

// closing is why a connection ended: one of telemetry.CloseReasons, and the
// same for a person.
type closing struct {
	reason, why string
}

// refusal is the error of a connection that never came to copying.
type refusal struct {
	result string // of narthex_connections_total
	why    string
}

func (r *refusal) Error() string { return r.why }

func refuse(result, format string, args ...any) error {
	return &refusal{result, fmt.Sprintf(format, args...)}
}

// serve walks the connection from accept to where its bytes flow. From there
// on its streams carry it, and the last one to end finishes it.
func (c *conn) serve() {
	err := c.readHeader()
	switch {
	case err != nil:
	case c.began.Direction == policy.Inbound:
		err = c.serveInbound(&c.record)
	default:
		err = c.serveOutbound(&c.record)
	}
	if err != errCarried { //nolint:errorlint // it is never wrapped
		c.l.heard(c) // it may have ended before its client had said anything
		c.finish(&c.record, err)
	}
}

// errCarried is what became of a connection that its streams carry.
var errCarried = errors.New("carried by its streams")

// serveInbound: the peer proves who it is, the policy decides, and only then
// the target hears of it. It is dialled under the settings the handshake
// began with, and decide sees to it that they are those it decided on.
func (c *conn) serveInbound(record *telemetry.Access) error {
	plaintext, err := c.hear()
	if err != nil {
		return err
	}
	s := c.began
	session, err := c.l.session(s)
	if err != nil {
		return refuse("failed", "cannot present an identity: %v", err)
	}
	down := c.down
	if plaintext {
		c.identifyPlaintext(session)
	} else {
		t := secure(c.down, tls.Server, session.config)
		if err := c.handshake(t, s, record, nil); err != nil {
			c.notePeer(session, err)
			return err
		}
		if err := c.identify(session, t, record.ServerName); err != nil {
			return err
		}
		down = t
	}
	if err := c.admit(); err != nil {
		return err
	}
	if s.HTTP != nil {
		return c.serveHTTP(down)
	}
	up, err := c.dial(s, record)
	if err != nil {
		return err
	}
	if err := c.announce(up, s, down); err != nil {
		return err
	}
	return c.relay(down, up)
}

// admit takes the connection's share of its peer's, and asks the policy and
// its limits.
func (c *conn) admit() error {
	if err := c.takeShare(); err != nil {
		return err
	}
	return c.decide()
}

// serveOutbound: we prove who we are, the peer proves that it is whom the
// listener expects, the policy decides, and only then a byte of the caller
// leaves.
func (c *conn) serveOutbound(record *telemetry.Access) error {
	s := c.began
	if s.HTTP != nil {
		return c.serveHTTP(c.down)
	}
	session, err := c.l.session(s)
	if err != nil {
		return refuse("failed", "cannot present an identity: %v", err)
	}
	raw, err := c.dial(s, record)
	if err != nil {
		return err
	}
	if err := c.announce(raw, s, c.down); err != nil {
		return err
	}
	config := session.toward(c.target)
	up := secure(raw, tls.Client, config)
	if err := c.handshake(up, s, record, nil); err != nil {
		c.blame(err)
		c.notePeer(session, err)
		return err
	}
	c.chosen.Succeeded()
	record.ServerName = config.ServerName
	if err := c.identify(session, up, record.ServerName); err != nil {
		return err
	}
	if err := c.admit(); err != nil {
		return err
	}
	return c.relay(c.down, up)
}

// handshake runs the TLS handshake. The table ends it when it takes too
// long; how many compute at once is bounded for each listener. A handshake with
// a service, for a request, is one of its waits, and the client's connection
// goes on.
func (q *question) handshake(t *secured, s *settings, record *telemetry.Access, waits *waits) error {
	c := q.c
	if waits == nil {
		c.endBy(endHandshake, time.Now().Add(s.Timeouts.Handshake), closing{"error", fmt.Sprintf("the handshake took longer than %s", s.Timeouts.Handshake)})
	} else {
		waits.expectOf(serviceSends, s.Timeouts.Handshake)
		c.hasten(time.Now().Add(s.Timeouts.Handshake))
		defer waits.forget(serviceSends)
	}
	begin := time.Now()
	late, err := c.inTurn(t, s.Timeouts.Handshake)
	cs := t.ConnectionState()
	record.TLSVersion, record.Cipher = versionName(cs.Version), cipherName(cs.CipherSuite)
	record.ServerName, record.Protocol = hostName(cs.ServerName), cs.NegotiatedProtocol
	if err != nil {
		if errors.Is(err, errNoTurn) {
			c.l.handshaked("timeout")
			return refuse("refused", "%s: no turn within %s, with %d that compute at a time", errNoTurn, s.Timeouts.Handshake, s.MaxHandshakes)
		}
		if ended := q.ended(); ended != nil {
			c.l.handshaked("timeout")
			if ended.reason == "error" { // it was slow
				return &handshakeError{refusal: refusal{"refused", ended.why}, err: err, late: late}
			}
			return refuse("refused", "%s", ended.why)
		}
		result, why := explainHandshake(err, s.Direction)
		if result == "no_protocol" && s.HTTP != nil {
			why = strings.ReplaceAll(why, "add it to `alpn`, of the listener or a route", "this listener serves "+strings.Join(s.ALPN, ", ")+" (`alpn`, or else `http.versions`); one with protocol: tcp carries others")
		}
		c.l.handshaked(result)
		closed := result == "closed"
		return &handshakeError{refusal{"refused", why}, err, closed && s.Direction == policy.Inbound, closed && late}
	}
	c.l.meters.handshake.Since(begin)
	c.l.handshaked("ok")
	return nil
}

// handshakeError is a refusal that keeps the handshake's error for who the peer
// was.
type handshakeError struct {
	refusal
	err  error
	left bool // the peer just went away, as health probes of a TCP port do
	late bool // the peer went away, or was not done in time, when it had waited for us
}

func (r *handshakeError) Unwrap() error { return r.err }

// dial connects to an endpoint of those the listener or its route has.
func (c *conn) dial(s *settings, record *telemetry.Access) (end, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if !c.dialling(cancel) {
		return nil, c.killedBefore()
	}
	way := s.wayFor(c.bound())
	if way == nil {
		return nil, refuse("refused", "no route for server name %q and protocol %q, and the listener has no target of its own", record.ServerName, c.protocol)
	}
	if len(way.targets) == 1 {
		record.Destination = way.targets[0]
	}
	var err error
	if c.chosen, err = way.group.DialFrom(ctx, s.Timeouts.Connect, c.l.socket.Addr()); err != nil {
		if c.ended() != nil {
			return nil, c.killedBefore()
		}
		return nil, refuse("failed", "target: %v", err)
	}
	raw, target := c.chosen.Conn, c.chosen.Target
	record.Destination = c.chosen.Address
	if s.Direction == policy.Inbound { // outbound, once it has proved who it is
		c.chosen.Succeeded()
	}
	up, ok := raw.(end)
	if !ok {
		_ = raw.Close()
		return nil, refuse("failed", "target %s: %T cannot be half-closed", target, raw)
	}
	if !c.attach(raw, target) {
		return nil, c.killedBefore()
	}
	return up, nil
}

// blame tells the group that the endpoint failed the handshake. What we ended
// ourselves for another cause than its slowness, had no turn for, or came late
// to because there was none, is not its doing. The error may quote what the
// endpoint sent.
func (c *conn) blame(err error) {
	var failed *handshakeError
	if errors.As(err, &failed) && !failed.late {
		c.chosen.Failed(errors.New(telemetry.Tidy(err.Error())))
	}
}

func (c *conn) killedBefore() error {
	ended := c.ended()
	if ended.reason == "policy" || ended.reason == "revoked" {
		return refuse("denied", "%s", ended.why)
	}
	return refuse("refused", "%s", ended.why)
}

// relay copies both ways until both have ended, or, when that is to be later,
// until this goroutine is needed no more; then it returns errCarried.
func (c *conn) relay(down, up end) error {
	forth := c.stream(client, inletOf(down), up, flow{&c.in, c.l.meters.bytesIn})
	back := c.stream(target, inletOf(up), down, flow{&c.out, c.l.meters.bytesOut})
	if !c.startCopying(forth, back) {
		return c.killedBefore()
	}
	go back.run()
	forth.run()
	return errCarried
}

func (c *conn) stream(from side, src inlet, dst sink, n flow) *stream {
	s := &stream{sleeper: sleeper{c: c, src: src, bytes: n.conn}, from: from, dst: dst, flow: n}
	s.work = s
	return s
}

func inletOf(src end) inlet {
	if t, ok := src.(*secured); ok {
		return t
	}
	return newBare(src)
}

// side names an end for a person.
type side string

const (
	client side = "client"
	target side = "target"
)

// copied notes how the direction from one side to dst ended, and tells dst: a
// stream that was finished is half-closed, and what dst still has to say
// keeps flowing the other way; one that broke off must not look finished.
func (c *conn) copied(from side, dst sink, how copied, err error) {
	c.mu.Lock()
	if how == copyRefused {
		// dst is gone. What it sent before still comes, then the other
		// direction ends.
		c.unread = c.unread || from == client
		from = map[side]side{client: target, target: client}[from]
	}
	if c.firstDone == "" {
		c.firstDone = from
	}
	if how == copyBroken {
		why := closing{"peer", string(from) + ": " + explainBroken(err)}
		if from == target && c.out.Load() == 0 {
			switch {
			case refusesUs(err):
				why = closing{"error", "the target ended the handshake: " + explainAlert(err)}
			case c.wordless(err):
				why = closing{"error", "the far end closed without a word right after the handshake: its rules most likely refuse this caller; see its log"}
			}
		}
		c.breakOff(from, why)
	}
	c.mu.Unlock()
	if how == copyEnded {
		// An error means that dst is gone too, which the copy that reads
		// from it finds out and reports.
		_ = dst.CloseWrite()
	}
}

// wordlessWithin is how long after its accept a connection that the far end
// closes without a word is taken for one that it refused.
const wordlessWithin = 10 * time.Second

// wordless reports whether err, with which a far end that has sent no byte broke
// off, looks like a refusal: a server asks its rules once the handshake is over,
// and TLS has no alert for what they say that a client would wait for.
func (c *conn) wordless(err error) bool {
	return c.began.Direction == policy.Outbound && (errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)) && time.Since(c.start) < wordlessWithin
}

// streamEnded finishes the connection when both of its streams have ended.
func (c *conn) streamEnded() {
	if c.live.Add(-1) == 0 {
		c.finish(&c.record, nil)
	}
}

// finish closes what is open, takes the connection out of the table and
// leaves one access record.
func (c *conn) finish(record *telemetry.Access, err error) {
	c.l.proxy.table.remove(c)
	c.closeEnds(err)
	c.giveShare()
	c.chosen.Close()
	if c.lent != nil {
		c.lent.Close()
	}
	c.mu.Lock()
	c.giveLimits()
	c.fill(record)
	c.phase = finished
	quiet := c.http != nil && c.http.answered() > 0
	target := cmp.Or(c.target, strings.Join(c.began.targetsFor(c.bound()), ", "))
	ended := closing{reason: "peer"}
	if c.closing != nil {
		ended = *c.closing
	} else if c.firstDone != "" {
		ended.why = "ended by the " + string(c.firstDone)
	}
	c.mu.Unlock()

	var r *refusal
	var hr *handshakeError
	result := resultAllowed
	switch {
	case errors.As(err, &hr):
		result, ended = hr.result, closing{why: hr.why}
	case errors.As(err, &r):
		result, ended = r.result, closing{why: r.why}
	}
	record.Reason, record.Closed = telemetry.Tidy(ended.why), ended.reason
	record.Outcome = "success"
	if err != nil || ended.reason == "policy" || ended.reason == "revoked" || ended.reason == "error" {
		record.Outcome = "failure"
	}
	if quiet && (ended.reason == "peer" || ended.reason == "drain") { // its requests were recorded
		c.l.countEnd(record, result)
	} else {
		c.l.recordEnd(record, result, target, hr != nil && hr.left)
	}
	c.l.giveSlot()
	c.l.conns.Done()
}

// fill copies what is known into the access record, with c.mu held.
func (c *conn) fill(record *telemetry.Access) {
	now := time.Now()
	record.Time, record.Duration, record.Action = now, now.Sub(c.start), "connection"
	record.Listener, record.Direction = c.l.name, c.request.Direction.String()
	record.Source, record.Via, record.Port = c.source, c.via, c.request.Port
	record.BytesIn, record.BytesOut = c.in.Load(), c.out.Load()
	record.From, record.To = peerName(&c.request.From), peerName(&c.request.To)
	record.Plaintext = c.inPlaintext()
	record.Serial = c.peer().Serial
	if c.phase != opening {
		record.Decision, record.WouldDeny = string(c.outcome), telemetry.Tidy(c.would)
		record.Rule, record.Generation = c.decision.Rule, c.decision.Generation
		record.Shadow = slices.Clone(c.decision.Shadow)
	}
}

// closeEnds closes both ends. A refused client is given time to read the TLS
// alert, and one whose target took no more the target's last words, which a
// reset would take from it; one that is refused in plaintext sees a reset,
// because an orderly end would look like an empty answer.
func (c *conn) closeEnds(err error) {
	c.mu.Lock()
	up, killed, unread := c.up, c.closing != nil && !c.orderly, c.unread
	if c.http != nil && !killed && !unread {
		_ = c.http.says().CloseWrite() // fails where the client is gone
	}
	alerted := c.request.Direction == policy.Inbound && !c.inPlaintext()
	c.mu.Unlock()
	switch {
	case killed:
		return
	case unread && c.http != nil:
		lingerClose(c.http.says(), c.down, lingerHTTP)
	case unread || (err != nil && alerted):
		lingerClose(c.down, c.down, linger)
	case err != nil:
		abort(c.down)
	default:
		_ = c.down.Close()
	}
	if up != nil {
		_ = up.Close()
	}
}

// lingering bounds how long, and how many bytes, a client may still send before
// its connection is closed.
type lingering struct {
	time  time.Duration
	bytes int
}

// A refused client is to read an alert, one of HTTP an answer, while it may be
// in the midst of a body.
var (
	linger     = lingering{250 * time.Millisecond, 64 << 10}
	lingerHTTP = lingering{2 * time.Second, 4 << 20}
)

// lingerClose says over TLS and TCP that no more will come, and reads what the peer sends for
// a moment: closing with unread bytes would be a reset, which can overtake
// the alert.
func lingerClose(says, c end, most lingering) {
	defer func() { _ = c.Close() }()
	if says.CloseWrite() != nil || c.CloseWrite() != nil || c.SetReadDeadline(time.Now().Add(most.time)) != nil {
		return
	}
	buf := takeBuffer(0)
	defer bufferPools[0].Put(buf)
	for read := 0; read < most.bytes; {
		n, err := c.Read(*buf)
		if err != nil {
			return
		}
		read += n
	}
}

// portOf returns the port of a TCP address, and 0 of any other.
func portOf(a net.Addr) uint16 {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return uint16(tcp.Port)
	}
	return 0
}

// sourceOf names the accepted connection's far end for the log and for the
// policy.
func sourceOf(c net.Conn) (string, netip.AddrPort) {
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		ap := tcp.AddrPort()
		ap = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		return ap.String(), ap
	}
	if u, ok := c.LocalAddr().(*net.UnixAddr); ok {
		return unixPrefix + u.Name, netip.AddrPort{}
	}
	return "", netip.AddrPort{}
}
