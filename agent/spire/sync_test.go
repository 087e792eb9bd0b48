package spire

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

func newEntry(i int) *types.Entry {
	return &types.Entry{
		Id:             fmt.Sprintf("entry-%05d", i),
		SpiffeId:       &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/ns/shop/sa/%d", i)},
		Selectors:      []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", i)}},
		RevisionNumber: 3,
		CreatedAt:      1_700_000_000,
	}
}

func newEntries(n int) []*types.Entry {
	entries := make([]*types.Entry, n)
	for i := range entries {
		entries[i] = newEntry(i)
	}
	return entries
}

// view is what of an entry the tests compare.
func view(e registry.Entry) string {
	return fmt.Sprintf("%s %s %v rev %d created %d", e.ID, e.SPIFFEID, e.Selectors, e.Revision, toUnix(e.CreatedAt))
}

func checkSame(t *testing.T, got []registry.Entry, want []*types.Entry) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("got %d entries, want %d", len(got), len(want))
	}
	want = slices.SortedFunc(slices.Values(want), func(a, b *types.Entry) int { return strings.Compare(a.Id, b.Id) })
	for i := range got {
		w, err := parseEntry(want[i], exampleOrg)
		if err != nil {
			t.Fatal(err)
		}
		if view(got[i]) != view(w) {
			t.Fatalf("entry %d: got %s, want %s", i, view(got[i]), view(w))
		}
	}
}

func TestSync(t *testing.T) {
	for _, n := range []int{0, 1, 499, 500, 501, 1000, 1200} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			entries := newEntries(n)
			s := newServer(t)
			s.entries = func() []*types.Entry { return entries }
			s.start(t)
			c := s.client(t)
			paged := func() bool { return len(entries) > serverPage }

			var known []registry.Entry
			sync := func(what string, stale, removed int) {
				t.Helper()
				s.asked.Store(0)
				got, stats, err := c.Sync(t.Context(), known)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				checkSame(t, got, entries)
				want := SyncStats{Total: len(entries), Fetched: stale, Removed: removed, Server: s.serial}
				if !paged() {
					want.Fetched = len(entries)
					stale = 0
				}
				if fmt.Sprint(stats) != fmt.Sprint(want) {
					t.Errorf("%s: stats %+v, want %+v", what, stats, want)
				}
				if asked := int(s.asked.Load()); asked != stale {
					t.Errorf("%s: asked for %d entries, want %d", what, asked, stale)
				}
				known = got
			}
			sync("first", n, 0)
			sync("nothing new", 0, 0)
			if n == 0 {
				entries = newEntries(1)
				sync("one more", 1, 0)
				return
			}

			first := proto.Clone(entries[0]).(*types.Entry)
			first.RevisionNumber++
			first.Selectors[0].Value = "uid:changed"
			entries[0] = first
			sync("revised", 1, 0)

			again := proto.Clone(entries[n/2]).(*types.Entry)
			again.CreatedAt++
			again.Selectors[0].Value = "uid:again"
			entries[n/2] = again
			sync("deleted and made again with the same revision", 1, 0)

			entries = append(slices.Clone(entries[:n/2]), entries[n/2+1:]...)
			sync("one less", 0, 1)
			entries = append(newEntries(n + 700)[n:], entries...)
			sync("700 more", 700, 0)
			entries = entries[:200]
			sync("down to 200", 0, len(known)-200)
			entries = nil
			sync("down to none", 0, 200)
		})
	}
}

func TestSyncUnpaged(t *testing.T) {
	entries := newEntries(700)
	s := newServer(t)
	s.unpaged = true
	s.entries = func() []*types.Entry { return entries }
	s.start(t)
	c := s.client(t)
	var known []registry.Entry
	for _, n := range []int{700, 650} {
		entries = entries[:n]
		got, stats, err := c.Sync(t.Context(), known)
		if err != nil {
			t.Fatal(err)
		}
		checkSame(t, got, entries)
		if stats.Server != s.serial {
			t.Errorf("server %s has answered, want %s", stats.Server, s.serial)
		}
		if !stats.Unpaged || stats.Fetched != n || stats.Removed != len(known)-len(got) && known != nil {
			t.Errorf("stats %+v", stats)
		}
		known = got
	}

	// The server is upgraded; a new connection finds out.
	s.unpaged = false
	if _, stats, err := c.Sync(t.Context(), known); err != nil || !stats.Unpaged {
		t.Errorf("on the same connection: %+v, %v", stats, err)
	}
	c.SetIdentity(s.ca.identity(t, agentID))
	if _, stats, err := c.Sync(t.Context(), known); err != nil || stats.Unpaged || stats.Fetched != 0 {
		t.Errorf("on a new connection: %+v, %v", stats, err)
	}
}

