package endpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// labels is a Follower of which a test says what it finds.
type labels struct {
	kind string

	mu       sync.Mutex // guards the following
	values   []string
	of       map[*attestor.Process][]string // instead, for some
	err      error
	asked    []time.Time
	follows  map[int]follow
	next     int
	restless bool                                           // says changed at once
	attest   func(ctx context.Context, p *attestor.Process) // called by Attest, which has found
}

type follow struct {
	process *attestor.Process
	found   []string
	changed func()
}

func newLabels(kind string, values ...string) *labels {
	return &labels{kind: kind, values: values, of: map[*attestor.Process][]string{}, follows: map[int]follow{}}
}

func (l *labels) Type() string { return l.kind }

// find is called with l.mu held.
func (l *labels) find(p *attestor.Process) []string {
	if values, known := l.of[p]; known {
		return values
	}
	return l.values
}

func (l *labels) Attest(ctx context.Context, p *attestor.Process) (found []attestor.Selector, err error) {
	l.mu.Lock()
	l.asked = append(l.asked, time.Now())
	for _, v := range l.find(p) {
		found = append(found, attestor.Selector{Type: l.kind, Value: v})
	}
	err = l.err
	hook := l.attest
	l.mu.Unlock()
	if hook != nil {
		hook(ctx, p)
	}
	return found, err
}

func (l *labels) Follow(p *attestor.Process, found []attestor.Selector, changed func()) (stop func()) {
	f := follow{process: p, changed: changed}
	for _, s := range found {
		if s.Type == l.kind {
			f.found = append(f.found, s.Value)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.restless || !slices.Equal(f.found, l.find(p)) {
		changed()
		return func() {}
	}
	id := l.next
	l.next++
	l.follows[id] = f
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.follows, id)
	}
}

// set changes what is found of everybody, in order of value.
func (l *labels) set(values ...string) {
	l.change(func() { l.values, l.err = values, nil })
}

// change changes what is found, and tells whoever is concerned.
func (l *labels) change(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	for id, f := range l.follows {
		if !slices.Equal(f.found, l.find(f.process)) {
			delete(l.follows, id)
			f.changed()
		}
	}
}

// tell says of everybody that it changed, though it did not.
func (l *labels) tell() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, f := range l.follows {
		delete(l.follows, id)
		f.changed()
	}
}

func (l *labels) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
}

func (l *labels) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.asked)
}

func (l *labels) followed() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.follows)
}

// heldCall is a call without gRPC, on a clock that a test has in hand.
type heldCall struct {
	grpc.ServerStream
	*fixture
	t         *testing.T
	unix, k8s *labels
	ctx       context.Context
	cancel    context.CancelFunc
	ended     chan error
	sending   func() // unless nil, called before an answer counts as sent

	mu   sync.Mutex // guards the following
	sent []string   // the paths of each answer
}

// hold has f run in a bubble with a call that is not open yet, of a process
// that is found to have the label web. There are entries for the labels web
// and db, and one, "node", for unix:uid:7.
func hold(t *testing.T, f func(*testing.T, *heldCall)) {
	t.Helper()
	p, err := attestor.Pin(os.Getpid())
	must(t, err)
	defer p.Close()
	synctest.Test(t, func(t *testing.T) {
		h := &heldCall{t: t, unix: newLabels("unix", "uid:1"), k8s: newLabels("k8s", "label:web"), ended: make(chan error, 1)}
		h.fixture = listen(t, func(c *Config) { c.Attestors = []attestor.Workload{h.unix, h.k8s} })
		for id, selector := range map[string]attestor.Selector{
			"web": {Type: "k8s", Value: "label:web"}, "db": {Type: "k8s", Value: "label:db"}, "node": {Type: "unix", Value: "uid:7"},
		} {
			h.register(registry.Entry{
				ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), Revision: 1, Selectors: []attestor.Selector{selector},
			})
		}
		u, refusal, _ := h.server.limits.connect(origin{uid: 1}, time.Now())
		must(t, refusal)
		c := &conn{subject: subject{process: p, user: u}, limits: h.server.limits}
		h.ctx, h.cancel = context.WithCancel(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: c}))
		defer func() { must(t, h.server.Close()) }()
		defer h.cancel()
		f(t, h)
		synctest.Wait()
		h.cancel()
		synctest.Wait()
		if n := h.k8s.followed() + len(h.server.held.watches) + len(h.server.frames.live); n != 0 {
			t.Errorf("%d things are held for nobody", n)
		}
	})
}

