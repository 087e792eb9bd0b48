package endpoint

import (
	"context"
	"encoding/asn1"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// delegatedIdentity gives delegates the identities of other processes, which
// they name by selectors or PID: spire.api.agent.delegatedidentity.v1. What it
// serves ends when the delegate is none any more, and with the process named by
// PID.
type delegatedIdentity struct {
	delegatedidentityv1.UnimplementedDelegatedIdentityServer
	server    *Server
	agent     AdminAgent
	delegates map[spiffeid.ID]struct{}

	x509SVIDs   *encoder
	x509Bundles *encoder
	jwtSVIDs    *encoder
	jwtBundles  *encoder
}

func newDelegatedIdentity(s *Server, cfg *AdminConfig) *delegatedIdentity {
	d := &delegatedIdentity{
		server: s, agent: cfg.Agent, delegates: make(map[spiffeid.ID]struct{}, len(cfg.Delegates)),
		x509SVIDs:   &encoder{method: "SubscribeToX509SVIDs", standing: standingOf, encode: encodeDelegatedX509SVIDs, mayBeEmpty: true},
		x509Bundles: &encoder{method: "SubscribeToX509Bundles", standing: bundleStanding(true), encode: encodeDelegatedX509Bundles},
		jwtSVIDs:    &encoder{method: "FetchJWTSVIDs", standing: entryStanding, early: true, mayBeEmpty: true},
		jwtBundles:  &encoder{method: "SubscribeToJWTBundles", standing: keysStanding(true), encode: encodeDelegatedJWTBundles},
	}
	for _, id := range cfg.Delegates {
		d.delegates[id] = struct{}{}
	}
	return d
}

func isDelegated(method string) bool {
	return strings.HasPrefix(method, "/"+delegatedidentityv1.DelegatedIdentity_ServiceDesc.ServiceName+"/")
}

// SubscribeToX509SVIDs streams the X.509-SVIDs of a process. One that no entry
// matches has none, which is an answer like others.
func (d *delegatedIdentity) SubscribeToX509SVIDs(req *delegatedidentityv1.SubscribeToX509SVIDsRequest, stream grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToX509SVIDsResponse]) error {
	return d.asDelegate(stream.Context(), d.x509SVIDs.method, func(ctx context.Context) error {
		return d.about(ctx, req, d.x509SVIDs, func(ctx context.Context, c *caller, begin beginning) error {
			return c.serve(ctx, stream, begin)
		})
	})
}

// SubscribeToX509Bundles streams the X.509 bundles of all trust domains that the
// agent knows.
func (d *delegatedIdentity) SubscribeToX509Bundles(_ *delegatedidentityv1.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToX509BundlesResponse]) error {
	return d.bundles(stream, d.x509Bundles)
}

// bundles streams what e makes of all bundles.
func (d *delegatedIdentity) bundles(stream grpc.ServerStream, e *encoder) error {
	return d.asDelegate(stream.Context(), e.method, func(ctx context.Context) error {
		conn := connOf(ctx)
		c := &caller{server: d.server, subject: &subject{user: conn.user}, delegate: &conn.subject, encoder: e}
		return c.serve(ctx, stream, c.beginWith(d.agent.WatchBundles))
	})
}

// asDelegate runs f for as long as the caller is a delegate.
func (d *delegatedIdentity) asDelegate(ctx context.Context, method string, f func(context.Context) error) error {
	ctx, free := d.server.tie(ctx)
	defer free()
	c := &caller{
		server: d.server, subject: &connOf(ctx).subject,
		encoder: &encoder{method: method, early: true, standing: d.standing, refuse: d.refuse},
	}
	var view *registry.View
	if err := c.server.deep.do(func() (err error) { view, err = c.begin(ctx); return err }); err != nil {
		return err
	}
	defer c.end()
	if !d.server.held.add(c.watch) {
		return errStopping
	}
	return during(ctx, func(ctx context.Context) error { return c.remain(ctx, view) }, f)
}

