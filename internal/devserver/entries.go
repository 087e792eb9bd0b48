package devserver

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/attestor"
)

const (
	maxEntries  = 100_000
	maxIDLength = 255
	maxHint     = 1024 // characters, as the real server's
)

// Entry is a registration entry: which identity a workload gets that shows all
// of the selectors to an agent.
type Entry struct {
	// ID names the entry: up to 255 letters, digits, dots, dashes and
	// underscores. Empty: made from SPIFFEID, ParentID and Selectors, the
	// same each time.
	ID string
	// SPIFFEID is in the server's trust domain and outside of /spire.
	SPIFFEID spiffeid.ID
	// ParentID is the agent that may have the entry, or the identity of
	// another entry: who may have that one may have this one. Zero: any
	// agent.
	ParentID spiffeid.ID
	// Selectors are what the workload must show; at least one.
	Selectors []attestor.Selector
	// TTL is the lifetime of its X.509-SVIDs, rounded up to seconds. Zero:
	// Config.SVIDTTL.
	TTL time.Duration
	// Hint tells a workload with several identities what this one is for.
	Hint string
	// DNSNames go into the X.509-SVID; the first also as its common name.
	DNSNames []string
	// FederatesWith are the trust domains whose bundles the workload gets
	// besides its own.
	FederatesWith []spiffeid.TrustDomain
}

// check says what is wrong with the entry, in a server of td.
func (e *Entry) check(td spiffeid.TrustDomain) error {
	if err := checkWorkloadID(td, e.SPIFFEID); err != nil {
		return err
	}
	if !e.ParentID.IsZero() && !e.ParentID.MemberOf(td) {
		return fmt.Errorf("parent %s is not in the trust domain %s", e.ParentID, td.Name())
	}
	if strings.ContainsFunc(e.ID, notInEntryID) || len(e.ID) > maxIDLength {
		return fmt.Errorf("entry ID %q must have at most %d characters, of letters, digits, dots, dashes and underscores", e.ID, maxIDLength)
	}
	if len(e.Selectors) == 0 {
		return errors.New("it has no selector; name at least one, such as unix:uid:1000")
	}
	for _, s := range e.Selectors {
		if err := checkSelector(s); err != nil {
			return err
		}
	}
	if e.TTL != 0 {
		if err := checkTTL(e.TTL); err != nil {
			return fmt.Errorf("lifetime: %w", err)
		}
	}
	if len([]rune(e.Hint)) > maxHint {
		return fmt.Errorf("its hint is longer than %d characters", maxHint)
	}
	for _, name := range e.DNSNames {
		if err := checkDNSName(name); err != nil {
			return err
		}
	}
	for _, with := range e.FederatesWith {
		if with.IsZero() || with == td {
			return fmt.Errorf("it cannot federate with %q", with.Name())
		}
	}
	return nil
}

func checkWorkloadID(td spiffeid.TrustDomain, id spiffeid.ID) error {
	switch {
	case id.IsZero():
		return errors.New("it has no SPIFFE ID")
	case !id.MemberOf(td):
		return fmt.Errorf("%s is not in the trust domain %s", id, td.Name())
	case id.Path() == "":
		return fmt.Errorf("%s has no path, so it names the trust domain and no workload", id)
	case id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/"):
		return fmt.Errorf("%s is under /spire, which is reserved for servers and agents", id)
	}
	return nil
}

func notInEntryID(r rune) bool {
	switch {
	case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '.', r == '-', r == '_':
		return false
	}
	return true
}

func checkSelector(s attestor.Selector) error {
	if s.Type == "" || s.Value == "" || strings.Contains(s.Type, ":") {
		return fmt.Errorf("selector %q is not TYPE:VALUE, such as unix:uid:1000", s.Type+":"+s.Value)
	}
	return nil
}

// checkDNSName accepts what may stand in a certificate (RFC 1034 section 3.5,
// RFC 1123 section 2.1), a leading wildcard label included.
func checkDNSName(name string) error {
	if len(name) <= 253 {
		good := true
		for label := range strings.SplitSeq(strings.TrimPrefix(name, "*."), ".") {
			good = good && label != "" && len(label) <= 63 && !strings.HasPrefix(label, "-") && !strings.HasSuffix(label, "-") &&
				!strings.ContainsFunc(label, func(r rune) bool { return r == '.' || notInEntryID(r) })
		}
		if good {
			return nil
		}
	}
	return fmt.Errorf("%q is not a DNS name", name)
}

