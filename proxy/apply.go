package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/proxyproto"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// Applied is what Apply did.
type Applied struct {
	Added, Changed, Removed []string       // listeners, by name
	Asked, Closed           int            // live connections asked again, and ended for it at once
	Kept                    int            // those that go on for now though the rules refuse them
	NowRefused              int            // those that are refused by now, whether ended at once, kept or draining
	Generation              uint64         // of the policy in force
	Rules                   policy.Changes // between the policy before and this one
}

// Apply puts a new configuration in force: listeners are added, changed and
// removed without touching the others, a new policy asks every live
// connection again and only violators are ended. It is all or nothing: on an
// error (a configuration that cannot be, an address that cannot be bound)
// everything stays as it was.
//
// Rules and listeners come into force at one moment. A connection whose
// handshake began under Targets that are no longer all there, or another
// Identity or Expect than those of that moment, is refused, and so is one
// whose listener was removed meanwhile.
//
// A listener is known by its name. One that changes but keeps its Bind keeps
// its socket and its connections. Those already open stay with the target they
// have and are asked by the new rules; where it is no longer one of Targets
// they drain, because the rules now speak of others. One with a new Bind,
// Direction or protocol is a new one, and connections of the old one drain. Sockets pass
// from a removed listener to a new one with the same Bind without closing.
//
// While Run drains, the policy alone is put in force; the rest has no listener
// to be for.
func (p *Proxy) Apply(c Config) (Applied, error) {
	p.applying.Lock()
	defer p.applying.Unlock()
	if err := check(c); err != nil {
		return Applied{}, err
	}
	p.mu.Lock()
	stopped, draining, sameSource := p.stopped, p.running && !p.ended, p.identities == c.Identities
	p.mu.Unlock()
	switch {
	case stopped && draining:
		return p.applyRules(c.Policy), nil
	case stopped:
		return Applied{}, ErrStopped
	}

	was := p.world.Load()
	plan, err := p.plan(c, was, sameSource)
	if err != nil {
		return Applied{}, err
	}
	first := was.generation == 0
	swapped := first || was.policy != c.Policy
	applied := p.commit(c, plan, was, swapped)
	if swapped || len(applied.Changed) > 0 { // a listener's new `expect` asks too
		applied.count(p.ask(p.table.of(nil)))
	}
	if swapped {
		p.limits.forget()
		applied.Rules = policy.NewComparison(was.policy, c.Policy).Differences()
	}
	applied.Generation = p.world.Load().generation
	p.logApplied(&applied, c.Policy, first, swapped)
	p.warnOpen(was, p.world.Load(), slices.Concat(plan.added, plan.changed))
	p.noteDomainsAgain()
	return applied, nil
}

// applyRules puts a policy in force for connections that drain, which may take
// long: no listener accepts any more, so that nothing else would make a
// difference.
func (p *Proxy) applyRules(rules *policy.Policy) (applied Applied) {
	was := p.world.Load()
	if was.policy != rules {
		next := *was
		next.policy, next.generation, next.loaded = rules, was.generation+1, time.Now()
		p.mu.Lock()
		p.world.Store(&next)
		p.mu.Unlock()
		p.instruments.generation.Set(float64(next.generation))
		applied.count(p.ask(p.table.of(nil)))
		applied.Rules = policy.NewComparison(was.policy, rules).Differences()
	}
	applied.Generation = p.world.Load().generation
	p.logApplied(&applied, rules, false, was.policy != rules)
	return applied
}

func (a *Applied) count(n asked) {
	a.Asked, a.Closed, a.Kept, a.NowRefused = n.all, n.closed, n.kept, n.refused
}

func (a *Applied) rulesChanged() string {
	return fmt.Sprintf("%d added, %d changed, %d removed", len(a.Rules.Added), len(a.Rules.Changed), len(a.Rules.Removed))
}

// maxNamed bounds how many rules a line of the log names.
const maxNamed = 20

// named is a list of ids for a line of the log.
func named(ids []string) string {
	if more := len(ids) - maxNamed; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:maxNamed], ","), more)
	}
	return strings.Join(ids, ",")
}

