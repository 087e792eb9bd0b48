package proxy

import (
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/identity"
)

// domainNotes are what was said of trust domains that do not fit together: of
// what is configured, of our identity, of the bundles that came with it. Nothing
// fails by it at once, but peers are refused for as long as it lasts.
type domainNotes struct {
	mu      sync.Mutex // guards the following
	world   *world     // last looked at
	trust   *identity.Trust
	foreign spiffeid.TrustDomain // of our identity, where it is not as configured
	missing map[string]bool      // trust domains without a bundle
}

// noteDomains warns where the identity is of another trust domain than is
// configured, and of trust domains whose peers rules allow while there is no
// bundle to know them by: once, until it is otherwise.
func (p *Proxy) noteDomains(id *identity.Identity, trust *identity.Trust) {
	n, w := &p.domains, p.world.Load()
	n.mu.Lock()
	defer n.mu.Unlock()
	own := id.ID.TrustDomain()
	switch {
	case w.trustDomain.IsZero() || own == w.trustDomain:
		n.foreign = spiffeid.TrustDomain{}
	case n.foreign != own:
		n.foreign = own
		p.log.Warn("our identity is of another trust domain than trust_domain says: is that misspelt, or the Workload API another agent's?", "spiffe_id", id.ID, "trust_domain", w.trustDomain)
	}
	if n.world == w && n.trust == trust {
		return
	}
	n.world, n.trust = w, trust
	var listeners []string
	for _, l := range w.sorted() {
		listeners = append(listeners, l.name)
	}
	was := n.missing
	n.missing = map[string]bool{}
	for _, m := range w.policy.TrustDomains(listeners) {
		td, err := spiffeid.TrustDomainFromString(m.TrustDomain)
		if err != nil || trust.Has(td) {
			continue
		}
		n.missing[m.TrustDomain] = true
		if !was[m.TrustDomain] && len(n.missing) <= maxNamed {
			p.log.Warn("a rule allows peers of a trust domain that there is no bundle of: they are refused; does the entry of this proxy federate with it, or is it misspelt?",
				"trust_domain", m.TrustDomain, "rule", m.Rule, "file", m.File, "line", m.Line)
		}
	}
}

// noteDomainsAgain does so after a change of rules or listeners.
func (p *Proxy) noteDomainsAgain() {
	for _, s := range p.world.Load().listeners {
		if id, err := s.lease.Current(); err == nil {
			p.noteDomains(id, s.lease.Trust())
			return // bundles are of the source, and the same for all
		}
	}
}