func (h *heldCall) open() {
	e := newWorkloadAPI(h.server, &Config{}).x509SVIDs
	go func() { h.ended <- h.server.watch(h, e) }()
}

func (h *heldCall) Context() context.Context { return h.ctx }

func (h *heldCall) SendMsg(m any) error {
	var response workload.X509SVIDResponse
	must(h.t, proto.Unmarshal(m.(*frame).parts.Materialize(), &response))
	var paths []string
	for _, svid := range response.Svids {
		paths = append(paths, strings.TrimPrefix(svid.SpiffeId, "spiffe://example.org"))
	}
	if h.sending != nil {
		h.sending()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sent = append(h.sent, strings.Join(paths, " "))
	return nil
}

// want waits until nothing happens by itself, and checks what was sent since.
func (h *heldCall) want(answers ...string) {
	h.t.Helper()
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !slices.Equal(h.sent, answers) {
		h.t.Fatalf("was sent %q, want %q", h.sent, answers)
	}
	h.sent = nil
}

// wantEnd checks how the call has ended.
func (h *heldCall) wantEnd(code codes.Code, parts ...string) {
	h.t.Helper()
	synctest.Wait()
	select {
	case err := <-h.ended:
		wantCode(h.t, err, code, parts...)
	default:
		h.t.Fatal("the call is open")
	}
}

var errAway = errors.New("the kubelet is away")

func TestLabelsChange(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.open()
		h.want("/web")
		for i, step := range []struct {
			labels []string
			want   []string
		}{
			{[]string{"label:db", "label:web"}, []string{"/db /web"}},
			{[]string{"label:db"}, []string{"/db"}},
			{[]string{"label:db", "label:other"}, nil},
			{[]string{"label:other", "label:web"}, []string{"/web"}},
		} {
			time.Sleep(attestPause)
			h.k8s.set(step.labels...)
			h.want(step.want...)
			if got := h.k8s.count(); got != i+2 {
				t.Errorf("step %d: attested %d times", i, got)
			}
		}
		h.sign(time.Hour) // the watch is that of the new selectors
		h.want("/web")
		time.Sleep(time.Hour / 2)
		h.want()
		if got := h.k8s.count(); got != 5 {
			t.Errorf("attested %d times, though nothing changed", got)
		}
		h.k8s.set("label:other")
		h.wantEnd(codes.PermissionDenied, "no identity issued")
		if h.agent.syncs != 0 || !strings.Contains(h.log.String(), "label:other") {
			t.Errorf("%d syncs; the log:\n%s", h.agent.syncs, h.log)
		}
	})
}

func TestUnchangedSelectorsKeepTheWatch(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.open()
		h.want("/web")
		var before *registry.Watch
		for before = range h.server.held.watches {
		}
		time.Sleep(attestPause)
		h.k8s.tell()
		h.want()
		if _, same := h.server.held.watches[before]; !same || h.k8s.count() != 2 || h.k8s.followed() != 1 {
			t.Errorf("the same watch: %t; attested %d times, followed %d times", same, h.k8s.count(), h.k8s.followed())
		}
	})
}

// What an attestor found stays until that attestor finds something else.
func TestAttestorIsAway(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.open()
		h.want("/web")
		time.Sleep(time.Minute)
		h.k8s.fail(errAway)
		h.unix.set("uid:7") // known by another attestor, and given
		h.want("/node /web")
		h.sign(2 * time.Hour)
		h.want("/node /web")
		time.Sleep(keptFor - 5*retryMost)
		h.want()
		pauses := h.pauses()
		for i, want := range []time.Duration{5, 10, 20, 40, 60, 60} {
			want *= time.Second
			if got := pauses[2+i]; got < want*3/4 || got > want*5/4 {
				t.Errorf("pause %d was %s, want about %s", i, got, want)
			}
		}
		if n := strings.Count(h.log.String(), "attestor failed"); n != 1 {
			t.Errorf("%d lines of one failure:\n%s", n, h.log)
		}

		h.unix.fail(errors.New("no /proc")) // now nobody can tell
		time.Sleep(2 * retryMost)
		h.want()
		h.unix.set("uid:1") // taken back by who gave it, while the other is away
		time.Sleep(2 * retryMost)
		h.want("/web")
		h.k8s.set("label:db")
		time.Sleep(2 * retryMost)
		h.want("/db")
		asked := h.k8s.count()
		time.Sleep(10 * time.Minute)
		if h.want(); h.k8s.count() != asked {
			t.Error("attested again though nothing fails any more")
		}
	})
}

