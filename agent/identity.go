package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/narthex-id/narthex/agent/keys"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
	"github.com/narthex-id/narthex/attestor"
)

// shortest is the least life an SVID must have left to be of use. One with
// less tells of clocks that disagree, or of a TTL nobody can work with.
const shortest = time.Second

// errBanned marks the refusal that no retry will mend soon.
var errBanned = errors.New("the server has banned this agent")

// restore takes up what an earlier run left in the data directory. What is
// corrupt is set aside, and the agent attests anew; what cannot be read is an
// error for the operator.
func (l *looper) restore(ctx context.Context) error {
	s, err := l.dir.load(l.cfg.TrustDomain.Name())
	if errors.Is(err, errCorruptState) {
		l.log.Error("cannot take up the agent's identity and will attest anew", "error", err)
		err = nil
	} else if err == nil && s.Version == 0 { // there is none
		s, err = l.takeOver(ctx)
	}
	if err != nil {
		return err
	}
	roots, err := parseCertificates(s.Bundle)
	if err != nil {
		l.log.Error("cannot take up the saved state and will attest anew",
			"error", l.dir.setAside(fmt.Errorf("bundle: %w", err)))
		s, roots = state{}, nil
	}
	l.self.state = s
	if len(roots) > 0 {
		l.client.SetRoots(roots)
	}
	if len(s.SVID) == 0 {
		return nil
	}
	key, err := l.cfg.Keys.Load(ctx, s.KeyID)
	if err != nil {
		if ctx.Err() == nil { // else it ended before it began, and nothing is wrong with the key
			l.log.Warn("cannot load the key of the saved SVID and will attest anew", "error", err)
		}
		return nil
	}
	if err := l.adopt(s, key); err != nil {
		l.log.Error("cannot take up the saved SVID and will attest anew", "error", l.dir.setAside(err))
		l.self.state = state{Bundle: s.Bundle}
		return nil
	}
	if !l.self.valid(time.Now()) {
		l.log.Warn("the saved SVID has expired and the agent will attest anew", "expired_at", l.self.leaf.NotAfter)
		return nil
	}
	l.warnOfAnotherNode(s)
	l.log.Info("took up the saved SVID", "spiffe_id", l.self.leaf.URIs[0].String(), "expires_at", l.self.leaf.NotAfter)
	return nil
}

// warnOfAnotherNode says at once what would be noticed when the saved SVID is
// renewed, hours later: that the node attestor which is configured is not the one
// it is from. It is good until then, and the server may know the new one by then.
func (a *Agent) warnOfAnotherNode(s state) {
	p, ok := a.cfg.Node.(attestor.Pathed)
	if !ok || len(s.SVID) == 0 || a.warned {
		return
	}
	chain, err := parseCertificates(s.SVID)
	if err != nil {
		return // which adopt says
	}
	id, err := x509svid.IDFromCert(chain[0])
	if err != nil || strings.HasPrefix(id.Path(), p.AgentPath()) {
		return
	}
	a.warned = true
	a.log.Warn("the saved SVID is not of the node attestor that is configured, and the next attestation may be refused", "spiffe_id", id.String(),
		"configured", p.AgentPath(), "advice", "compare agent.node_attestor."+p.Type()+" (chart: clusterName) with the server's configuration; if it is right, entries with the old parent ID need the new one")
}

// adopt makes s and its key what the agent presents to the server.
func (l *looper) adopt(s state, key keys.Key) error {
	chain, err := parseCertificates(s.SVID)
	if err != nil {
		return fmt.Errorf("svid: %w", err)
	}
	leaf := chain[0]
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return fmt.Errorf("svid: %w", err)
	}
	if !id.MemberOf(l.cfg.TrustDomain) {
		return fmt.Errorf("svid: %s is not of trust domain %s", id, l.cfg.TrustDomain)
	}
	public, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(key.Public()) {
		return errors.New("svid: its key is another than the stored one")
	}
	l.client.SetIdentity(&spire.Identity{Chain: s.SVID, Key: key})
	l.self = self{state: s, key: key, leaf: leaf, issue: issueOf("the agent's SVID", leaf), renewAt: renewAt(leaf, time.Now())}
	l.metrics.svidExpiry.SetTime(leaf.NotAfter)
	l.update(func(v *view) { v.id, v.chain, v.expires = id, chain, leaf.NotAfter })
	return nil
}

