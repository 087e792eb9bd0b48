package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/handover"
	"github.com/narthex-id/narthex/proxy"
	"github.com/narthex-id/narthex/proxy/extauthz"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

// openExtAuthz binds the sockets on which Envoy is to ask the proxy.
func (r *proxyRunner) openExtAuthz(p *proxy.Proxy) (*extauthz.Set, error) {
	set := extauthz.New(extauthz.Config{
		Ask: p.Answer, Bars: p.Bars, Identities: r.source, Sockets: r.place.socket,
		Metrics: r.metrics, Access: r.access, Log: r.log,
	})
	change, err := set.Plan(extAuthzServices(r.config))
	if err != nil {
		return nil, err
	}
	change.Commit()
	return set, nil
}

// extAuthzServices says in the words of proxy/extauthz what the file says in
// its own.
func extAuthzServices(c *config.Config) []extauthz.Service {
	var out []extauthz.Service
	for i := range c.Proxy.ExtAuthz {
		e := &c.Proxy.ExtAuthz[i]
		s := extauthz.Service{Name: e.Name, Bind: string(e.Bind), UnixMode: e.Mode.FileMode(), Audit: enforcement(e.Enforcement) == proxy.Audit}
		for _, pattern := range e.Clients {
			s.Clients = append(s.Clients, must(policy.ParsePattern(string(pattern))))
		}
		if e.Identity != nil {
			s.Identity = identity.Pick{SPIFFEID: e.Identity.SPIFFEID, Hint: e.Identity.Hint}
		}
		out = append(out, s)
	}
	return out
}

// apply puts listeners, rules and ext_authz in force, all of them or none.
func (r *proxyRunner) apply(c *config.Config, rules *policy.Policy) (proxy.Applied, error) {
	change, err := r.authz.Plan(extAuthzServices(c))
	if err != nil {
		return proxy.Applied{}, err
	}
	applied, err := r.proxy.Apply(r.proxyConfig(c, rules))
	if err != nil {
		change.Undo()
		return applied, err
	}
	change.Commit()
	return applied, nil
}

// waitReady waits until every listener and every place where Envoy asks can
// serve.
func (r *proxyRunner) waitReady(ctx context.Context) error {
	return errors.Join(r.proxy.WaitReady(ctx), r.authz.WaitReady(ctx))
}

// offered are the sockets that a process is given which takes our place.
func (r *proxyRunner) offered() (out []handover.Socket) {
	for _, s := range r.proxy.Sockets() {
		out = append(out, handover.Socket{Kind: handover.Listener, Name: s.Name, Bind: s.Bind, Owned: s.Owned, Serving: s.Serving, Listener: s.Listener})
	}
	for _, s := range r.authz.Sockets() {
		out = append(out, handover.Socket{Kind: handover.Listener, Name: s.Name, Bind: s.Bind, Owned: s.Owned, Listener: s.Listener})
	}
	return out
}

// ownPaths makes the paths of sockets ours that were handed over, and whose
// paths the process before us would have removed.
func (r *proxyRunner) ownPaths(names []string) {
	r.proxy.OwnPaths(names)
	r.authz.OwnPaths(names)
}

// leavePaths leaves the paths of sockets to the process that has them now.
func (r *proxyRunner) leavePaths(names []string) {
	r.proxy.LeavePaths(names)
	r.authz.LeavePaths(names)
}

// extAuthzProblems says which services cannot answer.
func (r *proxyRunner) extAuthzProblems() error {
	var problems []error
	for _, s := range r.authz.Status() {
		if s.Problem != "" {
			problems = append(problems, fmt.Errorf("ext_authz %s: %s", s.Name, s.Problem))
		}
	}
	return errors.Join(problems...)
}

// extAuthzNamed returns where Envoy asks by that name, or nil.
func extAuthzNamed(c *config.Config, name string) *config.ExtAuthz {
	at := slices.IndexFunc(c.Proxy.ExtAuthz, func(e config.ExtAuthz) bool { return e.Name == name })
	if at < 0 {
		return nil
	}
	return &c.Proxy.ExtAuthz[at]
}
