package registry

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

var rewrite = flag.Bool("rewrite", false, "write what the scripts in testdata print into them")

// TestScripts plays testdata/*.txt. A line that begins with "> " is a command;
// what it prints follows it. Times are seconds.
//
//	> options cache=N target=DURATION jitter=F
//	> entry ID PATH [SELECTOR…] [hint=H rev=N created=T expires=T fed=TD admin store]
//	> without ID                    takes the entry out of what sync will apply
//	> sync                          applies the entries as they now are
//	> sign ID… at T for SECONDS [by AUTHORITY] [as PATH]
//	> fail ID… [until T]
//	> again                         makes due what has failed
//	> bundle VERSION [taint=AUTHORITY]
//	> federated TD=VERSION…         the complete set
//	> wipe
//	> due T, > nextdue T
//	> watch NAME SELECTOR…, > next NAME, > close NAME
//	> status
//
// next prints "waits" where Next would, instead of waiting.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := play(t, string(text))
			if *rewrite {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			gotLines, wantLines := strings.Split(got, "\n"), strings.Split(string(text), "\n")
			for i, want := range wantLines {
				if i >= len(gotLines) || gotLines[i] != want {
					t.Fatalf("%s:%d: got %q, want %q\n%s", file, i+1, line(gotLines, i), want, got)
				}
			}
		})
	}
}

func line(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return "the end"
}

// play runs a script and returns it with what it really prints.
func play(t *testing.T, text string) string {
	p := &player{entries: map[string]Entry{}, watches: map[string]*Watch{}, options: testOptions()}
	p.r = New(p.options)
	var out strings.Builder
	for l := range strings.Lines(text) {
		l = strings.TrimSuffix(l, "\n")
		switch {
		case strings.HasPrefix(l, "> "):
			fmt.Fprintln(&out, l)
			if printed := p.run(t, strings.Fields(l[2:])); printed != "" {
				fmt.Fprintln(&out, printed)
			}
			checkIndex(t, p.r)
		case l == "" || strings.HasPrefix(l, "#"):
			fmt.Fprintln(&out, l)
		}
	}
	return out.String()
}

type player struct {
	r       *Registry
	options Options
	entries map[string]Entry // what the next sync applies
	watches map[string]*Watch
	serial  int
}

func (p *player) run(t *testing.T, words []string) string {
	t.Helper()
	args := words[1:]
	switch words[0] {
	case "options":
		p.setOptions(t, args)
	case "entry":
		p.entries[args[0]] = parseEntry(t, args)
	case "without":
		delete(p.entries, args[0])
	case "sync":
		return printChanges(p.r.Apply(Update{Entries: slices.Collect(maps.Values(p.entries)), HasEntries: true}))
	case "sign":
		return printChanges(p.r.Apply(p.sign(t, args)))
	case "fail":
		return printChanges(p.r.Apply(p.fail(t, args)))
	case "bundle":
		return printChanges(p.r.Apply(Update{Bundle: testBundle(t, args)}))
	case "federated":
		u := Update{Federated: map[spiffeid.TrustDomain]*Bundle{}, HasFederated: true}
		for _, a := range args {
			td, version, _ := strings.Cut(a, "=")
			u.Federated[spiffeid.RequireTrustDomainFromString(td)] = testBundle(t, []string{version})
		}
		return printChanges(p.r.Apply(u))
	case "again":
		return printChanges(p.r.Apply(Update{Again: true}))
	case "wipe":
		return printChanges(p.r.Apply(Update{Wipe: true}))
	case "due":
		var ids []string
		for _, e := range p.r.Due(second(t, args[0])) {
			ids = append(ids, e.ID)
		}
		return or(strings.Join(ids, " "), "nothing")
	case "nextdue":
		if next := p.r.NextDue(second(t, args[0])); !next.IsZero() {
			return strconv.FormatFloat(next.Sub(epoch).Seconds(), 'f', -1, 64)
		}
		return "never"
	case "watch":
		p.watches[args[0]] = p.r.Watch(selectors(args[1:]...))
	case "next":
		return next(t, p.watches[args[0]])
	case "become":
		w := p.r.Watch(selectors(args[1:]...))
		w.Succeed(p.watches[args[0]])
		p.watches[args[0]] = w
	case "interrupt":
		p.watches[args[0]].Interrupt()
	case "close":
		p.watches[args[0]].Close()
	case "status":
		n, ids := p.r.Status()
		out := fmt.Sprintf("%d entries", n)
		for _, id := range ids {
			out += fmt.Sprintf("\n%s %s #%s until %s", id.EntryID, id.SPIFFEID, id.Serial, id.NotAfter.Sub(epoch))
		}
		return out
	default:
		t.Fatalf("unknown command %q", words)
	}
	return ""
}

