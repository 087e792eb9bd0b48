package proxy

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

const unixPrefix = "unix:"

// maxUnixPath is the longest path a unix socket can have: sockaddr_un holds
// 108 bytes, the last of them zero (unix(7)).
const maxUnixPath = 107

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
	refusals logLimit
	audits   logLimit // lines on what only an audit lets pass
	plains   logLimit // lines on plaintext

	plaintext sources
	shares    shares

	stop      chan struct{} // closed: accept no more
	stopOnce  sync.Once
	accepting sync.WaitGroup
	conns     sync.WaitGroup

	relet    chan struct{} // another lease is in force
	unwatch  chan struct{} // closed: the last connection has ended
	watching sync.WaitGroup

	active, accepted, refused, wouldDeny atomic.Int64

	slots      gate // taken before a connection is served, given back at close
	handshakes gate // taken while a handshake computes

	mu              sync.Mutex // guards the following, and conn.silent
	silent          list.List  // of *conn, those whose client is waited for to prove itself, the longest first
	wanted          bool       // a place: the next one of those is to give up its own
	acceptProblem   string
	identityProblem string
}

// settings is a listener's configuration with its defaults filled in, as it
// stands in a world. It is immutable.
type settings struct {
	Listener
	lease identity.Lease // on Identity
	ways  []way          // of Routes, then of Targets
}

// Defaults of Listener and Timeouts.
const (
	defaultHandshake      = 10 * time.Second
	defaultConnect        = 5 * time.Second
	defaultIdle           = 5 * time.Minute
	defaultDrain          = 30 * time.Second
	defaultMaxConnections = 10_000
	defaultUnixMode       = 0o660
)

// newSettings fills in the defaults, and the lease and ways that were had.
func newSettings(l Listener, was *settings) *settings {
	t := &l.Timeouts
	t.Handshake = cmp.Or(t.Handshake, defaultHandshake)
	t.Connect = cmp.Or(t.Connect, defaultConnect)
	t.Idle = cmp.Or(t.Idle, defaultIdle)
	t.Drain = max(0, cmp.Or(t.Drain, defaultDrain))
	l.OnPolicyChange = cmp.Or(l.OnPolicyChange, ActionClose)
	l.OnPeerExpiry = cmp.Or(l.OnPeerExpiry, ActionKeep)
	l.MaxConnections = cmp.Or(l.MaxConnections, defaultMaxConnections)
	l.MaxHandshakes = cmp.Or(l.MaxHandshakes, defaultMaxHandshakes())
	l.UnixMode = cmp.Or(l.UnixMode, defaultUnixMode)
	l.Expect, l.Targets = slices.Clone(l.Expect), slices.Clone(l.Targets)
	l.ProxyProtocol.AcceptFrom = slices.Clone(l.ProxyProtocol.AcceptFrom)
	l.Routes, l.ALPN, l.ServerName = normalRoutes(l.Routes), slices.Clone(l.ALPN), normalName(l.ServerName)
	s := &settings{Listener: l}
	if was != nil {
		s.lease, s.ways = was.lease, was.ways
	}
	return s
}

// give gives back what the settings hold.
func (s *settings) give() {
	s.lease.Close()
	s.giveWays()
}

// bound is where a connection is bound for: what it asked for, and the target
// it came to, which is empty before that.
type bound struct{ serverName, protocol, target string }

// replaced says what makes next another way in than s to a connection that
// began under s; it is empty when nothing does. A nil next is a listener that
// is no more.
func (s *settings) replaced(next *settings, b bound) string {
	switch {
	case next == nil:
		return "listener was removed"
	case !next.keeps(s, b):
		return "listener's target changed"
	case s.Identity != next.Identity:
		return "listener's identity changed"
	case !reflect.DeepEqual(s.Expect, next.Expect):
		return "listener's expect changed"
	}
	return ""
}

