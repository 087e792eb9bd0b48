package spire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

const (
	stepSync = "sync entries"

	// maxEntries bounds what a server can make an agent hold. Nodes have
	// tens to thousands of entries.
	maxEntries = 250_000

	// maxMalformed bounds SyncStats.Malformed.
	maxMalformed = 16

	// maxUnixTime is the last second of the year 9999, the last one that
	// RFC 3339 can write.
	maxUnixTime = 253402300799

	maxSPIFFEID = 2048 // bytes (SPIFFE-ID §2.3)
	maxHint     = 1024 // bytes (SPIFFE Workload API §8)
)

// entryMask asks for what registry.Entry holds. Without the revision number
// the server refuses the call.
var entryMask = &types.EntryMask{
	SpiffeId:       true,
	Selectors:      true,
	FederatesWith:  true,
	Admin:          true,
	Downstream:     true,
	ExpiresAt:      true,
	RevisionNumber: true,
	StoreSvid:      true,
	Hint:           true,
	CreatedAt:      true,

	AdditionalAttributes: true, // unknown to servers before 1.15, which leave it out
}

// SyncStats tells how a Sync went, for logs and metrics.
type SyncStats struct {
	Total   int // entries returned
	Fetched int // entries the server sent in full
	Removed int // known entries that are no longer this agent's
	// LeftOut counts entries that make no sense: another trust domain's
	// SPIFFE ID, no selector, listed but never sent. Malformed says what is
	// wrong with the first 16 of them.
	LeftOut   int
	Malformed []error
	// Unpaged says that the server is too old for SyncAuthorizedEntries.
	Unpaged bool
	// Server tells apart the servers that one name stands for: the serial
	// number, hexadecimal, of the certificate of the one that answered. It has
	// another one after each of its rotations.
	Server string
}

// Sync returns the complete set of entries the server authorizes this agent
// for, by id, with selectors and trust domains sorted. Known is what an
// earlier call returned: a server with more than a page (500) of entries sends
// their ids and revisions, and in full only those that are not known in that
// revision and creation time. Unchanged entries are returned as they were
// handed in.
//
// Entries that make no sense are left out and reported in the stats. More than
// 250,000 entries are an error.
func (c *Client) Sync(ctx context.Context, known []registry.Entry) ([]registry.Entry, SyncStats, error) {
	var s *syncing
	err := c.call(ctx, stepSync, func(ctx context.Context, cn *conn) error {
		client := entryv1.NewEntryClient(cn.cc)
		if !cn.unpaged.Load() {
			s = c.newSyncing(known)
			err := s.stream(ctx, client)
			if status.Code(err) != codes.Unimplemented {
				return err
			}
			c.log.Info("server is too old for SyncAuthorizedEntries, using GetAuthorizedEntries", "server", c.address)
			cn.unpaged.Store(true)
		}
		s = c.newSyncing(known)
		s.stats.Unpaged = true
		var p peer.Peer
		answer, err := client.GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{OutputMask: entryMask}, grpc.Peer(&p))
		if err != nil {
			return err
		}
		s.stats.Server = serialOf(&p)
		return s.takeAll(answer.GetEntries())
	})
	if err != nil {
		return nil, SyncStats{}, err
	}
	entries, stats := s.finish()
	return entries, stats, nil
}

// syncing is one Sync under way.
type syncing struct {
	trustDomain spiffeid.TrustDomain
	known       *knownEntries
	seen        []bool                    // slots of known that the server has listed
	changed     map[string]revision       // what it has listed beside, by id
	record      entryv1.EntryRevision     // decoded last
	still       int                       // how many of known are as they were
	kept        []bool                    // those of known.list; nil: none, or all
	entries     map[string]registry.Entry // the others of the new set
	stats       SyncStats
}

func (c *Client) newSyncing(known []registry.Entry) *syncing {
	k := c.known.Load()
	if !k.isOf(known) {
		k = newKnownEntries(known)
		c.known.Store(k)
	}
	return &syncing{trustDomain: c.trustDomain, known: k, seen: make([]bool, len(k.slots)), changed: map[string]revision{}, entries: map[string]registry.Entry{}}
}