func (p *player) setOptions(t *testing.T, args []string) {
	for _, a := range args {
		key, value, _ := strings.Cut(a, "=")
		var err error
		switch key {
		case "cache":
			p.options.CacheSize, err = strconv.Atoi(value)
		case "target":
			p.options.AvailabilityTarget, err = time.ParseDuration(value)
		case "jitter":
			var f float64
			f, err = strconv.ParseFloat(value, 64)
			p.options.Jitter = func() float64 { return f }
		default:
			err = errors.New("unknown option")
		}
		if err != nil {
			t.Fatalf("%s: %v", a, err)
		}
	}
	p.r = New(p.options)
}

func parseEntry(t *testing.T, args []string) Entry {
	e := Entry{ID: args[0], SPIFFEID: spiffeid.RequireFromPath(testDomain, args[1]), CreatedAt: epoch}
	for _, a := range args[2:] {
		key, value, _ := strings.Cut(a, "=")
		switch key {
		case "hint":
			e.Hint = value
		case "rev":
			e.Revision = int64(second(t, value).Sub(epoch) / time.Second)
		case "created":
			e.CreatedAt = second(t, value)
		case "expires":
			e.ExpiresAt = second(t, value)
		case "fed":
			e.FederatesWith = append(e.FederatesWith, spiffeid.RequireTrustDomainFromString(value))
		case "admin":
			e.Admin = true
		case "store":
			e.StoreSVID = true
		default:
			e.Selectors = append(e.Selectors, selectors(a)...)
		}
	}
	return e
}

// keywords splits "a b until 5" into its IDs and what follows each keyword.
func keywords(args []string, known ...string) (ids []string, values map[string]string) {
	values = map[string]string{}
	for i := 0; i < len(args); i++ {
		if slices.Contains(known, args[i]) {
			values[args[i]] = args[i+1]
			i++
		} else {
			ids = append(ids, args[i])
		}
	}
	return ids, values
}

func (p *player) sign(t *testing.T, args []string) Update {
	ids, v := keywords(args, "at", "for", "by", "as")
	u := Update{SVIDs: map[string]*SVID{}}
	for _, id := range ids {
		p.serial++
		from := second(t, v["at"])
		s := &SVID{
			ID: p.entries[id].SPIFFEID, Serial: strconv.Itoa(p.serial), Authority: or(v["by"], "aa"),
			NotBefore: from, NotAfter: from.Add(second(t, v["for"]).Sub(epoch)),
		}
		if path := v["as"]; path != "" {
			s.ID = spiffeid.RequireFromPath(testDomain, path)
		}
		u.SVIDs[id] = s
	}
	return u
}

func (p *player) fail(t *testing.T, args []string) Update {
	ids, v := keywords(args, "until")
	u := Update{Failed: map[string]error{}}
	for _, id := range ids {
		u.Failed[id] = errors.New("refused")
	}
	if until := v["until"]; until != "" {
		u.Retry = func(failures int) time.Time { return second(t, until).Add(time.Duration(failures-1) * time.Second) }
	}
	return u
}

func next(t *testing.T, w *Watch) string {
	if w == nil {
		t.Fatal("no such watch")
	}
	v, err := nextNow(w)
	switch {
	case err != nil:
		return err.Error()
	case v == nil:
		return "waits"
	}
	return printView(v)
}

// nextNow is Next, but returns nil instead of waiting.
func nextNow(w *Watch) (*View, error) {
	v, _, err := w.poll()
	return v, err
}

func printView(v *View) string {
	if !v.Synced {
		return "not synced"
	}
	words := []string{"synced:"}
	for _, id := range v.Identities {
		word := id.Entry.ID + id.SVID.ID.Path() + "#" + id.SVID.Serial
		if id.Entry.Hint != "" {
			word += "(" + id.Entry.Hint + ")"
		}
		words = append(words, word)
	}
	if len(v.Identities) == 0 {
		words = append(words, "nothing")
	}
	if v.Pending > 0 {
		words = append(words, fmt.Sprintf("pending=%d", v.Pending))
	}
	if v.PendingErr != nil {
		words = append(words, fmt.Sprintf("(%v)", v.PendingErr))
	}
	if v.Bundle != nil {
		words = append(words, "bundle="+string(v.Bundle.DER))
	}
	for _, td := range slices.SortedFunc(maps.Keys(v.Federated), spiffeid.TrustDomain.Compare) {
		words = append(words, td.Name()+"="+string(v.Federated[td].DER))
	}
	return strings.Join(words, " ")
}

func printChanges(c Changes) string {
	return fmt.Sprintf("+%d ~%d -%d, views %d", c.Added, c.Changed, c.Removed, c.Views)
}