// logApplied says what is other than before. The generation is that of the
// rules: a change of listeners alone does not move it, and does not name it.
func (p *Proxy) logApplied(a *Applied, rules *policy.Policy, first, swapped bool) {
	listeners := len(a.Added)+len(a.Changed)+len(a.Removed) > 0
	what := "configuration is as it was"
	switch {
	case first:
		what = "configuration in force"
	case swapped && listeners:
		what = "rules and listeners changed: rules " + a.rulesChanged()
	case swapped:
		what = "rules changed: " + a.rulesChanged()
	case listeners:
		what = "listeners changed"
	}
	var pairs []any
	if swapped {
		pairs = append(pairs, "generation", a.Generation, "rules", rules.Rules())
	}
	name := func(key string, ids []string) {
		if len(ids) > 0 {
			pairs = append(pairs, key, named(ids))
		}
	}
	name("added", a.Added)
	name("changed", a.Changed)
	name("removed", a.Removed)
	if !first {
		name("rules_added", a.Rules.Added)
		name("rules_changed", a.Rules.Changed)
		name("rules_removed", a.Rules.Removed)
		pairs = append(pairs, "connections_asked", a.Asked, "connections_refused", a.NowRefused, "connections_closed", a.Closed)
		if a.Kept > 0 {
			pairs = append(pairs, "connections_kept", a.Kept)
		}
	}
	p.log.Info(what, pairs...)
	served := p.world.Load().listeners
	if len(served) > 0 && (swapped || len(a.Added) > 0) && rules.Allowing() == 0 {
		what := "every connection will be refused"
		for _, s := range served {
			if s.Enforcement == Audit {
				what = "every connection will be refused, but on listeners that only audit"
			}
		}
		p.log.Warn("no rule allows anything: "+what, "generation", a.Generation, "rules", rules.Rules(), "files", strings.Join(rules.Files(), ","))
	}
}

// plan is what Apply is about to do, with everything that can fail done.
type plan struct {
	added    []*listener
	changed  []*listener
	removed  []*listener
	settings map[*listener]*settings // of all that will be in force
	leases   []identity.Lease        // those that were taken for it
	groups   []*upstream.Group       // the same
}

func (p *Proxy) plan(c Config, w *world, sameSource bool) (*plan, error) {
	todo := plan{settings: make(map[*listener]*settings, len(c.Listeners))}
	var fresh []Listener
	for _, want := range c.Listeners {
		l := w.named(want.Name)
		if l == nil {
			fresh = append(fresh, want)
			continue
		}
		was := w.listeners[l]
		next := newSettings(want, was)
		if was.Bind != next.Bind || was.Direction != next.Direction || was.Socket != next.Socket || (was.HTTP == nil) != (next.HTTP == nil) {
			fresh = append(fresh, want)
			continue
		}
		todo.settings[l] = was
		if sameSource && reflect.DeepEqual(was.Listener, next.Listener) {
			continue
		}
		if !sameSource || was.Identity != next.Identity || next.wantsTokens() && !was.wantsTokens() {
			if err := todo.lease(c.Identities, next); err != nil {
				return nil, todo.undo(err)
			}
		}
		if was.upstreamChanged(next) {
			if err := todo.upstream(p.upstreams, next); err != nil {
				return nil, todo.undo(err)
			}
		}
		todo.settings[l] = next
		todo.changed = append(todo.changed, l)
	}
	for _, l := range w.sorted() {
		if todo.settings[l] == nil {
			todo.removed = append(todo.removed, l)
		}
	}
	for _, want := range fresh {
		s := newSettings(want, nil)
		if err := todo.lease(c.Identities, s); err != nil {
			return nil, todo.undo(err)
		}
		if err := todo.upstream(p.upstreams, s); err != nil {
			return nil, todo.undo(err)
		}
		l, err := p.open(s, todo.removed, w, c.Sockets)
		if err != nil {
			return nil, todo.undo(fmt.Errorf("listener %s: %w", want.Name, err))
		}
		todo.settings[l] = s
		todo.added = append(todo.added, l)
	}
	return &todo, nil
}