// renewAt is when an SVID is renewed: with half of its life left ±10 %. One
// that is past that when it is taken up (the server dates them back, clocks
// disagree, the agent was away) is used for a tenth of what is left, so that
// the server is not asked without end. Where this host's clock is behind the
// server's, half of its life counts from now. The result has the monotonic clock
// of now, see registry.Reached.
func renewAt(leaf *x509.Certificate, now time.Time) time.Time {
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	half := time.Duration(float64(life) / 2 * (1 + jitter()/10))
	at := leaf.NotAfter.Add(-half)
	switch soonest := now.Add(leaf.NotAfter.Sub(now) / 10); {
	case now.Before(leaf.NotBefore):
		at = now.Add(life - half)
	case at.Before(soonest):
		at = soonest
	}
	return now.Add(at.Sub(now))
}

// attest proves the node to the server and adopts the SVID it answers with.
func (l *looper) attest(ctx context.Context) error {
	trust, err := l.trust(ctx)
	if err != nil {
		return err
	}
	return l.attestTo(ctx, trust)
}

// attestTo is attest with a server that is known by trust.
func (l *looper) attestTo(ctx context.Context, trust spire.Trust) error {
	key, csr, err := l.newKey(ctx)
	if err != nil {
		return err
	}
	result, err := l.client.Attest(ctx, trust, l.cfg.Node, csr)
	if err != nil {
		l.metrics.renewFailed.Inc()
		err = fmt.Errorf("%w (node attestor %s)", err, l.cfg.Node.Type())
		switch {
		case l.lost != nil:
			err = fmt.Errorf("%w; it has to attest because of %s", err, l.lost.Error()) // not wrapped: this attempt failed for err alone
		case l.self.leaf != nil && !l.self.valid(time.Now()):
			err = fmt.Errorf("%w; it has to attest because its SVID ended at %s, by this host's clock", err, l.self.leaf.NotAfter.UTC().Format(time.RFC3339))
		}
		err = l.denied(err)
		if l.refused(err) {
			// The server knows this node and does not want it: what it was
			// given before is not served on.
			l.wipe()
		}
		return err
	}
	s := state{
		TrustDomain:  l.cfg.TrustDomain.Name(),
		KeyID:        key.ID(),
		SVID:         result.Chain,
		Bundle:       l.self.state.Bundle,
		Reattestable: result.Reattestable,
	}
	if result.Bundle != nil {
		s.Bundle = rawCertificates(result.Bundle.X509)
		l.client.SetRoots(result.Bundle.X509)
		l.registry.Apply(registry.Update{Bundle: result.Bundle})
	}
	if err := l.keep(ctx, s, key); err != nil {
		return err
	}
	if err := l.checkReattestable(); err != nil {
		return err
	}
	l.nextSync, l.lost, l.posted = time.Time{}, nil, false
	l.update(func(v *view) { v.attested = time.Now() })
	l.log.Info("attested", "attestor", l.cfg.Node.Type(), "spiffe_id", l.self.leaf.URIs[0].String(), "expires_at", l.self.leaf.NotAfter)
	return nil
}

// refused reports whether the server refused the attestation of a node that
// has lost its SVID (not: was away, or refused a renewal by attestation while
// the old SVID still holds).
func (l *looper) refused(err error) bool {
	var denied *spire.DeniedError
	return (errors.As(err, &denied) || errors.Is(err, spire.ErrJoinToken)) && !l.self.valid(time.Now())
}

