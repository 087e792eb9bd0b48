package endpoint

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/narthex-id/narthex/agent/registry"
)

// This file is the JWT-SVID profile of the Workload API (§6), but for the
// verification of tokens, which is in jwtverify.go.

// Bounds of a request.
const (
	maxAudiences = 32
	maxAudience  = 1 << 10 // bytes of each
	maxSPIFFEID  = 2048    // bytes (SPIFFE-ID §2.3)

	// maxTokensAtOnce is how many tokens one call waits for at a time.
	maxTokensAtOnce = 16
)

const jwtBundlesBundles protowire.Number = 1 // JWTBundlesResponse

// FetchJWTSVID answers with a JWT-SVID of each of the caller's identities, or
// of the one it names, in the order of their entry IDs: §6.2.1.
func (a *workloadAPI) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	audience, err := readAudience(req.GetAudience())
	if err != nil {
		return nil, err
	}
	wanted, err := readSPIFFEID(req.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	c := &caller{server: a.server, subject: &connOf(ctx).subject, encoder: a.jwtSVIDs}
	_, view, err := c.find(ctx)
	if err != nil {
		return nil, err
	}
	defer c.watch.Close()
	svids, err := c.jwtSVIDs(ctx, view, audience, func(v *registry.View) ([]*registry.Entry, error) { return entriesOf(v, wanted) })
	if err != nil {
		return nil, err
	}
	resp := &workload.JWTSVIDResponse{Svids: make([]*workload.JWTSVID, len(svids))}
	for i, s := range svids {
		resp.Svids[i] = &workload.JWTSVID{SpiffeId: s.ID.String(), Svid: s.Compact, Hint: s.entry.Hint}
	}
	return resp, nil
}

// jwtSVID is a token and the entry that it is of.
type jwtSVID struct {
	*registry.Token
	entry *registry.Entry
}