// lease takes the lease on the identity that s names.
func (t *plan) lease(source identity.Source, s *settings) error {
	lease, err := source.Own(context.Background(), s.Identity)
	if err != nil {
		return fmt.Errorf("listener %s: identity %s: %w", s.Name, s.Identity, err)
	}
	s.lease = lease
	s.tokens, _ = source.(identity.Tokens)
	if s.HTTP != nil && s.HTTP.JWT != nil {
		if s.tokens == nil {
			lease.Close()
			return fmt.Errorf("listener %s: jwt: the source of identities knows no JWT-SVIDs; take them from a Workload API", s.Name)
		}
		if s.Direction == policy.Inbound {
			s.tokens.FollowJWT()
		}
	}
	t.leases = append(t.leases, lease)
	return nil
}

// upstream takes the groups of the targets of s.
func (t *plan) upstream(set *upstream.Set, s *settings) error {
	s.ways = nil
	for _, targets := range s.targetLists() {
		group, err := set.Take(s.Name, targets, s.Upstream)
		if err != nil {
			return fmt.Errorf("listener %s: target: %w", s.Name, err)
		}
		s.ways = append(s.ways, way{targets, group})
		t.groups = append(t.groups, group)
	}
	return nil
}

// undo gives back what was taken for a plan that is not carried out.
func (t *plan) undo(err error) error {
	for _, lease := range t.leases {
		lease.Close()
	}
	for _, group := range t.groups {
		group.Release()
	}
	for _, l := range t.added {
		if l.from == nil {
			l.closeSocket()
		}
	}
	return err
}

// open makes a listener: with the socket of a removed one that has the same
// Bind, one that was inherited, or a new one.
func (p *Proxy) open(s *settings, removed []*listener, w *world, inherited func(name, bind string) net.Listener) (*listener, error) {
	l := newListener(p, s)
	at := slices.IndexFunc(removed, func(r *listener) bool {
		was := w.listeners[r]
		return was.Bind == s.Bind && was.Socket == s.Socket && !anyPort(s.Bind)
	})
	if at < 0 {
		if s.Socket == nil && inherited != nil {
			l.socket = inherited(s.Name, s.Bind)
		}
		return l, l.open(s)
	}
	l.from = removed[at]
	l.socket, l.unlink = l.from.socket, l.from.unlink
	return l, nil
}