// remain returns once the caller is not entitled any more, with the status that
// says so, or else the error of ctx.
func (c *caller) remain(ctx context.Context, view *registry.View) error {
	for {
		switch c.encoder.standing(view) {
		case unsynced:
			return c.server.takenBack()
		case denied:
			if c.lapsed && c.failed != "" {
				return c.unknown()
			}
			return c.deny(view, nil)
		case pending, entitled, unoffered:
		}
		var err error
		if view, err = c.next(ctx, time.Time{}); err != nil {
			return err
		}
	}
}

// standing is where a caller stands who wants to be a delegate.
func (d *delegatedIdentity) standing(v *registry.View) standing {
	switch {
	case !v.Synced:
		return unsynced
	case slices.ContainsFunc(v.Entries(), func(e *registry.Entry) bool { _, ok := d.delegates[e.SPIFFEID]; return ok }):
		return entitled
	}
	return denied
}

// refuse tells those who have no identity from those whose identity is no
// delegate's.
func (d *delegatedIdentity) refuse(v *registry.View) *refusal {
	if len(v.Entries()) == 0 {
		return noIdentity
	}
	return notDelegate
}

var notDelegate = &refusal{
	status: status.Error(codes.PermissionDenied, "caller not configured as an authorized delegate: none of its SPIFFE IDs is among agent.admin.authorized_delegates"),
	event:  "not a delegate",
	hint:   "add one of the caller's SPIFFE IDs to agent.admin.authorized_delegates if it may have the identities of others",
}

// beginning returns the first view of a call, with a watch in place.
type beginning func(context.Context) (*registry.View, error)

// beginWith is begin of a caller that is not attested.
func (c *caller) beginWith(watch func() *registry.Watch) beginning {
	return func(ctx context.Context) (*registry.View, error) {
		view, err := c.first(ctx, watch)
		if err != nil {
			c.watch.Close()
		}
		return view, err
	}
}

// subjectRequest names a process.
type subjectRequest interface {
	GetSelectors() []*types.Selector
	GetPid() int32
}

// about runs f for as long as the process is there that the request names by
// PID, or else for a process with the selectors that it gives: those, the delegate
// vouches for.
func (d *delegatedIdentity) about(ctx context.Context, req subjectRequest, e *encoder, f func(context.Context, *caller, beginning) error) error {
	selectors, err := parseSubject(req)
	if err != nil {
		return err
	}
	conn := connOf(ctx)
	c := &caller{server: d.server, subject: &subject{user: conn.user}, delegate: &conn.subject, encoder: e}
	if len(selectors) > 0 {
		return f(ctx, c, c.beginWith(func() *registry.Watch { return c.watchFor(selectors) }))
	}
	process, err := pinFor(int(req.GetPid()))
	if err != nil {
		return err
	}
	defer process.Close()
	c.subject.process = process
	return during(ctx, c.untilGone, func(ctx context.Context) error { return f(ctx, c, c.begin) })
}