// jwtSVIDs has a JWT-SVID made of each entry that choose takes of what the caller
// may have: of view, and, since making them can take readyWait, of what it may
// have when they are made. It leaves out what is not among that any more.
func (c *caller) jwtSVIDs(ctx context.Context, view *registry.View, audience []string, choose func(*registry.View) ([]*registry.Entry, error)) ([]jwtSVID, error) {
	entries, err := choose(view)
	if err != nil {
		return nil, err
	}
	svids := make([]jwtSVID, len(entries))
	err = c.server.eachEntry(ctx, entries, func(ctx context.Context, i int) error {
		token, err := c.server.agent.JWTSVID(ctx, entries[i], audience)
		svids[i] = jwtSVID{token, entries[i]}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := c.alive(); err != nil {
		return nil, err
	}
	if view, err = c.latest(view); err != nil {
		return nil, err
	}
	if entries, err = choose(view); err != nil {
		return nil, err
	}
	svids = slices.DeleteFunc(svids, func(s jwtSVID) bool {
		return !slices.ContainsFunc(entries, func(e *registry.Entry) bool { return e.ID == s.entry.ID && e.SPIFFEID == s.ID })
	})
	if len(svids) == 0 {
		return nil, status.Error(codes.Unavailable, "what the caller may have has become something else meanwhile: call again")
	}
	return svids, nil
}

// latest returns what the caller may have by now, who had view last, or the
// status to end its call with where that is nothing any more.
func (c *caller) latest(view *registry.View) (*registry.View, error) {
	over, cancel := context.WithCancel(context.Background())
	cancel() // only what has come already
	next, err := c.watch.Next(over)
	for errors.Is(err, registry.ErrInterrupted) { // to be attested again, for which there is no time
		next, err = c.watch.Next(over)
	}
	if next == nil { // nothing has
		return view, nil
	}
	switch c.encoder.standing(next) {
	case unsynced:
		return nil, c.server.takenBack()
	case denied:
		if c.failed != "" {
			return nil, c.unknown()
		}
		return nil, c.deny(next, nil)
	}
	return next, nil
}

// FetchJWTBundles streams the keys with which the caller may verify JWT-SVIDs:
// §6.2.2.
func (a *workloadAPI) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return a.server.watch(stream, a.jwtBundles)
}

// entryStanding is where a caller stands who wants what is signed when it is
// asked for: it needs an entry.
func entryStanding(v *registry.View) standing {
	if stands := standingOf(v); stands == unsynced || stands == denied {
		return stands
	}
	return entitled
}

// keysStanding is where a caller stands who wants keys to verify tokens with.
// Unlike a bundle of certificates, without which there is nobody to verify, one
// without keys is an answer: the server signs no tokens.
func keysStanding(allowUnauthenticated bool) func(*registry.View) standing {
	return func(v *registry.View) standing {
		stands := standingOf(v)
		switch {
		case stands == unsynced, stands == denied && !allowUnauthenticated:
			return stands
		case v.Bundle == nil:
			return pending
		}
		return entitled
	}
}

// readAudience returns an audience sorted and without duplicates. What is empty
// counts for nothing, as the server has it.
func readAudience(audience []string) ([]string, error) {
	if n := len(audience); n > maxAudiences {
		return nil, status.Errorf(codes.InvalidArgument, "the request names %d audiences; at most %d are accepted: make several calls", n, maxAudiences)
	}
	audience = slices.DeleteFunc(slices.Clone(audience), func(a string) bool { return a == "" })
	for _, a := range audience {
		if len(a) > maxAudience {
			return nil, status.Errorf(codes.InvalidArgument, "an audience has %d bytes; at most %d are accepted", len(a), maxAudience)
		}
	}
	if len(audience) == 0 {
		return nil, status.Error(codes.InvalidArgument, "the request names no audience: name the service that is to accept the JWT-SVID")
	}
	slices.Sort(audience)
	return slices.Compact(audience), nil
}

// readSPIFFEID returns the identity that a request asks for; zero is any.
func readSPIFFEID(id string) (spiffeid.ID, error) {
	if id == "" {
		return spiffeid.ID{}, nil
	}
	if len(id) > maxSPIFFEID {
		return spiffeid.ID{}, status.Errorf(codes.InvalidArgument, "the SPIFFE ID asked for has %d bytes; it can have at most %d", len(id), maxSPIFFEID)
	}
	wanted, err := spiffeid.FromString(id)
	if err != nil {
		return spiffeid.ID{}, status.Errorf(codes.InvalidArgument, "the SPIFFE ID asked for is none: %v", err)
	}
	return wanted, nil
}

// entriesOf returns the entries of a view, or those for the identity wanted.
func entriesOf(view *registry.View, wanted spiffeid.ID) ([]*registry.Entry, error) {
	entries := view.Entries()
	if wanted.IsZero() {
		return entries, nil
	}
	entries = slices.DeleteFunc(entries, func(e *registry.Entry) bool { return e.SPIFFEID != wanted })
	if len(entries) == 0 {
		return nil, status.Errorf(codes.PermissionDenied, "the caller is not entitled to %s: leave it out to get what it is entitled to", wanted)
	}
	return entries, nil
}

// eachEntry has a token of each entry made, within the time a caller is held
// for, and turns an error into the status to end the call with.
func (s *Server) eachEntry(ctx context.Context, entries []*registry.Entry, fetch func(context.Context, int) error) error {
	wait, cancel := context.WithTimeout(ctx, firstWait(ctx))
	defer cancel()
	g, wait := errgroup.WithContext(wait)
	g.SetLimit(maxTokensAtOnce)
	for i := range entries {
		g.Go(func() error {
			err := fetch(wait, i)
			if err == nil {
				return nil
			}
			code := codes.Unavailable
			if errors.Is(err, ErrNoTokens) {
				code = codes.Unimplemented
			}
			return status.Errorf(code, "no token of %s: %v", entries[i].SPIFFEID, err)
		})
	}
	err := g.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// ask answers a caller that asks once with what it may have.
func (s *Server) ask(ctx context.Context, e *encoder) (*registry.View, error) {
	c := &caller{server: s, subject: &connOf(ctx).subject, encoder: e}
	_, view, err := c.find(ctx)
	if err != nil {
		return nil, err
	}
	c.watch.Close()
	return unexpired(view, time.Now()), nil
}

// encodeJWTBundles makes a JWTBundlesResponse.
func encodeJWTBundles(v *registry.View) mem.BufferSlice {
	var w wire
	jwks := func(b *registry.Bundle) []byte { return b.JWKS }
	w.bundle(jwtBundlesBundles, v.Bundle, jwks)
	w.bundles(jwtBundlesBundles, v.Federated, jwks)
	return w.done()
}
