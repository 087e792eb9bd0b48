package proxy

import (
	"cmp"
	"container/list"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

// listener accepts connections on one socket.
type listener struct {
	name   string
	bind   string // as it stands in the configuration
	proxy  *Proxy
	meters meters
	socket net.Listener
	unlink os.FileInfo // the unix socket we made; nil where there is none
	from   *listener   // whose socket it takes over, while a plan is made

	cached   atomic.Pointer[session]
	refusals telemetry.LogLimit
	audits   telemetry.LogLimit // lines on what only an audit lets pass
	plains   telemetry.LogLimit // lines on plaintext
	shadows  telemetry.LogLimit // lines on rules in shadow

	plaintext sources
	shares    shares

	stop      chan struct{} // closed: accept no more
	stopOnce  sync.Once
	accepting sync.WaitGroup
	conns     sync.WaitGroup

	relet    chan struct{} // another lease is in force
	unwatch  chan struct{} // closed: the last connection has ended
	watching sync.WaitGroup

	active, accepted, refused, failed, wouldDeny atomic.Int64

	slots      gate // taken before a connection is served, given back at close
	handshakes gate // taken while a handshake computes

	mu              sync.Mutex // guards the following, and conn.silent
	silent          list.List  // of *conn, those whose client is waited for to prove itself, the longest first
	wanted          bool       // a place: the next one of those is to give up its own
	acceptProblem   string
	identityProblem string
}

func newListener(p *Proxy, s *settings) *listener {
	l := &listener{
		name: s.Name, bind: s.Bind, proxy: p, meters: p.instruments.of(s.Name),
		stop: make(chan struct{}), relet: make(chan struct{}, 1), unwatch: make(chan struct{}),
	}
	l.slots.resize(s.MaxConnections)
	l.handshakes.resize(s.MaxHandshakes)
	return l
}

// settings returns those in force. It is nil for a listener that is not, or
// no more; while one accepts, it is in force.
func (l *listener) settings() *settings { return l.proxy.world.Load().listeners[l] }

// session returns the TLS configuration for the identity as of now, or why
// there is none.
func (l *listener) session(s *settings) (*session, error) {
	id, err := s.lease.Current()
	if err != nil {
		return nil, err
	}
	trust := s.lease.Trust()
	if have := l.cached.Load(); have != nil && have.identity == id && have.trust == trust && have.settings == s {
		return have, nil
	}
	made := newSession(id, trust, s)
	l.cached.Store(made)
	return made, nil
}

// start accepts connections and follows the identity.
func (l *listener) start() {
	l.noticeLoss(l.settings())
	lease := l.settings().lease
	l.watching.Go(func() { l.watch(lease) })
	l.accepting.Go(l.accept)
}

// Accept errors that do not go away at once (EMFILE, ENFILE, ENOMEM) are
// waited out; what is accepted already goes on meanwhile.
const (
	minBackoff = 5 * time.Millisecond
	maxBackoff = time.Second
)

// accept accepts until stop is closed. Beyond the limit one client is held
// here, the others wait in the kernel's backlog and cost us nothing.
func (l *listener) accept() {
	backoff := minBackoff
	for {
		raw, err := l.socket.Accept()
		if err == nil {
			backoff = minBackoff
			l.setAcceptProblem("")
			l.takeSlot()
			l.admit(raw)
			continue
		}
		select {
		case <-l.stop:
			return
		default:
		}
		l.setAcceptProblem("accept: " + err.Error())
		if errors.Is(err, net.ErrClosed) {
			l.proxy.log.Error("listener is gone", "listener", l.name, "error", err)
			return
		}
		l.logRefusal("cannot accept connections", "error", err, "retry_in", backoff)
		select {
		case <-time.After(backoff):
			backoff = min(2*backoff, maxBackoff)
		case <-l.stop:
			return
		}
	}
}

// takeSlot waits for a slot for the client that was accepted. One that waits
// when the listener stops is served beyond the limit, like the others that
// came before that.
func (l *listener) takeSlot() {
	if !l.slots.try() {
		l.logRefusal("connection limit reached: clients that have not proved who they are go first, then further ones wait", "max_connections", l.settings().MaxConnections)
		l.makeRoom()
		if !l.slots.take(l.stop, nil, false) {
			l.slots.force()
		}
		l.want(false)
	}
	all := &l.proxy.slots
	if !all.try() {
		l.logRefusal("connection limit of all listeners reached: clients that have not proved who they are go first, then further ones wait", "proxy.max_connections", l.proxy.world.Load().most)
		l.proxy.makeRoom()
		if !all.take(l.stop, nil, false) {
			all.force()
		}
		l.proxy.want(false)
	}
}

func (l *listener) giveSlot() {
	l.proxy.slots.give()
	l.slots.give()
}

// admit registers an accepted connection and sends it on its way.
func (l *listener) admit(raw net.Conn) {
	down, ok := raw.(end)
	if !ok {
		l.logRefusal("cannot serve this kind of connection", "type", fmt.Sprintf("%T", raw))
		_ = raw.Close()
		l.giveSlot()
		return
	}
	s := l.settings()
	c := newConn(l, down, s)
	c.source, c.request.Source = sourceOf(raw)
	c.request.Listener, c.request.Direction = l.name, s.Direction
	if s.Direction == policy.Inbound { // outbound, attach knows
		c.request.Port = portOf(raw.LocalAddr())
	}
	l.accepted.Add(1)
	l.meters.active.Set(float64(l.active.Add(1)))
	l.waits(c, false)
	l.proxy.table.add(c, time.Time{})
	l.conns.Add(1)
	go c.serve() // finish gives back the slot and says Done
}

func (l *listener) handshaked(result string) {
	if result == "ok" {
		l.meters.handshakeOK.Inc()
		return
	}
	l.proxy.instruments.handshakes.With(l.name, result).Inc()
}

// recordEnd counts and records a connection that is over. What is quiet leaves no
// line in the log.
func (l *listener) recordEnd(record *telemetry.Access, result, target string, quiet bool) {
	l.countEnd(record, result)
	l.proxy.access.Write(record)
	if record.Outcome == "failure" && !quiet {
		what := "connection refused"
		switch result {
		case resultAllowed:
			what = "connection closed"
		case "failed": // by us or by the target, not by who called
			what = "connection failed"
		}
		l.logRefusal(what, "source", record.Source, "from", record.From, "to", record.To, "target", target, "reason", record.Reason)
	}
}

// countEnd counts a connection that is over.
func (l *listener) countEnd(record *telemetry.Access, result string) {
	l.meters.active.Set(float64(l.active.Add(-1)))
	if result == resultAllowed {
		l.meters.closed[record.Closed].Inc()
	} else {
		l.proxy.instruments.connections.With(l.name, result).Inc()
		if result == "failed" { // nobody refused who called
			l.failed.Add(1)
		} else {
			l.refused.Add(1)
		}
	}
}

// changed does what is to be done once other settings are in force.
func (l *listener) changed(was, s *settings) {
	l.slots.resize(s.MaxConnections)
	l.handshakes.resize(s.MaxHandshakes)
	l.noticeLoss(s)
	if l.unlink != nil && was.UnixMode != s.UnixMode {
		if err := os.Chmod(strings.TrimPrefix(l.bind, unixPrefix), s.UnixMode.Perm()); err != nil {
			l.proxy.log.Error("cannot change the mode of a socket: it keeps the old one", "listener", l.name, "error", err)
		}
	}
	if was.upstreamChanged(s) {
		was.giveWays()
	}
	if was.lease == s.lease {
		return
	}
	was.lease.Close()
	select {
	case l.relet <- struct{}{}:
	default:
	}
}

// watch follows the identity and the bundles, beginning with those of lease: every change asks the
// listener's connections again, because their peers may no longer stand.
func (l *listener) watch(lease identity.Lease) {
	var last, was *identity.Identity // the last there was, and nil while there is none
	var trust *identity.Trust
	var known uint64                  // the generation of JWT bundles
	timer := time.NewTimer(time.Hour) // for the SVID's end
	defer timer.Stop()
	for {
		if s := l.settings(); s != nil { // else it was removed, and the last lease goes on
			lease = s.lease
		}
		changed := lease.Changed()
		id, err := lease.Current()
		bundles := lease.Trust()
		tokens := l.settings().generationOfTokens()
		news := trust != nil && (id != was || bundles != trust || tokens != known)
		was, trust, known = id, bundles, tokens
		l.noteIdentity(id, err, last)
		if id != nil {
			l.proxy.noteDomains(id, bundles)
		}
		if news {
			l.forgetBackends()
			n := l.proxy.ask(l.proxy.table.of(l))
			l.proxy.log.Debug("identity, bundles or CRLs changed", "listener", l.name, "trust_generation", bundles.Generation(), "connections_asked", n.all, "connections_closed", n.closed)
		}
		wait := time.Hour
		if id != nil {
			last = id
			wait = time.Until(id.NotAfter()) + time.Millisecond
		}
		timer.Reset(wait)
		select {
		case <-changed:
		case <-timer.C:
		case <-l.relet:
		case <-l.unwatch:
			return
		}
	}
}

// forgetBackends closes the idle connections that were made as somebody else, or
// to whom nobody believes in any more.
func (l *listener) forgetBackends() {
	s := l.settings()
	if s == nil || s.HTTP == nil || s.Direction != policy.Outbound {
		return
	}
	now, err := l.session(s)
	if err != nil {
		now = nil // none is kept
	}
	for i := range s.ways {
		s.ways[i].group.Forget(now)
	}
}

// noteIdentity tells the log, the metrics and the status what is presented.
func (l *listener) noteIdentity(id *identity.Identity, err error, last *identity.Identity) {
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	l.mu.Lock()
	news := l.identityProblem != problem
	l.identityProblem = problem
	l.mu.Unlock()
	switch {
	case err != nil && news && last == nil:
		l.proxy.log.Info("listener waits for an identity and refuses connections until then", "listener", l.name, "reason", problem)
	case err != nil && news:
		l.proxy.log.Warn("listener has no identity: it refuses new connections", "listener", l.name, "reason", problem)
	case err == nil && (news || last == nil || last.ID != id.ID):
		l.proxy.log.Info("listener presents", "listener", l.name, "spiffe_id", id.ID, "not_after", id.NotAfter().UTC())
	case err == nil && id != last:
		l.proxy.log.Debug("listener presents a renewed SVID", "listener", l.name, "spiffe_id", id.ID, "not_after", id.NotAfter().UTC())
	}
	if err == nil {
		l.meters.expiry.SetTime(id.NotAfter())
	}
}

func (l *listener) setAcceptProblem(problem string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acceptProblem = problem
}

// pauseAccepting ends the accept loop and leaves the socket open. Clients
// that connect meanwhile wait in the backlog.
func (l *listener) pauseAccepting() {
	l.stopOnce.Do(func() { close(l.stop) })
	if d, ok := l.socket.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(time.Unix(1, 0)) // fails only when it is closed already
	} else {
		_ = l.socket.Close()
	}
	l.accepting.Wait()
}