// stream speaks SyncAuthorizedEntries: either the first answer is the whole
// list, or it begins a list of revisions, and what is new or stale of those is
// asked for a page at a time.
func (s *syncing) stream(ctx context.Context, client entryv1.EntryClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream, which the server takes for a normal end
	stream, err := client.SyncAuthorizedEntries(ctx, grpc.ForceCodecV2(inRaw))
	if err != nil {
		return err
	}
	if err := send(stream, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: entryMask}); err != nil {
		return err
	}
	page, entries, err := s.list(stream)
	if err != nil {
		return err
	}
	if p, ok := peer.FromContext(stream.Context()); ok {
		s.stats.Server = serialOf(p)
	}
	if entries != nil {
		return s.takePages(stream, entries, nil)
	}
	pageSize := page.revisions
	for page.more {
		if page, entries, err = s.list(stream); err != nil {
			return err
		}
		if len(entries.GetEntries()) > 0 {
			return badAnswer("entries among the revisions")
		}
	}
	for asked := range slices.Chunk(s.wanted(), pageSize) {
		if err := send(stream, &entryv1.SyncAuthorizedEntriesRequest{Ids: asked}); err != nil {
			return err
		}
		answer, err := receive(stream)
		if err != nil {
			return err
		}
		if err := s.takePages(stream, answer, asked); err != nil {
			return err
		}
	}
	return nil
}

// serialOf is the serial number of the certificate of a server that was called.
func serialOf(p *peer.Peer) string {
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return ""
	}
	return info.State.PeerCertificates[0].SerialNumber.Text(16)
}

type entryStream = entryv1.Entry_SyncAuthorizedEntriesClient

