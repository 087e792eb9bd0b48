package spire

import (
	"fmt"
	"slices"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/agent/registry"
)

func knownOf(tb testing.TB, n int) []registry.Entry {
	tb.Helper()
	known := make([]registry.Entry, n)
	for i := range known {
		var err error
		if known[i], err = parseEntry(newEntry(i), exampleOrg); err != nil {
			tb.Fatal(err)
		}
	}
	return known
}

func revisionOf(e *registry.Entry) *entryv1.EntryRevision {
	return &entryv1.EntryRevision{Id: e.ID, RevisionNumber: e.Revision, CreatedAt: toUnix(e.CreatedAt)}
}

func encode(tb testing.TB, m proto.Message) []byte {
	tb.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestStale(t *testing.T) {
	t.Parallel()
	e := knownOf(t, 1)[0]
	for want, revisions := range map[bool][]revision{
		false: {{3, 1_700_000_000}, {number: 3}},
		true:  {{2, 1_700_000_000}, {number: 4}, {3, 1_700_000_001}},
	} {
		for _, r := range revisions {
			if stale(&e, r) != want {
				t.Errorf("%v: want stale %t", r, want)
			}
		}
	}
}

// pagesOf is a stream of what a server has to say and is not asked for.
type pagesOf struct {
	entryStream
	pages [][]byte
}

func (p *pagesOf) RecvMsg(m any) error {
	page := p.pages[0]
	p.pages = p.pages[1:]
	return inRaw.Unmarshal(mem.BufferSlice{mem.SliceBuffer(page)}, m)
}

// BenchmarkSyncUnchanged is what an agent does every five seconds, but for
// gRPC.
func BenchmarkSyncUnchanged(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			known := knownOf(b, n)
			var pages [][]byte
			for page := range slices.Chunk(known, serverPage) {
				answer := &entryv1.SyncAuthorizedEntriesResponse{More: (len(pages)+1)*serverPage < n}
				for i := range page {
					answer.EntryRevisions = append(answer.EntryRevisions, revisionOf(&page[i]))
				}
				pages = append(pages, encode(b, answer))
			}
			c := &Client{trustDomain: exampleOrg}
			b.ReportAllocs()
			for b.Loop() {
				s, stream := c.newSyncing(known), &pagesOf{pages: pages}
				for more := true; more; {
					o, _, err := s.list(stream)
					if err != nil {
						b.Fatal(err)
					}
					more = o.more
				}
				if got, _ := s.finish(); len(s.wanted()) > 0 || len(got) != n || &got[0] != &known[0] {
					b.Fatalf("%d wanted, %d entries", len(s.wanted()), len(got))
				}
			}
		})
	}
}

// FuzzSyncPage holds a page of revisions as it is read here against what
// protobuf decodes it to. Under insecure bootstrap anyone can send these.
func FuzzSyncPage(f *testing.F) {
	known := knownOf(f, 3)
	both := &entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: []*entryv1.EntryRevision{revisionOf(&known[0]), revisionOf(&known[1])}, More: true}
	both.EntryRevisions[1].RevisionNumber++
	f.Add(encode(f, both))
	f.Add(encode(f, &entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: []*entryv1.EntryRevision{revisionOf(&known[2]), revisionOf(&known[2]), {}}}))
	f.Add(encode(f, &entryv1.SyncAuthorizedEntriesResponse{Entries: newEntries(2)}))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := (&Client{trustDomain: exampleOrg}).newSyncing(known)
		o, entries, err := s.list(&pagesOf{pages: [][]byte{data}})
		var want entryv1.SyncAuthorizedEntriesResponse
		if bad := proto.Unmarshal(data, &want); bad != nil {
			if err == nil && entries != nil {
				t.Errorf("accepted, but protobuf says %v", bad)
			}
			return
		}
		if got := (outline{len(want.EntryRevisions), len(want.Entries), want.More}); o != got && err == nil {
			t.Fatalf("read %+v, want %+v", o, got)
		}
		empty := o.revisions == 0 && o.entries == 0
		if odd := o.revisions > 0 && o.entries > 0 || o.more && empty; odd != (err != nil) {
			t.Fatalf("%+v: %v", o, err)
		}
		if err != nil {
			return
		}
		if o.revisions == 0 {
			if !proto.Equal(entries, &want) {
				t.Errorf("read %v, want %v", entries, &want)
			}
			return
		}
		checkListed(t, s, want.EntryRevisions)
	})
}