// What an attestor found does not stay for good where it never answers again.
func TestAttestorIsAwayForLong(t *testing.T) {
	for name, test := range map[string]struct {
		other string // what the unix attestor finds
		all   string // what the stream has by both
		left  string // what it has after that; "": it ends
	}{
		"nothing else is known":  {"uid:1", "/web", ""},
		"another attestor knows": {"uid:7", "/node /web", "/node"},
	} {
		t.Run(name, func(t *testing.T) {
			hold(t, func(t *testing.T, h *heldCall) {
				h.unix.set(test.other)
				h.open()
				h.want(test.all)
				h.k8s.fail(errAway)
				h.k8s.tell()
				time.Sleep(keptFor)
				h.want()
				time.Sleep(2 * retryMost)
				if test.left == "" {
					h.wantEnd(codes.Unavailable, "k8s: the kubelet is away")
					return
				}
				h.want(test.left)
				h.k8s.set("label:web")
				time.Sleep(2 * retryMost)
				h.want(test.all)
			})
		})
	}
}

// pauses are the times between attestations; the first is that before any.
func (h *heldCall) pauses() []time.Duration {
	h.k8s.mu.Lock()
	defer h.k8s.mu.Unlock()
	pauses := []time.Duration{0}
	for i := range h.k8s.asked[1:] {
		pauses = append(pauses, h.k8s.asked[i+1].Sub(h.k8s.asked[i]))
	}
	return pauses
}

// An entry that is deleted takes back what it gave, whoever is away.
func TestEntryIsDeletedWhileAttestorIsAway(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.unix.set("uid:7")
		h.k8s.fail(errAway)
		h.open()
		h.want("/node")
		h.agent.Apply(registry.Update{HasEntries: true})
		h.wantEnd(codes.PermissionDenied)
		if !strings.Contains(h.log.String(), `attestation_error="k8s: the kubelet is away"`) {
			t.Errorf("the log does not tell what is not known:\n%s", h.log)
		}
	})
}

func TestFirstAttestationInPart(t *testing.T) {
	t.Run("entitled to nothing", func(t *testing.T) {
		hold(t, func(t *testing.T, h *heldCall) {
			h.k8s.fail(errAway)
			h.open()
			h.wantEnd(codes.Unavailable, "k8s: the kubelet is away")
			if h.agent.syncs != 0 || strings.Contains(h.log.String(), "no identity issued") {
				t.Errorf("%d syncs; the log:\n%s", h.agent.syncs, h.log)
			}
		})
	})
	t.Run("entitled", func(t *testing.T) {
		hold(t, func(t *testing.T, h *heldCall) {
			h.k8s.fail(errAway)
			h.unix.set("uid:7")
			h.open()
			h.want("/node")
			if h.k8s.followed() != 0 {
				t.Error("an attestor that failed is followed")
			}
			h.k8s.fail(nil)
			time.Sleep(retryFirst * 5 / 4)
			h.want("/node /web")
		})
	})
	t.Run("all answered", func(t *testing.T) {
		hold(t, func(t *testing.T, h *heldCall) {
			h.k8s.set("label:other")
			h.open()
			h.wantEnd(codes.PermissionDenied)
			if h.agent.syncs != 1 || h.agent.user != "uid 1" {
				t.Errorf("%d syncs, for %q; want one for the caller's user", h.agent.syncs, h.agent.user)
			}
		})
	})
}

func TestChangeBetweenAttestAndFollow(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.k8s.attest = func(context.Context, *attestor.Process) {
			h.k8s.mu.Lock()
			defer h.k8s.mu.Unlock()
			h.k8s.values = []string{"label:db"}
		}
		h.open()
		h.want("/web")
		time.Sleep(attestPause)
		h.want("/db")
	})
}

func TestChangeWhileSending(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		taken := make(chan struct{})
		h.sending = func() { <-taken }
		h.open()
		h.want()
		time.Sleep(attestPause)
		h.k8s.set("label:db")
		h.k8s.set("label:db", "label:web")
		close(taken)
		h.want("/web", "/db /web")
	})
}

func TestRestlessAttestor(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.k8s.restless = true
		h.open()
		h.want("/web")
		time.Sleep(10*attestPause + attestPause/2)
		h.want()
		if n := h.k8s.count(); n != 11 {
			t.Errorf("attested %d times in 10.5 s", n)
		}
	})
}