// commit carries the plan out; nothing in it can fail. What is removed has
// stopped to accept before the new world is in force, and what is added
// begins after it, so that nothing is accepted under settings that are not
// in force together with their rules.
func (p *Proxy) commit(c Config, todo *plan, was *world, swapped bool) Applied {
	var applied Applied
	next := &world{most: c.MaxConnections, trustDomain: c.TrustDomain, policy: was.policy, generation: was.generation, loaded: was.loaded, listeners: todo.settings}
	if swapped {
		next.policy, next.generation, next.loaded = c.Policy, was.generation+1, time.Now()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range todo.removed {
		l.pauseAccepting()
	}
	p.slots.resize(cmp.Or(c.MaxConnections, math.MaxInt))
	p.world.Store(next)
	p.instruments.generation.Set(float64(next.generation))
	p.identities = c.Identities
	for _, l := range todo.changed {
		l.changed(was.listeners[l], next.listeners[l])
		applied.Changed = append(applied.Changed, l.name)
	}
	for _, l := range todo.removed {
		if !slices.ContainsFunc(todo.added, func(n *listener) bool { return n.from == l }) {
			l.closeSocket()
		}
		if last := was.listeners[l]; p.running {
			p.retired.Go(func() { l.retire(last, "its listener was removed") })
		} else {
			last.give()
		}
		applied.Removed = append(applied.Removed, l.name)
	}
	for _, l := range todo.added {
		if l.from != nil {
			l.resumeSocket()
			l.from = nil
		}
		if p.running {
			l.start()
		}
		applied.Added = append(applied.Added, l.name)
	}
	return applied
}

// check refuses configurations that cannot be.
func check(c Config) error {
	if c.Identities == nil {
		return errors.New("no source of identities: set Config.Identities")
	}
	if c.MaxConnections < 0 {
		return errors.New("the limit of all connections cannot be negative")
	}
	names, binds := map[string]bool{}, map[string]string{}
	for _, l := range c.Listeners {
		if l.Name == "" {
			return errors.New("a listener has no name")
		}
		if names[l.Name] {
			return fmt.Errorf("listener %s: two listeners have this name", l.Name)
		}
		names[l.Name] = true
		if err := checkListener(l); err != nil {
			return fmt.Errorf("listener %s: %w", l.Name, err)
		}
		if other := binds[l.Bind]; other != "" && l.Socket == nil && !anyPort(l.Bind) {
			return fmt.Errorf("listener %s: bind %s is taken by listener %s", l.Name, l.Bind, other)
		}
		binds[l.Bind] = l.Name
	}
	return nil
}

// anyPort reports whether a bind leaves the choice of the port to the kernel:
// two of them are two addresses.
func anyPort(bind string) bool { return strings.HasSuffix(bind, ":0") }

func checkListener(l Listener) error {
	if l.HTTP != nil {
		if err := l.HTTP.check(l.Direction == policy.Inbound); err != nil {
			return fmt.Errorf("http: %w", err)
		}
		if l.ProxyProtocol.Send != proxyproto.Off {
			return errors.New("proxy_protocol: no header can be sent with HTTP, where requests of several clients share a connection")
		}
	}
	if err := checkRequests(l); err != nil {
		return err
	}
	if l.Socket == nil {
		if err := checkAddress(l.Bind); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
	}
	if len(l.Targets) > 0 || len(l.Routes) == 0 {
		if err := checkTargets(l.Targets); err != nil {
			return fmt.Errorf("target: %w", err)
		}
	}
	if err := checkRoutes(l, l.Direction == policy.Inbound); err != nil {
		return err
	}
	if err := checkSpoken(l); err != nil {
		return err
	}
	if err := checkProxyProtocol(l.ProxyProtocol); err != nil {
		return err
	}
	if l.MaxConnections < 0 || l.MaxPerIdentity < 0 || l.MaxHandshakes < 0 || l.MaxAge < 0 {
		return errors.New("limits cannot be negative")
	}
	if t := l.Timeouts; t.Handshake < 0 || t.Connect < 0 {
		return errors.New("timeouts cannot be negative, but idle, where it means none, and drain, where it means at once")
	}
	switch l.Direction {
	case policy.Inbound:
		if len(l.Expect) > 0 {
			return errors.New("expect is for outbound listeners; inbound, the policy's `from` says who may come")
		}
	case policy.Outbound:
		if l.Mode != ModeStrict {
			return errors.New("mode permissive is for inbound listeners: outbound, what leaves is always mTLS")
		}
		if len(l.Expect) == 0 {
			return errors.New("an outbound listener needs expect: the SPIFFE IDs the peer may have; its address proves nothing")
		}
	default:
		return fmt.Errorf("direction %d is neither inbound nor outbound", l.Direction)
	}
	return nil
}

func checkTargets(targets []string) error {
	switch {
	case len(targets) == 0:
		return checkAddress("")
	case len(targets) > MaxTargets:
		return fmt.Errorf("%d of them are too many: want at most %d", len(targets), MaxTargets)
	}
	for i, target := range targets {
		if err := checkAddress(target); err != nil {
			return err
		}
		if err := upstream.CheckTarget(target); err != nil {
			return err
		}
		if slices.Contains(targets[:i], target) {
			return fmt.Errorf("%s is in the list twice", target)
		}
	}
	return nil
}

func checkAddress(address string) error {
	if address == "" {
		return errors.New("is missing: want host:port or unix:/path")
	}
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		return checkUnixPath(path)
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		return fmt.Errorf("%q: want host:port or unix:/path: %w", address, err)
	}
	return nil
}
