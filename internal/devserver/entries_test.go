package devserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

var fullMask = &types.EntryMask{
	SpiffeId: true, ParentId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, ExpiresAt: true,
	DnsNames: true, RevisionNumber: true, StoreSvid: true, X509SvidTtl: true, JwtSvidTtl: true, Hint: true, CreatedAt: true,
}

// syncWhole is a sync of at most a page.
func syncWhole(t testing.TB, c client, mask *types.EntryMask) []*types.Entry {
	t.Helper()
	stream, err := c.SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if resp.More || len(resp.EntryRevisions) > 0 {
		t.Errorf("more %t, %d revisions", resp.More, len(resp.EntryRevisions))
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the whole list: %v, want the end", err)
	}
	return resp.Entries
}

func TestSyncWhole(t *testing.T) {
	full := workload("full", "uid:1", "gid:2")
	full.TTL = 1500 * time.Millisecond
	full.Hint = "internal"
	full.DNSNames = []string{"a.internal", "*.b.internal"}
	full.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.test")}
	full.ID = "entry-1"
	srv, _ := serve(t, Config{Entries: []Entry{full}})
	c, cert := agent(t, srv)
	got := syncWhole(t, c, fullMask)
	want := &types.Entry{
		Id:            "entry-1",
		SpiffeId:      &types.SPIFFEID{TrustDomain: "dev.test", Path: "/full"},
		ParentId:      &types.SPIFFEID{TrustDomain: "dev.test", Path: agentID(cert).Path()},
		Selectors:     []*types.Selector{{Type: "unix", Value: "uid:1"}, {Type: "unix", Value: "gid:2"}},
		X509SvidTtl:   2,
		Hint:          "internal",
		DnsNames:      []string{"a.internal", "*.b.internal"},
		FederatesWith: []string{"other.test"},
	}
	if len(got) != 1 {
		t.Fatalf("%d entries", len(got))
	}
	if got[0].RevisionNumber == 0 || got[0].CreatedAt == 0 {
		t.Errorf("revision %d, created at %d", got[0].RevisionNumber, got[0].CreatedAt)
	}
	want.RevisionNumber, want.CreatedAt = got[0].RevisionNumber, got[0].CreatedAt
	if !proto.Equal(got[0], want) {
		t.Errorf("got  %v\nwant %v", got[0], want)
	}
	if nomask := syncWhole(t, c, nil); !proto.Equal(nomask[0], want) {
		t.Errorf("without a mask: %v", nomask[0])
	}

	resp, err := c.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil || len(resp.Entries) != 1 || !proto.Equal(resp.Entries[0], want) {
		t.Errorf("GetAuthorizedEntries: %v %v", resp, err)
	}
	masks := map[string]*types.EntryMask{
		"spiffe_id": {SpiffeId: true}, "parent_id": {ParentId: true}, "selectors": {Selectors: true},
		"x509_svid_ttl": {X509SvidTtl: true}, "hint": {Hint: true}, "dns_names": {DnsNames: true},
		"federates_with": {FederatesWith: true}, "revision_number": {RevisionNumber: true}, "created_at": {CreatedAt: true},
	}
	for field, mask := range masks {
		resp, err := c.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{OutputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		only := &types.Entry{Id: want.Id}
		fields := want.ProtoReflect().Descriptor().Fields()
		fd := fields.ByName(protoreflect.Name(field))
		only.ProtoReflect().Set(fd, want.ProtoReflect().Get(fd))
		if !proto.Equal(resp.Entries[0], only) {
			t.Errorf("mask %s: got %v", field, resp.Entries[0])
		}
	}
}

func TestSyncPageBoundary(t *testing.T) {
	srv, _ := serve(t, Config{Entries: numbered(entryPage, 0)})
	c, _ := agent(t, srv)
	if got := syncWhole(t, c, fullMask); len(got) != entryPage {
		t.Errorf("%d entries", len(got))
	}
	if err := srv.SetEntries(nil); err != nil {
		t.Fatal(err)
	}
	if got := syncWhole(t, c, fullMask); len(got) != 0 {
		t.Errorf("%d entries", len(got))
	}
}

func numbered(n int, ttl time.Duration) []Entry {
	entries := make([]Entry, n)
	for i := range entries {
		entries[i] = workload(fmt.Sprintf("w/%d", i), fmt.Sprintf("uid:%d", i))
		entries[i].TTL = ttl
	}
	return entries
}

// deltaStream is a sync of more than a page, up to where the agent asks.
type deltaStream struct {
	t      *testing.T
	stream entryv1.Entry_SyncAuthorizedEntriesClient
	pages  []int
	known  map[string]*entryv1.EntryRevision
}

func syncDelta(t *testing.T, c client) *deltaStream {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	stream, err := c.SyncAuthorizedEntries(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true, RevisionNumber: true}}); err != nil {
		t.Fatal(err)
	}
	d := &deltaStream{t: t, stream: stream, known: make(map[string]*entryv1.EntryRevision)}
	for more := true; more; {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Entries) > 0 {
			t.Error("whole entries before they are asked for")
		}
		more = resp.More
		d.pages = append(d.pages, len(resp.EntryRevisions))
		for _, r := range resp.EntryRevisions {
			d.known[r.Id] = r
		}
	}
	return d
}