// renew replaces the agent's SVID before it ends: by attesting again where
// the node can, else by RenewAgent. While the SVID holds, a failure is only
// put off.
func (l *looper) renew(ctx context.Context) error {
	err := func() error {
		if l.self.state.Reattestable {
			return l.attest(ctx)
		}
		key, csr, err := l.newKey(ctx)
		if err != nil {
			return err
		}
		chain, err := l.client.Renew(ctx, csr)
		if mustReattest(err) {
			l.log.Info("the server wants this node to attest again instead of renewing", "error", err)
			l.self.state.Reattestable = true
			return l.attest(ctx)
		}
		if err != nil {
			l.metrics.renewFailed.Inc()
			return l.denied(err)
		}
		s := l.self.state
		s.KeyID, s.SVID = key.ID(), chain
		if err := l.keep(ctx, s, key); err != nil {
			return err
		}
		l.log.Info("renewed the agent's SVID", "expires_at", l.self.leaf.NotAfter)
		return nil
	}()
	if err != nil && l.self.valid(time.Now()) && !errors.Is(err, errBanned) {
		left := time.Until(l.self.leaf.NotAfter)
		l.self.renewAt = time.Now().Add(spread(min(left/10, time.Minute)))
		l.log.Warn("cannot renew the agent's SVID yet, will try again", "error", err, "expires_at", l.self.leaf.NotAfter)
		return nil
	}
	return err
}

// trust is what the server is verified against when it is attested to: the
// saved bundle, or else what the configuration names.
func (l *looper) trust(ctx context.Context) (spire.Trust, error) {
	if saved := l.self.state.Bundle; len(saved) > 0 {
		roots, err := parseCertificates(saved)
		return spire.Trust{Roots: roots}, err
	}
	if l.cfg.InsecureBootstrap {
		return spire.Trust{Insecure: true}, nil
	}
	return l.bootstrap(ctx)
}

// newKey makes a key for the agent's next SVID, stored before it is used, and
// its CSR.
func (l *looper) newKey(ctx context.Context) (keys.Key, []byte, error) {
	// Attempts that failed leave keys behind: only the one in force is kept.
	if err := l.cfg.Keys.Keep(ctx, l.self.state.KeyID); err != nil {
		return nil, nil, fmt.Errorf("delete unused keys: %w", err)
	}
	key, err := l.cfg.Keys.New(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("make the agent's key: %w", err)
	}
	csr, err := newCSR(key, spiffeid.ID{})
	return key, csr, err
}

// keep writes s to disk, adopts it, and forgets the keys before it. Where s
// cannot be written, what was before stays in force, unless the server does not
// take that any more: it does not once a node has attested again, which such a
// node can do whenever it starts.
func (l *looper) keep(ctx context.Context, s state, key keys.Key) error {
	if err := l.dir.store(s); err != nil {
		if !s.Reattestable {
			return err
		}
		l.log.Error("the agent's SVID is held in memory alone, and will be attested for anew at the next start", "error", err)
	}
	if err := l.adopt(s, key); err != nil {
		return fmt.Errorf("take up the SVID the server sent: %w", err)
	}
	l.self.issue = l.self.issue.arrived(time.Now())
	l.hold(l.self.issue)
	l.metrics.renewed.Inc()
	if err := l.cfg.Keys.Keep(ctx, key.ID()); err != nil {
		l.log.Warn("cannot delete superseded keys", "error", err)
	}
	return nil
}

// keepBundle saves the bundle with which the server is verified, when it has
// changed.
func (l *looper) keepBundle(b *registry.Bundle) error {
	if len(b.X509) == 0 {
		return errors.New("keep the trust bundle: it has no X.509 authority; the one before it stays in force")
	}
	raw := rawCertificates(b.X509)
	if equalCertificates(raw, l.self.state.Bundle) {
		return nil
	}
	l.client.SetRoots(b.X509)
	l.self.state.Bundle = raw
	l.log.Info("the trust bundle changed", "authorities", len(raw))
	return l.dir.store(l.self.state)
}

// leaveTainted has the agent's own SVID renewed at once when b flags an
// authority above it as tainted: when that one is revoked next, the server
// knows the agent no more, and one with a join token could not come back.
func (l *looper) leaveTainted(b *registry.Bundle) {
	now := time.Now()
	if len(b.Tainted) == 0 || now.Before(l.left.Add(taintedPause)) || !l.self.signedByAny(b.Tainted) {
		return
	}
	l.left, l.self.renewAt = now, now
	l.log.Warn("an authority that the agent's SVID stands on is tainted: renewing it now")
}