func TestSyncLeavesOut(t *testing.T) {
	broken := map[string]func(*types.Entry){
		"no id":                       func(e *types.Entry) { e.Id = "" },
		"no SPIFFE ID":                func(e *types.Entry) { e.SpiffeId = nil },
		"bad path":                    func(e *types.Entry) { e.SpiffeId.Path = "/a/../b" },
		"no path":                     func(e *types.Entry) { e.SpiffeId.Path = "" },
		"long path":                   func(e *types.Entry) { e.SpiffeId.Path = "/" + strings.Repeat("a", maxSPIFFEID) },
		"long hint":                   func(e *types.Entry) { e.Hint = strings.Repeat("h", maxHint+1) },
		"bad trust domain":            func(e *types.Entry) { e.SpiffeId.TrustDomain = "EXAMPLE" },
		"path in trust domain":        func(e *types.Entry) { e.SpiffeId.TrustDomain = "example.org/x" },
		"other trust domain":          func(e *types.Entry) { e.SpiffeId.TrustDomain = "other.org" },
		"no selector":                 func(e *types.Entry) { e.Selectors = nil },
		"nil selector":                func(e *types.Entry) { e.Selectors = []*types.Selector{{}} },
		"selector without value":      func(e *types.Entry) { e.Selectors[0].Value = "" },
		"selector type with colon":    func(e *types.Entry) { e.Selectors[0].Type = "a:b" },
		"bad federated trust domain":  func(e *types.Entry) { e.FederatesWith = []string{"fine.org", "not fine"} },
		"negative revision":           func(e *types.Entry) { e.RevisionNumber = -1 },
		"created before the epoch":    func(e *types.Entry) { e.CreatedAt = -1 },
		"expires after the year 9999": func(e *types.Entry) { e.ExpiresAt = maxUnixTime + 1 },
		"twice":                       func(e *types.Entry) { e.Id = "entry-00001" },
	}
	for name, damage := range broken {
		for _, n := range []int{20, 600} {
			t.Run(fmt.Sprint(name, " ", n), func(t *testing.T) {
				entries := newEntries(n)
				damage(entries[7])
				s := newServer(t)
				s.entries = func() []*types.Entry { return entries }
				s.start(t)
				got, stats, err := s.client(t).Sync(t.Context(), nil)
				if err != nil {
					t.Fatal(err)
				}
				if len(got) != n-1 || stats.LeftOut != 1 || len(stats.Malformed) != 1 {
					t.Fatalf("got %d entries, stats %+v", len(got), stats)
				}
				if text := stats.Malformed[0].Error(); !strings.Contains(text, fmt.Sprintf("%q", entries[7].Id)) {
					t.Errorf("report %q names no entry", text)
				}
			})
		}
	}

	t.Run("many", func(t *testing.T) {
		entries := newEntries(100)
		for _, e := range entries[10:] {
			e.SpiffeId.TrustDomain = "other.org"
		}
		s := newServer(t)
		s.entries = func() []*types.Entry { return entries }
		s.start(t)
		got, stats, err := s.client(t).Sync(t.Context(), nil)
		if err != nil || len(got) != 10 || stats.LeftOut != 90 || len(stats.Malformed) != maxMalformed {
			t.Errorf("got %d entries, stats %+v, %v", len(got), stats, err)
		}
	})
}

// revisions answers the first request with those of entries, then hands the
// stream to next.
func revisions(entries []*types.Entry, next func(entryv1.Entry_SyncAuthorizedEntriesServer, []string) error) func(entryv1.Entry_SyncAuthorizedEntriesServer) error {
	return func(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		answer := &entryv1.SyncAuthorizedEntriesResponse{}
		for _, e := range entries {
			answer.EntryRevisions = append(answer.EntryRevisions, &entryv1.EntryRevision{Id: e.Id, RevisionNumber: e.RevisionNumber, CreatedAt: e.CreatedAt})
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
			return nil
		}
		if err != nil {
			return err
		}
		return next(stream, req.GetIds())
	}
}

// oddServer is a server that does not sync as SPIRE Server does.
type oddServer struct {
	name    string
	sync    func(entryv1.Entry_SyncAuthorizedEntriesServer) error
	want    int // entries
	leftOut int
	err     error
}