func (d *deltaStream) ask(ids ...string) (pages []int, entries []*types.Entry) {
	d.t.Helper()
	if err := d.stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
		d.t.Fatal(err)
	}
	for more := true; more; {
		resp, err := d.stream.Recv()
		if err != nil {
			d.t.Fatal(err)
		}
		more = resp.More
		pages = append(pages, len(resp.Entries))
		entries = append(entries, resp.Entries...)
	}
	return pages, entries
}

func TestSyncDelta(t *testing.T) {
	srv, _ := serve(t, Config{Entries: numbered(1201, 0)})
	c, _ := agent(t, srv)
	d := syncDelta(t, c)
	if !slices.Equal(d.pages, []int{500, 500, 201}) || len(d.known) != 1201 {
		t.Fatalf("pages %v, %d entries", d.pages, len(d.known))
	}
	var ids []string
	for id := range d.known {
		ids = append(ids, id)
	}
	pages, entries := d.ask(ids...) // in no order
	if !slices.Equal(pages, []int{500, 500, 201}) {
		t.Errorf("all asked for at once come in pages %v", pages)
	}
	for i, e := range entries {
		if r := d.known[e.Id]; r == nil || r.RevisionNumber != e.RevisionNumber || r.CreatedAt == 0 || e.SpiffeId == nil {
			t.Fatalf("entry %v with revision %v", e, r)
		}
		if e.Selectors != nil || e.CreatedAt != 0 {
			t.Fatalf("mask of the first request not kept: %v", e)
		}
		if i > 0 && entries[i-1].Id >= e.Id {
			t.Fatal("entries are not ordered by ID")
		}
	}
	if pages, _ := d.ask(ids[:500]...); !slices.Equal(pages, []int{500}) {
		t.Errorf("one page asked for comes in %v", pages)
	}
	if pages, got := d.ask("gone", ids[0], "zzz"); !slices.Equal(pages, []int{1}) || got[0].Id != ids[0] {
		t.Errorf("unknown IDs: %v %v", pages, got)
	}
	if pages, _ := d.ask("gone"); !slices.Equal(pages, []int{0}) {
		t.Errorf("nothing found comes in %v", pages)
	}
	if err := d.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want the end", err)
	}
}

func TestSyncDeltaAfterChange(t *testing.T) {
	entries := numbered(1201, 0)
	srv, _ := serve(t, Config{Entries: entries})
	c, _ := agent(t, srv)
	before := syncDelta(t, c)

	entries[7].TTL = time.Minute // changed
	entries[8].Selectors[0].Value = "uid:9999"
	if err := srv.SetEntries(entries[1:]); err != nil {
		t.Fatal(err)
	}
	if _, got := before.ask(idOf(entries[0])); len(got) != 1 {
		t.Error("a running sync sees two states of the list")
	}
	after := syncDelta(t, c)
	var changed, added, removed []string
	for id, r := range after.known {
		switch was := before.known[id]; {
		case was == nil:
			added = append(added, id)
		case was.RevisionNumber != r.RevisionNumber || was.CreatedAt != r.CreatedAt:
			changed = append(changed, id)
		}
	}
	for id := range before.known {
		if after.known[id] == nil {
			removed = append(removed, id)
		}
	}
	if !slices.Equal(changed, []string{idOf(entries[7])}) || !slices.Equal(added, []string{idOf(entries[8])}) || len(removed) != 2 {
		t.Errorf("changed %v, added %v, removed %v", changed, added, removed)
	}

	// Back under the same ID, in the same second: another revision.
	if err := srv.SetEntries(entries); err != nil {
		t.Fatal(err)
	}
	id := idOf(entries[0])
	if again := syncDelta(t, c).known[id]; again.RevisionNumber == before.known[id].RevisionNumber {
		t.Error("an entry that was away has the revision it had before")
	}
}