// signedByAny reports whether one of the authorities, by hexadecimal subject
// key ID, signed a certificate of the SVID's chain.
func (s *self) signedByAny(authorities []string) bool {
	chain, err := parseCertificates(s.state.SVID)
	if err != nil {
		return false // adopt has parsed it before
	}
	return slices.ContainsFunc(chain, func(c *x509.Certificate) bool {
		return slices.Contains(authorities, hex.EncodeToString(c.AuthorityKeyId))
	})
}

// mustReattest reports whether a renewal was refused because the node can attest
// again. The SVID is as good as before.
func mustReattest(err error) bool {
	var d *spire.DeniedError
	return errors.As(err, &d) && d.Reason == spire.AgentMustReattest && !d.Superseded
}

// denied draws the consequences of a refusal of the agent itself and returns
// the error to report.
func (l *looper) denied(err error) error {
	var d *spire.DeniedError
	switch {
	case errors.Is(err, spire.ErrIdentityRefused):
		// The server says no more than that, and it may be one of several that
		// is behind: the SVID is tried again should there be no other.
		l.mustAttest = true
		if !l.self.valid(time.Now()) {
			return err
		}
		return fmt.Errorf("%w (of which this host's clock says that it ends at %s only)", err, l.self.leaf.NotAfter.UTC().Format(time.RFC3339))
	case !errors.As(err, &d), d.Superseded, d.Reason == spire.Other, d.Reason == spire.AgentMustReattest:
		return err
	case d.Reason == spire.AgentBanned:
		l.forget()
		l.wipe()
		l.lost = d
		l.update(func(v *view) { v.banned = true })
		return fmt.Errorf("%w: %w", errBanned, err)
	case d.Reason == spire.AgentNotActive && !l.inactive:
		// Of several servers, one may not have heard of a renewal yet.
		l.inactive = true
		return err
	}
	l.forget()
	l.lost = d
	return err
}

// forget drops the agent's SVID, so that the next step is to attest.
func (l *looper) forget() {
	l.self = self{state: state{TrustDomain: l.cfg.TrustDomain.Name(), Bundle: l.self.state.Bundle, Strange: l.self.state.Strange}}
	l.client.SetIdentity(nil)
	l.metrics.svidExpiry.Set(0)
	l.update(func(v *view) { v.id, v.chain, v.expires = spiffeid.ID{}, nil, time.Time{} })
	if err := l.dir.store(l.self.state); err != nil {
		l.log.Error("cannot remove the refused SVID from disk", "error", err)
	}
}

// wipe takes back everything the workloads were given.
func (l *looper) wipe() {
	l.registry.Apply(registry.Update{Wipe: true})
	l.tokens.keep(nil, nil)
	l.update(func(v *view) { v.synced, v.entries = false, 0 })
}

// newCSR makes a CSR. The server uses its key alone; the ID is there for
// those who read its audit log.
func newCSR(key crypto.Signer, id spiffeid.ID) ([]byte, error) {
	template := &x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"SPIRE"}}}
	if !id.IsZero() {
		template.URIs = []*url.URL{id.URL()}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate request: %w", err)
	}
	return csr, nil
}

func parseCertificates(raw [][]byte) ([]*x509.Certificate, error) {
	certs := make([]*x509.Certificate, 0, len(raw))
	for _, der := range raw {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

func rawCertificates(certs []*x509.Certificate) [][]byte {
	raw := make([][]byte, len(certs))
	for i, c := range certs {
		raw[i] = c.Raw
	}
	return raw
}

func equalCertificates(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if string(a[i]) != string(b[i]) {
			return false
		}
	}
	return true
}

func containsCertificate(certs [][]byte, cert []byte) bool {
	return slices.ContainsFunc(certs, func(c []byte) bool { return bytes.Equal(c, cert) })
}