func send(stream entryStream, req *entryv1.SyncAuthorizedEntriesRequest) error {
	// A Send that fails with EOF leaves the reason to Recv.
	if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

var errEarlyEnd = badAnswer("the stream ended early")

func receive(stream entryStream) (*entryv1.SyncAuthorizedEntriesResponse, error) {
	answer, err := stream.Recv()
	switch {
	case errors.Is(err, io.EOF):
		return nil, errEarlyEnd
	case err != nil:
		return nil, err
	}
	return answer, checkPage(answer)
}

// checkPage keeps a stream of nothing from going on until the call's time is
// up.
func checkPage(answer *entryv1.SyncAuthorizedEntriesResponse) error {
	if answer.GetMore() && len(answer.GetEntryRevisions())+len(answer.GetEntries()) == 0 {
		return badAnswer("an empty page that is not the last")
	}
	return nil
}

// takePages reads full entries: those of the sorted ids asked for, or all of
// the agent's where asked is nil.
func (s *syncing) takePages(stream entryStream, answer *entryv1.SyncAuthorizedEntriesResponse, asked []string) error {
	missing := make(map[string]bool, len(asked))
	for _, id := range asked {
		missing[id] = true
	}
	for {
		if len(answer.GetEntryRevisions()) > 0 {
			return badAnswer("revisions among the entries")
		}
		for _, e := range answer.GetEntries() {
			if asked != nil && !missing[e.GetId()] {
				s.leaveOut(fmt.Errorf("entry %q: sent without being asked for", e.GetId()))
				continue
			}
			delete(missing, e.GetId())
			if err := s.take(e); err != nil {
				return err
			}
		}
		if !answer.GetMore() {
			break
		}
		var err error
		if answer, err = receive(stream); err != nil {
			return err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(missing)) {
		// Nobody knows what it says now, so what it said before is not
		// served either.
		s.leaveOut(fmt.Errorf("entry %q: listed, but not sent", id))
	}
	return nil
}

func (s *syncing) takeAll(entries []*types.Entry) error {
	for _, e := range entries {
		if err := s.take(e); err != nil {
			return err
		}
	}
	return nil
}

// take adds one entry from the server to the new set. The error is that the
// set is full.
func (s *syncing) take(e *types.Entry) error {
	s.stats.Fetched++
	if s.stats.Fetched > maxEntries {
		return tooMany()
	}
	entry, err := parseEntry(e, s.trustDomain)
	if err == nil {
		if _, twice := s.entries[entry.ID]; twice {
			err = errors.New("sent twice")
		}
	}
	if err != nil {
		s.leaveOut(fmt.Errorf("entry %q: %w", e.GetId(), err))
		return nil
	}
	s.entries[entry.ID] = entry
	return nil
}

func (s *syncing) leaveOut(err error) {
	s.stats.LeftOut++
	if len(s.stats.Malformed) < maxMalformed {
		s.stats.Malformed = append(s.stats.Malformed, err)
	}
}

// finish returns the new set. Where nothing has changed, it is the known one.
func (s *syncing) finish() ([]registry.Entry, SyncStats) {
	s.stats.Total = s.still + len(s.entries)
	if len(s.entries) == 0 && s.still == len(s.known.list) {
		return s.known.list, s.stats
	}
	entries := make([]registry.Entry, 0, s.stats.Total)
	for i := range s.known.list {
		e := &s.known.list[i]
		if s.kept != nil && s.kept[i] {
			entries = append(entries, *e)
		} else if _, ok := s.entries[e.ID]; !ok {
			s.stats.Removed++
		}
	}
	for _, e := range s.entries {
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b registry.Entry) int { return strings.Compare(a.ID, b.ID) })
	return entries, s.stats
}

func tooMany() error {
	return badAnswer("more than %d entries", maxEntries)
}

// parseEntry fails on an entry that this agent could not serve, or that its
// server should not have.
func parseEntry(e *types.Entry, td spiffeid.TrustDomain) (registry.Entry, error) {
	var none registry.Entry
	if e.GetId() == "" {
		return none, errors.New("it has no id")
	}
	id, err := parseID(e.GetSpiffeId())
	switch {
	case err != nil:
		return none, fmt.Errorf("SPIFFE ID: %w", err)
	case !id.MemberOf(td):
		return none, fmt.Errorf("%s is of another trust domain", id)
	case id.Path() == "":
		return none, fmt.Errorf("%s has no path", id)
	case len(id.String()) > maxSPIFFEID:
		return none, fmt.Errorf("SPIFFE ID: it has %d bytes, at most %d are accepted", len(id.String()), maxSPIFFEID)
	case e.GetRevisionNumber() < 0:
		return none, fmt.Errorf("revision %d", e.GetRevisionNumber())
	case len(e.GetSelectors()) == 0:
		return none, errors.New("it has no selector")
	case len(e.GetHint()) > maxHint:
		return none, fmt.Errorf("its hint has %d bytes, at most %d are accepted", len(e.GetHint()), maxHint)
	}
	entry := registry.Entry{
		ID:         e.GetId(),
		SPIFFEID:   id,
		Hint:       e.GetHint(),
		Revision:   e.GetRevisionNumber(),
		Admin:      e.GetAdmin(),
		Downstream: e.GetDownstream(),
		StoreSVID:  e.GetStoreSvid(),
		JTI:        e.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
	}
	if entry.CreatedAt, err = fromUnix(e.GetCreatedAt()); err != nil {
		return none, fmt.Errorf("created_at: %w", err)
	}
	if entry.ExpiresAt, err = fromUnix(e.GetExpiresAt()); err != nil {
		return none, fmt.Errorf("expires_at: %w", err)
	}
	if entry.Selectors, err = parseSelectors(e.GetSelectors()); err != nil {
		return none, err
	}
	if entry.FederatesWith, err = parseFederatesWith(e.GetFederatesWith(), td); err != nil {
		return none, err
	}
	return entry, nil
}

// parseID reads a SPIFFE ID of the API, whose path should begin with a slash
// but need not.
func parseID(p *types.SPIFFEID) (spiffeid.ID, error) {
	if strings.Contains(p.GetTrustDomain(), "/") {
		return spiffeid.ID{}, fmt.Errorf("trust domain %q: want a name", p.GetTrustDomain())
	}
	td, err := spiffeid.TrustDomainFromString(p.GetTrustDomain())
	if err != nil {
		return spiffeid.ID{}, err
	}
	path := p.GetPath()
	if path != "" && !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	return spiffeid.FromPath(td, path)
}

func parseSelectors(selectors []*types.Selector) ([]attestor.Selector, error) {
	parsed := make([]attestor.Selector, 0, len(selectors))
	for _, s := range selectors {
		if s.GetType() == "" || strings.Contains(s.GetType(), ":") || s.GetValue() == "" {
			return nil, fmt.Errorf("selector %q: want type:value", s.GetType()+":"+s.GetValue())
		}
		parsed = append(parsed, attestor.Selector{Type: s.GetType(), Value: s.GetValue()})
	}
	slices.SortFunc(parsed, func(a, b attestor.Selector) int {
		return cmp.Or(strings.Compare(a.Type, b.Type), strings.Compare(a.Value, b.Value))
	})
	return slices.Compact(parsed), nil
}

func parseFederatesWith(names []string, own spiffeid.TrustDomain) ([]spiffeid.TrustDomain, error) {
	var parsed []spiffeid.TrustDomain
	for _, name := range names {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("federates with %q: %w", name, err)
		}
		if td != own { // every entry has that bundle anyway
			parsed = append(parsed, td)
		}
	}
	slices.SortFunc(parsed, spiffeid.TrustDomain.Compare)
	return slices.Compact(parsed), nil
}

// fromUnix reads a time of the API, in seconds; 0 is none.
func fromUnix(seconds int64) (time.Time, error) {
	switch {
	case seconds == 0:
		return time.Time{}, nil
	case seconds < 0 || seconds > maxUnixTime:
		return time.Time{}, fmt.Errorf("%d s is out of range", seconds)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

func toUnix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