func oddServers(t *testing.T) []oddServer {
	five := newEntries(5)
	send := func(answers ...*entryv1.SyncAuthorizedEntriesResponse) func(entryv1.Entry_SyncAuthorizedEntriesServer) error {
		return func(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
			for _, a := range answers {
				if err := stream.Send(a); err != nil {
					return err
				}
			}
			return nil
		}
	}
	then := func(answers ...*entryv1.SyncAuthorizedEntriesResponse) func(entryv1.Entry_SyncAuthorizedEntriesServer, []string) error {
		return func(stream entryv1.Entry_SyncAuthorizedEntriesServer, _ []string) error {
			return send(answers...)(stream)
		}
	}
	page := func(more bool, entries ...*types.Entry) *entryv1.SyncAuthorizedEntriesResponse {
		return &entryv1.SyncAuthorizedEntriesResponse{Entries: entries, More: more}
	}
	revision := func(more bool, id string, n int64) *entryv1.SyncAuthorizedEntriesResponse {
		return &entryv1.SyncAuthorizedEntriesResponse{More: more, EntryRevisions: []*entryv1.EntryRevision{{Id: id, RevisionNumber: n}}}
	}
	return []oddServer{
		{name: "whole list in pages", sync: send(page(true, five[:3]...), page(false, five[3:]...)), want: 5},
		{name: "asked entries in pages", sync: revisions(five, then(page(true, five[:3]...), page(false, five[3:]...))), want: 5},
		{name: "an entry is missing", sync: revisions(five, then(page(false, five[1:]...))), want: 4, leftOut: 1},
		{name: "an entry too many", sync: revisions(five, then(page(false, newEntries(6)...))), want: 5, leftOut: 1},
		{name: "an entry twice", sync: revisions(five, then(page(false, append(newEntries(1), five...)...))), want: 5, leftOut: 1},
		{name: "bad revisions", sync: send(revision(true, "", 1), revision(true, "x", -1), page(false)), leftOut: 2},
		{name: "a revision twice", sync: func(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
			if err := send(revision(true, five[0].Id, 3), revision(false, five[0].Id, 3))(stream); err != nil {
				return err
			}
			for range 2 {
				if _, err := stream.Recv(); err != nil {
					return err
				}
			}
			return send(page(false, five[0]))(stream)
		}, want: 1, leftOut: 1},
		{name: "no answer", sync: send(), err: ErrBadAnswer},
		{name: "ends among pages", sync: send(page(true, five...)), err: ErrBadAnswer},
		{name: "ends among revisions", sync: send(revision(true, "a", 1)), err: ErrBadAnswer},
		{name: "ends before entries", sync: revisions(five, then()), err: ErrBadAnswer},
		{name: "empty page, more", sync: send(page(true)), err: ErrBadAnswer},
		{name: "entries among revisions", sync: send(revision(true, "a", 1), page(false, five...)), err: ErrBadAnswer},
		{name: "revisions among entries", sync: revisions(five, then(page(true, five[:1]...), revision(false, "a", 1))), err: ErrBadAnswer},
		{name: "too many revisions", sync: func(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
			for i := 0; i <= maxEntries; i += 10_000 {
				answer := &entryv1.SyncAuthorizedEntriesResponse{More: true}
				for j := range 10_000 {
					answer.EntryRevisions = append(answer.EntryRevisions, &entryv1.EntryRevision{Id: fmt.Sprint(i + j)})
				}
				if err := stream.Send(answer); err != nil {
					return err
				}
			}
			return nil
		}, err: ErrBadAnswer},
		{name: "too many entries", sync: func(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
			many := make([]*types.Entry, 10_000)
			for i := range many {
				many[i] = five[0]
			}
			for range 11 {
				if err := stream.Send(page(true, many...)); err != nil {
					return err
				}
			}
			return nil
		}, err: ErrBadAnswer},
		{name: "denied in the middle", sync: func(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
			if err := stream.Send(page(true, five...)); err != nil {
				return err
			}
			return denied(t, types.PermissionDeniedDetails_AGENT_BANNED)
		}, err: &DeniedError{}},
	}
}

func TestSyncOddServers(t *testing.T) {
	for _, test := range oddServers(t) {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(t)
			s.sync = test.sync
			s.start(t)
			got, stats, err := s.client(t).Sync(t.Context(), nil)
			var no *DeniedError
			switch {
			case errors.As(test.err, &no):
				if !errors.As(err, &no) || no.Reason != AgentBanned {
					t.Errorf("got %v", err)
				}
			case !errors.Is(err, test.err):
				t.Errorf("got %v, want %v", err, test.err)
			}
			if err != nil && (got != nil || stats.Total != 0) {
				t.Errorf("entries beside an error: %d, %+v", len(got), stats)
			}
			if err == nil && (len(got) != test.want || stats.LeftOut != test.leftOut) {
				t.Errorf("got %d entries, stats %+v; want %d, %d left out", len(got), stats, test.want, test.leftOut)
			}
		})
	}
}

// What is listed in a new revision but not sent is not served in the old one.
func TestSyncDropsStale(t *testing.T) {
	five := newEntries(5)
	known, _ := parseEntry(five[0], exampleOrg)
	five[0].RevisionNumber++
	s := newServer(t)
	s.sync = revisions(five[:1], func(stream entryv1.Entry_SyncAuthorizedEntriesServer, ids []string) error {
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{})
	})
	s.start(t)
	got, stats, err := s.client(t).Sync(t.Context(), []registry.Entry{known})
	if err != nil || len(got) != 0 || stats.Removed != 1 || stats.LeftOut != 1 {
		t.Errorf("got %v, %+v, %v", got, stats, err)
	}
}

