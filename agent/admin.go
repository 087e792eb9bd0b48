package agent

import (
	"crypto/x509"

	"github.com/narthex-id/narthex/agent/endpoint"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// openAdmin opens the admin socket.
func (a *Agent) openAdmin() (err error) {
	a.admin, err = endpoint.ListenAdmin(endpoint.AdminConfig{
		Socket:      a.cfg.AdminSocket,
		Apart:       a.cfg.Socket,
		Listener:    a.cfg.AdminInherit,
		Agent:       a,
		TrustDomain: a.cfg.TrustDomain,
		Attestors:   a.cfg.WorkloadAttestors,
		Delegates:   a.cfg.Delegates,
		Metrics:     a.cfg.Metrics,
		Log:         a.log,
	})
	return err
}

// WatchBundles implements endpoint.AdminAgent.
func (a *Agent) WatchBundles() *registry.Watch { return a.registry.WatchBundles() }

// Matching implements endpoint.AdminAgent.
func (a *Agent) Matching(selectors []attestor.Selector) []registry.Match {
	return a.registry.Matching(selectors)
}

// Nearest implements endpoint.AdminAgent.
func (a *Agent) Nearest(selectors []attestor.Selector, n int) []registry.Near {
	return a.registry.Nearest(selectors, n)
}

// JWTSVIDs implements endpoint.AdminAgent.
func (a *Agent) JWTSVIDs() (n int) {
	a.tokens.mu.Lock()
	defer a.tokens.mu.Unlock()
	for key := range a.tokens.cache.all {
		if key.audience != (tokenKey{}).audience { // else a WIT-SVID
			n++
		}
	}
	return n
}

// SVID implements endpoint.AdminAgent.
func (a *Agent) SVID() []*x509.Certificate {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.view.chain
}