var (
	epoch      = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	testDomain = spiffeid.RequireTrustDomainFromString("example.org")
)

func testOptions() Options {
	return Options{TrustDomain: testDomain, Jitter: func() float64 { return 0 }}
}

func second(t *testing.T, s string) time.Time {
	t.Helper()
	n, err := strconv.ParseFloat(s, 64)
	if err != nil {
		t.Fatal(err)
	}
	return epoch.Add(time.Duration(n * float64(time.Second)))
}

// testBundle makes a bundle of which all but the taint follows from the
// version.
func testBundle(t *testing.T, args []string) *Bundle {
	t.Helper()
	b := &Bundle{TrustDomain: testDomain, DER: []byte(args[0])}
	for _, a := range args[1:] {
		b.Tainted = append(b.Tainted, strings.TrimPrefix(a, "taint="))
	}
	return b
}

func selectors(values ...string) []attestor.Selector {
	s := make([]attestor.Selector, len(values))
	for i, v := range values {
		s[i] = attestor.Selector{Type: "unix", Value: v}
	}
	return s
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// checkIndex holds what the registry keeps incrementally against what it is
// computed from.
func checkIndex(t *testing.T, r *Registry) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	uses := map[attestor.Selector]int{}
	servable := 0
	for i, rec := range r.records {
		if rec.entry != &r.entries[i] || i > 0 && r.entries[i-1].ID >= r.entries[i].ID {
			t.Fatalf("record %d: not that of entry %s, or out of order", i, r.entries[i].ID)
		}
		if (rec.node != nil) != rec.entry.servable() {
			t.Fatalf("entry %s: servable %v, bucket %v", rec.entry.ID, rec.entry.servable(), rec.node)
		}
		if _, active := r.active[rec]; active != (rec.live != nil) {
			t.Fatalf("entry %s: active %v, live %v", rec.entry.ID, active, rec.live)
		}
		if rec.node == nil {
			continue
		}
		servable++
		if rec.node.bucket[rec.at] != rec || !slices.Contains(rec.entry.Selectors, rec.node.selector) {
			t.Fatalf("entry %s is not where it is said to be", rec.entry.ID)
		}
		for _, s := range rec.entry.Selectors {
			uses[s]++
		}
	}
	if servable != r.servable || len(r.active) > len(r.records) || len(r.dirty) > 0 {
		t.Fatalf("%d servable, want %d; %d active of %d; %d dirty", r.servable, servable, len(r.active), len(r.records), len(r.dirty))
	}
	for a := range r.audiences {
		for i, n := range a.nodes {
			uses[n.selector]++
			if m := n.audiences[a.at[i]]; m.of != a || m.at != i || r.index.nodes[n.selector] != n {
				t.Fatalf("audience is not where it is said to be at %v", n.selector)
			}
		}
		if a.watches == 0 || !slices.Equal(a.matched, r.index.matching(a)) {
			t.Fatalf("audience with %d watches: matched is out of date", a.watches)
		}
		if !a.view.identical(r.viewOf(a)) {
			t.Fatalf("a view is out of date: %s, want %s", printView(a.view), printView(r.viewOf(a)))
		}
	}
	for s, n := range r.index.nodes {
		if n.uses != uses[s] || n.uses == 0 {
			t.Fatalf("selector %v: %d uses counted, %d found", s, n.uses, uses[s])
		}
		for i, m := range n.audiences {
			if _, ok := r.audiences[m.of]; !ok || m.of.at[m.at] != i {
				t.Fatalf("selector %v lists an audience that is gone", s)
			}
		}
	}
	if len(uses) != len(r.index.nodes) {
		t.Fatalf("%d selectors indexed, %d in use", len(r.index.nodes), len(uses))
	}
	allWatched := 0
	for rec := range r.active {
		watched := 0
		r.index.audiencesOf(rec, func(*audience) { watched++ })
		if watched > 0 {
			allWatched++
		}
		if rec.live.watched != watched {
			t.Fatalf("entry %s: %d audiences counted, %d found", rec.entry.ID, rec.live.watched, watched)
		}
	}
	if r.watched != allWatched {
		t.Fatalf("%d entries counted as watched, %d are", r.watched, allWatched)
	}
}

func TestClosedWatch(t *testing.T) {
	r := New(testOptions())
	w := r.Watch(selectors("a"))
	w.Close()
	w.Close()
	if _, err := w.Next(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w = r.Watch(nil)
	defer w.Close()
	if view, err := w.Next(ctx); view == nil {
		t.Errorf("what there was to tell is kept from who does not wait: %v", err)
	}
	if _, err := w.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}