func idOf(e Entry) string { return e.proto().Id }

func TestSetEntriesInvalid(t *testing.T) {
	srv, _ := serve(t, Config{Entries: []Entry{workload("a")}})
	c, _ := agent(t, srv)
	if err := srv.SetEntries([]Entry{workload("b"), {}}); err == nil {
		t.Error("an empty entry was accepted")
	}
	if got := syncWhole(t, c, fullMask); len(got) != 1 || got[0].SpiffeId.Path != "/a" {
		t.Errorf("a refused list changed the entries: %v", got)
	}
	if err := srv.SetEntries(make([]Entry, maxEntries+1)); err == nil {
		t.Error("too many entries were accepted")
	}
}

func TestSyncRefused(t *testing.T) {
	srv, _ := serve(t, Config{})
	c, _ := agent(t, srv)
	for want, req := range map[string]*entryv1.SyncAuthorizedEntriesRequest{
		"specifying IDs on initial request": {Ids: []string{"a"}},
		"revision number cannot be masked":  {OutputMask: &types.EntryMask{SpiffeId: true}},
	} {
		stream, err := c.SyncAuthorizedEntries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		wantCode(t, err, codes.InvalidArgument, want)
	}
}

func TestAuthorizedByParent(t *testing.T) {
	srv, _ := serve(t, Config{})
	c1, cert1 := agent(t, srv)
	c2, cert2 := agent(t, srv)
	under := func(parent spiffeid.ID, name string) Entry {
		e := workload(name)
		e.ParentID = parent
		return e
	}
	loop := spiffeid.RequireFromPath(testTD, "/loop")
	if err := srv.SetEntries([]Entry{
		workload("any"),
		under(agentID(cert1), "one"),
		under(agentID(cert2), "two"),
		under(spiffeid.RequireFromPath(testTD, "/one"), "below-one"),
		under(spiffeid.RequireFromPath(testTD, "/any"), "below-any"),
		under(spiffeid.RequireFromPath(testTD, "/two"), "loop"),
		under(loop, "two"),
		under(spiffeid.RequireFromPath(testTD, "/nobody"), "lost"),
	}); err != nil {
		t.Fatal(err)
	}
	paths := func(c client) []string {
		var out []string
		for _, e := range syncWhole(t, c, fullMask) {
			out = append(out, e.SpiffeId.Path)
		}
		slices.Sort(out)
		return out
	}
	if got := paths(c1); !slices.Equal(got, []string{"/any", "/below-any", "/below-one", "/one"}) {
		t.Errorf("agent one: %v", got)
	}
	if got := paths(c2); !slices.Equal(got, []string{"/any", "/below-any", "/loop", "/two", "/two"}) {
		t.Errorf("agent two: %v", got)
	}
}

func TestMadeIDs(t *testing.T) {
	a, b := workload("a", "uid:1", "gid:2"), workload("a", "gid:2", "uid:1", "uid:1")
	if a.madeID() != b.madeID() {
		t.Error("the order of selectors changes the ID")
	}
	a.TTL, a.Hint = time.Hour, "h"
	if a.madeID() != b.madeID() {
		t.Error("what may change changes the ID")
	}
	seen := map[string]bool{a.madeID(): true}
	c := workload("a", "uid:1")
	c.ParentID = spiffeid.RequireFromPath(testTD, "/p")
	for _, e := range []Entry{workload("b", "uid:1", "gid:2"), workload("a", "uid:1"), c} {
		if seen[e.madeID()] {
			t.Errorf("%v has the ID of another", e)
		}
		seen[e.madeID()] = true
	}
}