// pinFor pins a process that somebody names by PID.
func pinFor(pid int) (*attestor.Process, error) {
	process, err := attestor.Pin(pid)
	switch {
	case errors.Is(err, attestor.ErrProcessGone):
		return nil, status.Error(codes.NotFound, err.Error())
	case err != nil:
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return process, nil
}

// Bounds of what a delegate says of a process, beside those of a message.
const (
	maxSelectors      = 1024
	maxSelectorLength = 4096 // of type and value
)

// parseSubject returns the selectors of a request, or none where it has a PID.
func parseSubject(req subjectRequest) ([]attestor.Selector, error) {
	given, pid := req.GetSelectors(), req.GetPid()
	switch {
	case (len(given) == 0) == (pid == 0):
		return nil, status.Error(codes.InvalidArgument, "must provide either selectors or non-zero PID, but not both")
	case pid < 0:
		return nil, status.Errorf(codes.InvalidArgument, "pid is %d: want the number of a process", pid)
	case len(given) > maxSelectors:
		return nil, status.Errorf(codes.InvalidArgument, "the request has %d selectors: a process may have %d", len(given), maxSelectors)
	}
	selectors := make([]attestor.Selector, len(given))
	for i, s := range given {
		kind, value := s.GetType(), s.GetValue()
		switch {
		case kind == "" || value == "":
			return nil, status.Errorf(codes.InvalidArgument, "selector %d has no type or no value: want for example type \"unix\" and value \"uid:1000\"", i+1)
		case strings.Contains(kind, ":"):
			return nil, status.Errorf(codes.InvalidArgument, "selector %d has a type with a colon: want for example type \"unix\" and value \"uid:1000\"", i+1)
		case len(kind)+len(value) > maxSelectorLength:
			return nil, status.Errorf(codes.InvalidArgument, "selector %d has %d bytes: at most %d", i+1, len(kind)+len(value), maxSelectorLength)
		}
		selectors[i] = attestor.Selector{Type: kind, Value: value}
	}
	return selectors, nil
}

// Field numbers of delegatedidentity.proto and the messages of spire.api.types
// in it.
const (
	delegatedSVIDs     protowire.Number = 1 // SubscribeToX509SVIDsResponse
	delegatedFederates protowire.Number = 2

	delegatedSVID protowire.Number = 1 // X509SVIDWithKey
	delegatedKey  protowire.Number = 2

	typeSVIDChain   protowire.Number = 1 // X509SVID
	typeSVIDID      protowire.Number = 2
	typeSVIDExpires protowire.Number = 3
	typeSVIDHint    protowire.Number = 4

	typeIDDomain protowire.Number = 1 // SPIFFEID
	typeIDPath   protowire.Number = 2

	delegatedAuthorities protowire.Number = 1 // SubscribeToX509BundlesResponse
)

// encodeDelegatedX509SVIDs makes a SubscribeToX509SVIDsResponse.
func encodeDelegatedX509SVIDs(v *registry.View) mem.BufferSlice {
	var w wire
	for _, i := range v.Identities {
		if hidden(i.Entry) {
			continue
		}
		var id, svid, withKey wire
		id.text(typeIDDomain, i.SVID.ID.TrustDomain().Name())
		id.text(typeIDPath, i.SVID.ID.Path())
		for _, der := range certificatesOf(i.SVID.Chain) {
			svid.shared(typeSVIDChain, der)
		}
		svid.message(typeSVIDID, &id)
		svid.number(typeSVIDExpires, uint64(i.SVID.NotAfter.Unix()))
		svid.text(typeSVIDHint, i.Entry.Hint)
		withKey.message(delegatedSVID, &svid)
		withKey.shared(delegatedKey, i.SVID.Key)
		w.message(delegatedSVIDs, &withKey)
	}
	domains := make([]string, 0, len(v.Federated))
	for td := range v.Federated {
		domains = append(domains, td.IDString())
	}
	slices.Sort(domains)
	for _, name := range domains {
		w.text(delegatedFederates, name)
	}
	return w.done()
}

// certificatesOf returns the parts of a chain of DER certificates.
func certificatesOf(chain []byte) (ders [][]byte) {
	for len(chain) > 0 {
		var der asn1.RawValue
		rest, err := asn1.Unmarshal(chain, &der)
		if err != nil {
			return ders // registry.NewSVID has parsed it
		}
		ders, chain = append(ders, der.FullBytes), rest
	}
	return ders
}

// encodeDelegatedX509Bundles makes a SubscribeToX509BundlesResponse.
func encodeDelegatedX509Bundles(v *registry.View) mem.BufferSlice {
	var w wire
	w.bundle(delegatedAuthorities, v.Bundle, certificates)
	w.bundles(delegatedAuthorities, v.Federated, certificates)
	return w.done()
}