// madeID derives an ID from what makes an entry unique in the real server:
// SPIFFE ID, parent and selectors. Everything else can change under it.
func (e *Entry) madeID() string {
	selectors := make([]string, len(e.Selectors))
	for i, s := range e.Selectors {
		selectors[i] = s.Type + ":" + s.Value
	}
	slices.Sort(selectors)
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q", e.SPIFFEID.String(), e.ParentID.String(), slices.Compact(selectors)))
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[0:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}

// proto is the entry on the wire, without revision, creation and, where any
// agent may have it, parent.
func (e *Entry) proto() *types.Entry {
	p := &types.Entry{
		Id:          e.ID,
		SpiffeId:    protoID(e.SPIFFEID),
		X509SvidTtl: int32((e.TTL + time.Second - 1) / time.Second),
		Hint:        e.Hint,
		DnsNames:    slices.Clone(e.DNSNames),
	}
	if p.Id == "" {
		p.Id = e.madeID()
	}
	if !e.ParentID.IsZero() {
		p.ParentId = protoID(e.ParentID)
	}
	for _, s := range e.Selectors {
		p.Selectors = append(p.Selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	for _, td := range e.FederatesWith {
		p.FederatesWith = append(p.FederatesWith, td.Name())
	}
	return p
}

func protoID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// registration is an entry as it is kept. It is immutable.
type registration struct {
	id    spiffeid.ID
	entry *types.Entry // ParentId nil: any agent
}

// registrations are all entries at one time. They are immutable.
type registrations struct {
	byID     map[string]*registration
	byParent map[spiffeid.ID][]*registration // under the zero ID: any agent
	revision int64                           // given to entries that the next change brings
}

// entryList is the current registrations.
type entryList struct {
	td  spiffeid.TrustDomain
	now func() time.Time

	current atomic.Pointer[registrations]
}

func newEntryList(td spiffeid.TrustDomain, now func() time.Time) *entryList {
	l := &entryList{td: td, now: now}
	// Revisions do not begin at zero but at the time of day: created_at has
	// seconds only, and an agent must notice entries that changed under the
	// same ID while the server was started again within one second.
	l.current.Store(&registrations{revision: now().UnixMicro()})
	return l
}

// set replaces all entries, or none when one is invalid.
func (l *entryList) set(entries []Entry) error {
	if len(entries) > maxEntries {
		return fmt.Errorf("%d entries are more than %d", len(entries), maxEntries)
	}
	for {
		old := l.current.Load()
		next, err := l.build(entries, old)
		if err != nil {
			return err
		}
		if l.current.CompareAndSwap(old, next) {
			return nil
		}
	}
}

func (l *entryList) build(entries []Entry, old *registrations) (*registrations, error) {
	next := &registrations{
		byID:     make(map[string]*registration, len(entries)),
		byParent: make(map[spiffeid.ID][]*registration),
		revision: old.revision + 1,
	}
	for i := range entries {
		e := &entries[i]
		if err := e.check(l.td); err != nil {
			return nil, fmt.Errorf("entry %d of %d: %w", i+1, len(entries), err)
		}
		r := &registration{id: e.SPIFFEID, entry: e.proto()}
		if _, twice := next.byID[r.entry.Id]; twice {
			return nil, fmt.Errorf("entry %d of %d: %s with the same selectors (or ID) is there already", i+1, len(entries), e.SPIFFEID)
		}
		r.entry.RevisionNumber, r.entry.CreatedAt = old.revision, l.now().Unix()
		if before := old.byID[r.entry.Id]; before != nil {
			r.entry.CreatedAt = before.entry.CreatedAt
			if same := before.sameAs(r); same {
				r = before
			}
		}
		next.byID[r.entry.Id] = r
		next.byParent[e.ParentID] = append(next.byParent[e.ParentID], r)
	}
	return next, nil
}

// sameAs compares two registrations of one ID, revisions apart.
func (r *registration) sameAs(o *registration) bool {
	mine := proto.Clone(r.entry).(*types.Entry)
	mine.RevisionNumber = o.entry.RevisionNumber
	return proto.Equal(mine, o.entry)
}

// authorized are the entries that an agent may have: those under it or under
// any agent, and those under the identities of these, in turn. Ordered by ID.
func (l *entryList) authorized(agent spiffeid.ID) []*registration {
	all := l.current.Load()
	var found []*registration
	seen := map[spiffeid.ID]bool{{}: true, agent: true}
	for queue := []spiffeid.ID{{}, agent}; len(queue) > 0; queue = queue[1:] {
		for _, r := range all.byParent[queue[0]] {
			found = append(found, r)
			if !seen[r.id] {
				seen[r.id] = true
				queue = append(queue, r.id)
			}
		}
	}
	slices.SortFunc(found, func(a, b *registration) int { return cmp.Compare(a.entry.Id, b.entry.Id) })
	return found
}

// masked is a copy for agent with the fields that mask asks for; the ID always
// comes along, and no mask means everything.
func (r *registration) masked(agent spiffeid.ID, mask *types.EntryMask) *types.Entry {
	e := proto.Clone(r.entry).(*types.Entry)
	if e.ParentId == nil {
		e.ParentId = protoID(agent)
	}
	if mask == nil {
		return e
	}
	out := &types.Entry{Id: e.Id}
	keep(mask.SpiffeId, &out.SpiffeId, e.SpiffeId)
	keep(mask.ParentId, &out.ParentId, e.ParentId)
	keep(mask.Selectors, &out.Selectors, e.Selectors)
	keep(mask.X509SvidTtl, &out.X509SvidTtl, e.X509SvidTtl)
	keep(mask.FederatesWith, &out.FederatesWith, e.FederatesWith)
	keep(mask.DnsNames, &out.DnsNames, e.DnsNames)
	keep(mask.RevisionNumber, &out.RevisionNumber, e.RevisionNumber)
	keep(mask.Hint, &out.Hint, e.Hint)
	keep(mask.CreatedAt, &out.CreatedAt, e.CreatedAt)
	return out
}

func keep[T any](asked bool, to *T, v T) {
	if asked {
		*to = v
	}
}