func (l *listener) stopAccepting() {
	l.pauseAccepting()
	l.closeSocket()
}

// retire lets the connections of a listener that accepts no more end, ends
// those that do not, and waits for all. s are its last settings.
func (l *listener) retire(s *settings, why string) {
	until := time.Now().Add(s.Timeouts.Drain)
	for _, c := range l.proxy.table.of(l) {
		c.endBy(endDrain, until, closing{"drain", why})
	}
	l.conns.Wait()
	close(l.unwatch)
	l.watching.Wait()
	s.give()
	l.proxy.mu.Lock()
	defer l.proxy.mu.Unlock()
	if l.proxy.world.Load().named(l.name) == nil {
		l.proxy.instruments.forget(l.name)
	}
}

// status describes the listener and its oldest connections.
func (l *listener) status(s *settings) telemetry.ListenerStatus {
	out := telemetry.ListenerStatus{
		Name: l.name, Direction: s.Direction.String(), Bind: s.Bind, Targets: s.everyTarget(),
		Active: int(l.active.Load()), Accepted: uint64(l.accepted.Load()), Refused: uint64(l.refused.Load()), Failed: uint64(l.failed.Load()),
	}
	out.Enforcement, out.WouldDeny = s.Enforcement.String(), uint64(l.wouldDeny.Load())
	if s.Direction == policy.Inbound {
		out.Mode = s.Mode.String()
		out.Unauthenticated, out.Sources = l.plaintext.top()
	}
	id, err := s.lease.Current()
	if err != nil {
		out.Problem = err.Error()
	} else {
		out.SPIFFEID, out.ExpiresAt = id.ID.String(), id.NotAfter()
	}
	l.mu.Lock()
	out.Problem = cmp.Or(l.acceptProblem, out.Problem)
	l.mu.Unlock()
	if l.proxy.Draining() {
		out.Problem = "draining"
	}
	out.Routes = s.routeStatus()
	out.Endpoints, out.EndpointsMore = s.endpoints()
	conns := l.proxy.table.of(l)
	slices.SortFunc(conns, func(a, b *conn) int { return a.start.Compare(b.start) })
	for _, c := range conns {
		if len(out.Connections) == maxStatusConnections {
			out.Truncated = true
			break
		}
		if cs, ok := c.status(); ok {
			out.Connections = append(out.Connections, cs)
		}
	}
	return out
}
