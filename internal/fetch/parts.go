package fetch

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// part is one of the streams that an answer is put together from.
type part struct {
	*sheet
	watch    func(context.Context, *part) error
	optional bool          // an agent that does not serve it has the others
	come     bool          // guarded by the sheet's mu
	missing  chan struct{} // closed: the agent does not serve it
}

// sheet is what has come so far.
type sheet struct {
	request Request
	tokens  chan struct{} // JWT-SVIDs are to be asked for again

	mu         sync.Mutex // guards the following, and what on and problem do
	on         func(*Given)
	problem    func(error)
	missing    int // parts that have not come yet
	identities []Identity
	x509       map[spiffeid.TrustDomain][]*x509.Certificate
	jwt, wit   map[spiffeid.TrustDomain]map[string]crypto.PublicKey
}

func (c *Client) parts(s *sheet) []*part {
	one := func(optional bool, watch func(context.Context, *part) error) *part {
		return &part{sheet: s, watch: watch, optional: optional, missing: make(chan struct{})}
	}
	jwtBundles := one(true, func(ctx context.Context, p *part) error { return c.api.WatchJWTBundles(ctx, p) })
	witBundles := one(true, func(ctx context.Context, p *part) error { return c.api.WatchWITBundles(ctx, p) })
	switch s.request.Kind {
	case X509:
		return []*part{one(false, func(ctx context.Context, p *part) error { return c.api.WatchX509Context(ctx, p) })}
	case JWT:
		return []*part{one(false, c.watchTokens), jwtBundles}
	case WIT:
		id := ""
		if !s.request.ID.IsZero() {
			id = s.request.ID.String()
		}
		return []*part{one(false, func(ctx context.Context, p *part) error { return c.api.WatchWITSVIDs(ctx, p, id) }), witBundles}
	}
	return []*part{one(false, func(ctx context.Context, p *part) error { return c.api.WatchX509Bundles(ctx, p) }), jwtBundles, witBundles}
}

// follow watches a part until ctx ends or the API refuses it for good. A stream
// that the agent has cancelled, as one does that ends, is no end to us.
func (s *sheet) follow(ctx context.Context, p *part) error {
	watching, stop := context.WithCancel(ctx)
	defer stop()
	var wait reconnectWait
	for {
		ended := make(chan error, 1)
		go func() { ended <- p.watch(watching, p) }()
		var err error
		select {
		case err = <-ended:
		case <-p.missing:
			stop()
			err = <-ended
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case p.isMissing(): // go-spiffe gives up some streams by itself
			return nil
		case status.Code(err) != codes.Canceled:
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait.Next()):
		}
	}
}

// took notes what a part has brought, and passes it all on once it is complete.
func (p *part) took(change func()) {
	s := p.sheet
	s.mu.Lock()
	defer s.mu.Unlock()
	if !p.come {
		p.come = true
		s.missing--
	}
	change()
	if s.missing > 0 {
		return
	}
	given, err := s.given()
	if err != nil {
		s.problem(err)
		return
	}
	s.on(given)
}

// isMissing tells that the agent does not serve this part.
func (p *part) isMissing() bool {
	select {
	case <-p.missing:
		return true
	default:
		return false
	}
}