// keeps reports whether a connection that began under was can go on with the
// target it came to, or, where it came to none yet, with any that it may come
// to. Routes count as they are now: where they lead it elsewhere, its target
// is that of others. Outbound, the server name that was asked for is part of
// the target.
func (s *settings) keeps(was *settings, b bound) bool {
	if s.ServerName != was.ServerName {
		return false
	}
	now := s.targetsFor(b.serverName, b.protocol)
	if b.target != "" {
		return slices.Contains(now, b.target)
	}
	for _, t := range was.targetsFor(b.serverName, b.protocol) {
		if !slices.Contains(now, t) {
			return false
		}
	}
	return true
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
	c := &conn{l: l, down: down, start: time.Now(), began: s, latest: s}
	c.source, c.request.Source = sourceOf(raw)
	c.request.Listener, c.request.Direction = l.name, s.Direction
	l.accepted.Add(1)
	l.meters.active.Set(float64(l.active.Add(1)))
	l.waits(c)
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
	l.meters.active.Set(float64(l.active.Add(-1)))
	if result == resultAllowed {
		l.meters.closed[record.Closed].Inc()
	} else {
		l.proxy.instruments.connections.With(l.name, result).Inc()
		l.refused.Add(1)
	}
	l.proxy.access.Write(record)
	if record.Outcome == "failure" && !quiet {
		what := "connection refused"
		if result == resultAllowed {
			what = "connection closed"
		}
		l.logRefusal(what, "source", record.Source, "from", record.From, "to", record.To, "target", target, "reason", record.Reason)
	}
}

// logRefusal logs what strangers can cause at will: a few lines, then one a
// second with the number of those left out. The access log has them all.
func (l *listener) logRefusal(what string, pairs ...any) {
	l.logSome(&l.refusals, hclog.Warn, what, pairs...)
}

func (l *listener) logSome(limit *logLimit, level hclog.Level, what string, pairs ...any) {
	ok, missed := limit.allow(time.Now())
	if !ok {
		return
	}
	pairs = append([]any{"listener", l.name}, pairs...)
	if missed > 0 {
		pairs = append(pairs, "lines_left_out", missed)
	}
	l.proxy.log.Log(level, what, pairs...)
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
	timer := time.NewTimer(time.Hour) // for the SVID's end
	defer timer.Stop()
	for {
		if s := l.settings(); s != nil { // else it was removed, and the last lease goes on
			lease = s.lease
		}
		changed := lease.Changed()
		id, err := lease.Current()
		bundles := lease.Trust()
		news := trust != nil && (id != was || bundles != trust)
		was, trust = id, bundles
		l.noteIdentity(id, err, last)
		if news {
			asked, closed := l.proxy.ask(l.proxy.table.of(l))
			l.proxy.log.Debug("identity, bundles or CRLs changed", "listener", l.name, "trust_generation", bundles.Generation(), "connections_asked", asked, "connections_closed", closed)
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

// resumeSocket makes a socket that was paused accept again.
func (l *listener) resumeSocket() {
	if d, ok := l.socket.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(time.Time{})
	}
}

func (l *listener) stopAccepting() {
	l.pauseAccepting()
	l.closeSocket()
}

// closeSocket closes the socket and removes its file, if the file is still
// ours.
func (l *listener) closeSocket() {
	_ = l.socket.Close()
	if l.unlink == nil {
		return
	}
	path := strings.TrimPrefix(l.bind, unixPrefix)
	if now, err := os.Lstat(path); err == nil && os.SameFile(now, l.unlink) {
		_ = os.Remove(path)
	}
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

// open opens the listening socket.
func (l *listener) open(s *settings) error {
	if s.Socket != nil {
		l.socket = s.Socket
	}
	if l.socket != nil {
		return nil
	}
	network, address := splitAddress(s.Bind)
	if network == "unix" {
		return l.bindUnix(s, address)
	}
	lc := net.ListenConfig{KeepAlive: -1, Control: keepAlive} // -1: package net is not to set it, by four calls, on each connection
	lc.SetMultipathTCP(false)                                 // nobody asks for it, and it costs on every segment
	socket, err := lc.Listen(context.Background(), network, address)
	if err != nil {
		return explainBind(s.Bind, err)
	}
	l.socket = socket
	return nil
}

// Hosts that are gone are noticed after (1+keepAliveProbes) × keepAliveEvery of
// silence, as package net would have it.
const (
	keepAliveEvery  = 15 // seconds
	keepAliveProbes = 9
)

// keepAlive sets TCP keep-alive on a listening socket: what it accepts
// inherits it (tcp(7)).
func keepAlive(_, _ string, c syscall.RawConn) error {
	var errs error
	err := c.Control(func(fd uintptr) {
		errs = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepAliveEvery),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepAliveEvery),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAliveProbes),
		)
	})
	return errors.Join(err, errs)
}