func TestParseEntry(t *testing.T) {
	got, err := parseEntry(&types.Entry{
		Id:             "one",
		SpiffeId:       &types.SPIFFEID{TrustDomain: "example.org", Path: "web"}, // the slash is a SHOULD
		Selectors:      []*types.Selector{{Type: "unix", Value: "uid:2"}, {Type: "unix", Value: "uid:1"}, {Type: "k8s", Value: "ns:a"}, {Type: "unix", Value: "uid:1"}},
		FederatesWith:  []string{"b.org", "spiffe://a.org", "example.org", "b.org"},
		Hint:           "internal",
		RevisionNumber: 4,
		CreatedAt:      1_700_000_000,
		ExpiresAt:      1_800_000_000,
		Admin:          true, Downstream: true, StoreSvid: true,
		AdditionalAttributes: &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true},
	}, exampleOrg)
	if err != nil {
		t.Fatal(err)
	}
	want := registry.Entry{
		ID:        "one",
		SPIFFEID:  spiffeid.RequireFromString("spiffe://example.org/web"),
		Selectors: []attestor.Selector{{Type: "k8s", Value: "ns:a"}, {Type: "unix", Value: "uid:1"}, {Type: "unix", Value: "uid:2"}},
		FederatesWith: []spiffeid.TrustDomain{
			spiffeid.RequireTrustDomainFromString("a.org"),
			spiffeid.RequireTrustDomainFromString("b.org"),
		},
		Hint:      "internal",
		Revision:  4,
		CreatedAt: time.Unix(1_700_000_000, 0).UTC(),
		ExpiresAt: time.Unix(1_800_000_000, 0).UTC(),
		Admin:     true, Downstream: true, StoreSVID: true, JTI: true,
	}
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	longest := newEntry(1)
	longest.SpiffeId.Path = "/" + strings.Repeat("a", maxSPIFFEID-len("spiffe://example.org/"))
	longest.Hint = strings.Repeat("h", maxHint)
	if got, err := parseEntry(longest, exampleOrg); err != nil || len(got.SPIFFEID.String()) != maxSPIFFEID || got.Hint != longest.Hint {
		t.Errorf("the longest SPIFFE ID and hint: %v", err)
	}
	never, err := parseEntry(newEntry(1), exampleOrg)
	if err != nil || !never.ExpiresAt.IsZero() {
		t.Errorf("got %+v, %v; want no end", never, err)
	}
}

// Under insecure bootstrap anyone can send these.
func FuzzParseEntry(f *testing.F) {
	e := newEntry(1)
	e.FederatesWith = []string{"other.org"}
	seed, err := proto.Marshal(e)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		e := &types.Entry{}
		if proto.Unmarshal(data, e) != nil {
			return
		}
		got, err := parseEntry(e, exampleOrg)
		if err != nil {
			return
		}
		if !got.SPIFFEID.MemberOf(exampleOrg) || got.SPIFFEID.Path() == "" || got.ID == "" || len(got.Selectors) == 0 {
			t.Errorf("accepted %+v", got)
		}
		if id, err := spiffeid.FromString(got.SPIFFEID.String()); err != nil || id != got.SPIFFEID {
			t.Errorf("SPIFFE ID %s does not parse again: %v", got.SPIFFEID, err)
		}
	})
}

// Entries of which none has changed are not even copied.
func TestSyncUnchanged(t *testing.T) {
	five := newEntries(5)
	s := newServer(t)
	s.sync = revisions(five, func(stream entryv1.Entry_SyncAuthorizedEntriesServer, ids []string) error {
		var asked []*types.Entry
		for _, e := range five {
			if slices.Contains(ids, e.Id) {
				asked = append(asked, e)
			}
		}
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: asked})
	})
	s.start(t)
	c := s.client(t)
	first, _, err := c.Sync(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	second, stats, err := c.Sync(t.Context(), first)
	if err != nil || len(second) != 5 || &second[0] != &first[0] || stats.Fetched != 0 || stats.Total != 5 {
		t.Errorf("got %d entries, other memory or not, %+v, %v", len(second), stats, err)
	}
	five[2].RevisionNumber++
	third, stats, err := c.Sync(t.Context(), second)
	if err != nil || stats.Fetched != 1 || stats.Removed != 0 {
		t.Errorf("got %+v, %v", stats, err)
	}
	checkSame(t, third, five)
	if view(first[2]) == view(third[2]) {
		t.Error("what was handed in has been changed")
	}
}