func (p *part) trouble(err error) {
	if p.optional && status.Code(err) == codes.Unimplemented {
		if !p.isMissing() {
			close(p.missing)
			p.took(func() {})
		}
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.problem(err)
}

// given is a copy of what has come.
func (s *sheet) given() (*Given, error) {
	g := &Given{Kind: s.request.Kind, Identities: slices.Clone(s.identities)}
	if err := g.pick(&s.request); err != nil {
		return nil, err
	}
	domains := map[spiffeid.TrustDomain]*Bundle{}
	of := func(td spiffeid.TrustDomain) *Bundle {
		if domains[td] == nil {
			domains[td] = &Bundle{TrustDomain: td}
		}
		return domains[td]
	}
	for td, certs := range s.x509 {
		for _, c := range certs {
			of(td).X509 = append(of(td).X509, certPEM(c)...)
		}
		of(td).Certificates = len(certs)
	}
	for td, keys := range s.jwt {
		b := of(td)
		b.JWTKeys = len(keys)
		var err error
		if b.JWT, err = keySet(keys); err != nil {
			return nil, fmt.Errorf("JWT bundle of %s: %w", td, err)
		}
	}
	for td, keys := range s.wit {
		b := of(td)
		b.WITKeys = len(keys)
		var err error
		if b.WIT, err = keySet(keys); err != nil {
			return nil, fmt.Errorf("WIT bundle of %s: %w", td, err)
		}
	}
	for _, b := range domains {
		g.Bundles = append(g.Bundles, *b)
	}
	slices.SortFunc(g.Bundles, func(a, b Bundle) int { return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name()) })
	return g, nil
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// keySet writes keys in one order, so that the same keys are the same bytes.
func keySet(keys map[string]crypto.PublicKey) ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, id := range slices.Sorted(maps.Keys(keys)) {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: keys[id], KeyID: id})
	}
	data, err := json.MarshalIndent(set, "", "  ")
	return append(data, '\n'), err
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (p *part) OnX509ContextUpdate(x *workloadapi.X509Context) {
	identities := make([]Identity, 0, len(x.SVIDs))
	for _, svid := range x.SVIDs {
		chain, key, err := svid.Marshal()
		if err != nil {
			p.trouble(fmt.Errorf("the SVID of %s: %w", svid.ID, err))
			return
		}
		leaf := svid.Certificates[0]
		identities = append(identities, Identity{
			ID: svid.ID, Hint: svid.Hint, Serial: leaf.SerialNumber.Text(16),
			NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Chain: chain, key: key,
		})
	}
	p.took(func() { p.identities, p.x509 = identities, authorities(x.Bundles) })
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (p *part) OnX509ContextWatchError(err error) { p.trouble(err) }

// OnX509BundlesUpdate implements workloadapi.X509BundleWatcher.
func (p *part) OnX509BundlesUpdate(set *x509bundle.Set) {
	p.took(func() { p.x509 = authorities(set) })
}

// OnX509BundlesWatchError implements workloadapi.X509BundleWatcher.
func (p *part) OnX509BundlesWatchError(err error) { p.trouble(err) }

func authorities(set *x509bundle.Set) map[spiffeid.TrustDomain][]*x509.Certificate {
	all := map[spiffeid.TrustDomain][]*x509.Certificate{}
	for _, b := range set.Bundles() {
		all[b.TrustDomain()] = b.X509Authorities()
	}
	return all
}

// OnJWTBundlesUpdate implements workloadapi.JWTBundleWatcher. A token of a key
// that is gone is good for nothing, so tokens are asked for again.
func (p *part) OnJWTBundlesUpdate(set *jwtbundle.Set) {
	keys := map[spiffeid.TrustDomain]map[string]crypto.PublicKey{}
	for _, b := range set.Bundles() {
		keys[b.TrustDomain()] = b.JWTAuthorities()
	}
	p.took(func() { p.jwt = keys })
	select {
	case p.tokens <- struct{}{}:
	default:
	}
}

// OnJWTBundlesWatchError implements workloadapi.JWTBundleWatcher.
func (p *part) OnJWTBundlesWatchError(err error) { p.trouble(err) }

// OnWITSVIDsUpdate implements workloadapi.WITSVIDWatcher.
func (p *part) OnWITSVIDsUpdate(svids []*witsvid.SVID) {
	identities := make([]Identity, 0, len(svids))
	for _, svid := range svids {
		key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
		if err != nil {
			p.trouble(fmt.Errorf("the key of %s: %w", svid.ID, err))
			return
		}
		identities = append(identities, Identity{
			ID: svid.ID, Hint: svid.Hint, NotAfter: svid.Expiry, Token: svid.Marshal(),
			key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		})
	}
	p.took(func() { p.identities = identities })
}

// OnWITSVIDsWatchError implements workloadapi.WITSVIDWatcher.
func (p *part) OnWITSVIDsWatchError(err error) { p.trouble(err) }

// OnWITBundlesUpdate implements workloadapi.WITBundleWatcher.
func (p *part) OnWITBundlesUpdate(set *witbundle.Set) {
	keys := map[spiffeid.TrustDomain]map[string]crypto.PublicKey{}
	for _, b := range set.Bundles() {
		keys[b.TrustDomain()] = b.WITAuthorities()
	}
	p.took(func() { p.wit = keys })
}

// OnWITBundlesWatchError implements workloadapi.WITBundleWatcher.
func (p *part) OnWITBundlesWatchError(err error) { p.trouble(err) }

// watchTokens asks for JWT-SVIDs, for which there is no stream (SPIFFE Workload
// API §6.2.1), and again when half of the time they had left is over: the agent
// renews them before that much of their life is gone.
func (c *Client) watchTokens(ctx context.Context, p *part) error {
	params := jwtsvid.Params{Audience: p.request.Audience[0], ExtraAudiences: p.request.Audience[1:], Subject: p.request.ID}
	var wait reconnectWait
	for {
		svids, err := c.api.FetchJWTSVIDs(ctx, params)
		var next time.Duration
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			p.trouble(err)
			next = wait.Next()
		default:
			wait.Reset()
			identities := make([]Identity, 0, len(svids))
			for _, svid := range svids {
				identities = append(identities, Identity{ID: svid.ID, Hint: svid.Hint, Audience: svid.Audience, NotAfter: svid.Expiry, Token: svid.Marshal()})
			}
			next = max(time.Until((&Given{Identities: identities}).Ends())/2, time.Second)
			p.took(func() { p.identities = identities })
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(next):
		case <-p.tokens:
		}
	}
}