// bindUnix makes a unix socket. A stale one is replaced, one that somebody
// serves is not.
func (l *listener) bindUnix(s *settings, path string) error {
	mode := s.UnixMode
	if err := removeStale(path); err != nil {
		return err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// bind(2) gives the file the socket's own mode less the umask, so
		// there is no moment at which it is open to more than it should be.
		var chmodErr error
		if err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), uint32(mode.Perm())) }); err != nil {
			return err
		}
		return chmodErr
	}}
	socket, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return explainBind(s.Bind, err)
	}
	socket.(*net.UnixListener).SetUnlinkOnClose(false) // another process may have taken the path by then
	l.socket = socket
	if err := os.Chmod(path, mode.Perm()); err != nil {
		_ = socket.Close()
		return fmt.Errorf("bind unix:%s: set mode %o: %w", path, mode.Perm(), err)
	}
	if l.unlink, err = os.Lstat(path); err != nil {
		_ = socket.Close()
		return fmt.Errorf("bind unix:%s: %w", path, err)
	}
	return nil
}

// explainBind says of a socket that cannot be opened what to do next.
func explainBind(bind string, err error) error {
	path, isUnix := strings.CutPrefix(bind, unixPrefix)
	var next string
	switch {
	case isUnix && errors.Is(err, fs.ErrNotExist):
		next = fmt.Sprintf("there is no directory %s; make it, or name another path", filepath.Dir(path))
	case isUnix && errors.Is(err, fs.ErrPermission):
		next = fmt.Sprintf("not allowed; let the user this process runs as write to %s, or name another path", filepath.Dir(path))
	case errors.Is(err, syscall.EADDRINUSE):
		next = "another program listens there; stop it, or give the listener another bind"
	case errors.Is(err, fs.ErrPermission):
		next = "not allowed; give the listener a port above 1023, or this process the capability CAP_NET_BIND_SERVICE"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		next = "this host has no such address; give the listener one it has, or :port for all of them"
	default:
		return fmt.Errorf("bind %s: %w", bind, err)
	}
	return fmt.Errorf("bind %s: %s: %w", bind, next, err)
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return explainBind(unixPrefix+path, err)
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("bind unix:%s: the file is there and is no socket: remove it or name another path", path)
	}
	probe, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = probe.Close()
		return fmt.Errorf("bind unix:%s: another process serves it: stop it or name another path", path)
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("bind unix:%s: a socket is there that we may not connect to, so we cannot tell whether it is served: remove it, or name another path: %w", path, err)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("bind unix:%s: cannot tell whether the socket that is there is served: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("bind unix:%s: replace a stale socket: %w", path, err)
	}
	return nil
}

func checkUnixPath(path string) error {
	switch {
	case !filepath.IsAbs(path):
		return fmt.Errorf("unix:%s: the path must be absolute", path)
	case len(path) > maxUnixPath:
		return fmt.Errorf("unix:%s: the path has %d bytes, a unix socket's can have %d: use a shorter one", path, len(path), maxUnixPath)
	}
	return nil
}

func splitAddress(address string) (network, rest string) {
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		return "unix", path
	}
	return "tcp", address
}

// status describes the listener and its oldest connections.
func (l *listener) status(s *settings) telemetry.ListenerStatus {
	out := telemetry.ListenerStatus{
		Name: l.name, Direction: s.Direction.String(), Bind: s.Bind, Targets: s.everyTarget(),
		Active: int(l.active.Load()), Accepted: uint64(l.accepted.Load()), Refused: uint64(l.refused.Load()),
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

// logLimit lets a burst of lines through, then one a second.
type logLimit struct {
	mu     sync.Mutex // guards the following
	spent  int
	last   time.Time
	missed int
}

const logBurst = 10

func (m *logLimit) allow(now time.Time) (ok bool, missed int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if back := int(now.Sub(m.last) / time.Second); back > 0 {
		m.spent = max(0, m.spent-back)
		m.last = now
	}
	if m.spent >= logBurst {
		m.missed++
		return false, 0
	}
	m.spent++
	missed, m.missed = m.missed, 0
	return true, missed
}