// While an attestor hangs, what the caller has is taken back as ever.
func TestAttestorHangsOnAnOpenStream(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.open()
		h.want("/web")
		time.Sleep(attestPause)
		h.k8s.attest = func(ctx context.Context, _ *attestor.Process) { <-ctx.Done() }
		h.k8s.tell()
		h.want()
		h.sign(2 * time.Hour)
		h.want("/web")
		h.agent.Apply(registry.Update{HasEntries: true})
		h.wantEnd(codes.PermissionDenied)
	})
}

func TestShutdownWhileAttesting(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.open()
		h.want("/web")
		time.Sleep(attestPause)
		stopping := make(chan struct{})
		h.k8s.attest = func(ctx context.Context, _ *attestor.Process) {
			go func() { must(t, h.server.Close()); close(stopping) }()
			<-ctx.Done()
		}
		h.k8s.set("label:db")
		<-stopping
		synctest.Wait()
		if err := h.server.finish("", <-h.ended); err != errStopping { //nolint:errorlint // the very status
			t.Errorf("got %v", err)
		}
		h.want()
	})
}

// Callers that find no slot when they are attested again stay what they are.
func TestNoSlotOnAnOpenStream(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.open()
		h.want("/web")
		time.Sleep(attestPause)
		u := connOf(h.ctx).user
		var ends []func()
		for range cap(u.attestations) {
			end, err := h.server.limits.beginAttestation(h.ctx, u)
			must(t, err)
			ends = append(ends, end)
		}
		h.k8s.set("label:db")
		time.Sleep(2 * attestationWait)
		h.want()
		for _, end := range ends {
			end()
		}
		time.Sleep(2 * retryFirst)
		h.want("/db")
	})
}

// Of many held streams those are attested again whose labels change, and no
// others, while everybody's SVIDs rotate.
func TestOnlyWhoChangedIsAttestedAgain(t *testing.T) {
	const groups = 10
	l := newLabels("k8s")
	var mu sync.Mutex
	members := make([][]*attestor.Process, groups)
	l.attest = func(_ context.Context, p *attestor.Process) {
		mu.Lock()
		defer mu.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.of[p] == nil { // its first attestation, which found nothing
			g := len(l.of) % groups
			l.of[p] = []string{fmt.Sprintf("label:%d", g)}
			members[g] = append(members[g], p)
		}
	}
	f := serve(t, func(c *Config) { c.Attestors = append(c.Attestors, l) })
	f.register(f.entry("a", "/a"))
	n := min(1000, f.server.limits.ConnectionsPerUID) / groups * groups
	streams := newRawStreams(t, f)
	defer streams.close()
	for range n {
		streams.open()
	}
	// Each was told at once that its label had come, and so is attested twice.
	eventually(t, "all are followed", func() bool { return l.followed() == n })
	if got := l.count(); got != 2*n {
		t.Errorf("%d streams were attested %d times", n, got)
	}
	for range 3 {
		asked := l.count()
		l.change(func() {
			for _, p := range members[3] {
				l.of[p] = []string{l.of[p][0] + "+"}
			}
		})
		f.sign(time.Hour)
		eventually(t, "those that changed are attested", func() bool { return l.count() == asked+n/groups && l.followed() == n })
	}
	if got := l.count(); got != 2*n+3*n/groups {
		t.Errorf("attested %d times in all", got)
	}
}

// Who sees to it that it is not known any more does not stay what it was.
func TestNotKnownAnyMore(t *testing.T) {
	hold(t, func(t *testing.T, h *heldCall) {
		h.open()
		h.want("/web")
		time.Sleep(time.Minute)
		h.k8s.fail(fmt.Errorf("its container is not listed: %w", attestor.ErrNotKnown))
		h.unix.set("uid:7") // has it attested again
		time.Sleep(2 * retryMost)
		h.want("/node")
		h.k8s.fail(nil)
		time.Sleep(2 * retryMost)
		h.want("/node /web")
	})
	hold(t, func(t *testing.T, h *heldCall) {
		h.open()
		h.want("/web")
		time.Sleep(time.Minute)
		h.k8s.fail(attestor.ErrNotKnown)
		h.unix.set("uid:9") // has it attested again
		time.Sleep(2 * retryMost)
		h.wantEnd(codes.PermissionDenied)
	})
}