// checkListed checks what is taken over and asked for after revisions were
// listed.
func checkListed(t *testing.T, s *syncing, revisions []*entryv1.EntryRevision) {
	t.Helper()
	listed := map[string][]*entryv1.EntryRevision{}
	for _, r := range revisions {
		if r.GetId() != "" && r.GetRevisionNumber() >= 0 {
			listed[r.GetId()] = append(listed[r.GetId()], r)
		}
	}
	wanted := s.wanted()
	for i, e := range s.known.list {
		asked := slices.Contains(wanted, e.ID)
		kept := s.kept == nil && s.still > 0 || s.kept != nil && s.kept[i]
		versions := listed[e.ID]
		delete(listed, e.ID)
		same := slices.IndexFunc(versions, func(r *entryv1.EntryRevision) bool {
			return !stale(&e, revision{r.GetRevisionNumber(), r.GetCreatedAt()})
		})
		switch {
		case kept && asked, kept && same < 0, len(versions) > 0 && !kept && !asked, len(versions) == 0 && asked:
			t.Errorf("%s, listed as %v: kept: %t, asked for: %t", e.ID, versions, kept, asked)
		}
	}
	for id := range listed {
		if !slices.Contains(wanted, id) {
			t.Errorf("%q is not asked for", id)
		}
	}
	if !slices.IsSorted(wanted) || s.still+len(wanted)+s.stats.LeftOut != len(revisions) {
		t.Errorf("%d of %d revisions are known, wanted %q, %d are left out", s.still, len(revisions), wanted, s.stats.LeftOut)
	}
}

// A list may be written in another way than SPIRE Server does it today.
func TestListRevisions(t *testing.T) {
	t.Parallel()
	known := knownOf(t, 3)
	changed := revisionOf(&known[1])
	changed.RevisionNumber++
	timeless := []*entryv1.EntryRevision{{Id: known[0].ID, RevisionNumber: known[0].Revision}, {Id: known[1].ID, RevisionNumber: changed.RevisionNumber}}
	for name, test := range map[string]struct {
		listed  []*entryv1.EntryRevision
		unknown []byte // at the end of each
		kept    []int
		wanted  []string
		leftOut int
	}{
		"as ever":                   {listed: []*entryv1.EntryRevision{revisionOf(&known[2]), revisionOf(&known[0])}, kept: []int{0, 2}},
		"by an older server":        {listed: timeless, kept: []int{0}, wanted: []string{known[1].ID}},
		"by a newer server":         {listed: []*entryv1.EntryRevision{revisionOf(&known[0]), changed}, unknown: []byte{15 << 3, 1}, kept: []int{0}, wanted: []string{known[1].ID}},
		"in two versions":           {listed: []*entryv1.EntryRevision{revisionOf(&known[0]), revisionOf(&known[1]), changed}, kept: []int{0}, wanted: []string{known[1].ID}, leftOut: 1},
		"twice":                     {listed: []*entryv1.EntryRevision{revisionOf(&known[1]), revisionOf(&known[1])}, kept: []int{1}, leftOut: 1},
		"twice in another version":  {listed: []*entryv1.EntryRevision{changed, changed}, wanted: []string{known[1].ID}, leftOut: 1},
		"without id, with bad ones": {listed: []*entryv1.EntryRevision{{}, {Id: "new", RevisionNumber: -1}, {Id: "new"}}, wanted: []string{"new"}, leftOut: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := (&Client{trustDomain: exampleOrg}).newSyncing(known)
			for _, r := range test.listed {
				if err := s.listRevision(append(encode(t, r), test.unknown...)); err != nil {
					t.Fatal(err)
				}
			}
			wanted := s.wanted()
			var kept []int
			for i := range known {
				if s.kept[i] {
					kept = append(kept, i)
				}
			}
			if !slices.Equal(wanted, test.wanted) || !slices.Equal(kept, test.kept) || s.stats.LeftOut != test.leftOut || s.still != len(kept) {
				t.Errorf("kept %v of which %d count, wanted %q, %d left out", kept, s.still, wanted, s.stats.LeftOut)
			}
		})
	}
}
