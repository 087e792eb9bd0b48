package endpoint

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// housing knows the house of every process.
type housing struct{ house string }

func (housing) Type() string { return "k8s" }
func (h housing) House(*attestor.Process) string {
	return h.house
}

func (housing) Attest(context.Context, *attestor.Process) ([]attestor.Selector, error) {
	return nil, nil
}

func TestOrigin(t *testing.T) {
	p := &attestor.Process{UID: 65532}
	for _, test := range []struct {
		housing []attestor.Housing
		want    string
	}{
		{nil, "uid 65532"},
		{[]attestor.Housing{housing{""}}, "uid 65532"},
		{[]attestor.Housing{housing{""}, housing{"1f"}, housing{"2e"}}, "pod 1f"},
	} {
		if got := originOf(p, test.housing).String(); got != test.want {
			t.Errorf("%v: got %q, want %q", test.housing, got, test.want)
		}
	}
	// Root of a pod can be any uid, and gains nothing by it.
	h := []attestor.Housing{housing{"1f"}}
	if originOf(p, h) != originOf(&attestor.Process{UID: 7}, h) {
		t.Error("a house has as many shares as it has users")
	}
}

// fill takes all of one kind that a caller may have.
func fill(t *testing.T, take func() error) (n int, refusal error) {
	t.Helper()
	for ; n <= 1<<20; n++ {
		if err := take(); err != nil {
			return n, err
		}
	}
	t.Fatal("there is no end")
	return 0, nil
}

func (l *limiter) connectHouse(i int, now time.Time) error {
	_, refusal, _ := l.connect(origin{house: fmt.Sprint(i)}, now)
	return refusal
}

func TestHousesHaveShares(t *testing.T) {
	const pods = 110 // of a node, as Kubernetes has it by default
	l := newLimiter(Limits{Connections: 8192, RequestsPerSecond: 1e6}, true)
	now := time.Unix(1e9, 0)
	n, refusal := fill(t, func() error { return l.connectHouse(0, now) })
	if n != 1024 {
		t.Errorf("a pod may hold %d connections", n)
	}
	wantCode(t, refusal, codes.ResourceExhausted, "pod 0 holds 1024 connections")
	total := n
	for i := 1; i < pods; i++ {
		n, refusal := fill(t, func() error { return l.connectHouse(i, now) })
		if total += n; n < 16 {
			t.Fatalf("pod %d was left %d connections: %v", i, n, refusal)
		}
	}
	wantCode(t, l.connectHouse(pods-1, now), codes.ResourceExhausted, "connections of pods, as many as it may")
	if total > 8192*3/4+16*pods {
		t.Errorf("all pods together hold %d connections", total)
	}
	n, refusal = fill(t, func() error {
		_, refusal, _ := l.connect(origin{uid: 0}, now)
		return refusal
	})
	if n != 8192-total || n == 0 {
		t.Errorf("%d connections were left outside of pods: %v", n, refusal)
	}
}

func TestHouseStreams(t *testing.T) {
	l := newLimiter(Limits{Streams: 16, HouseShare: 2}, true)
	now := time.Unix(1e9, 0)
	var users []*user
	streams := func(o origin, want int, say string) {
		t.Helper()
		u, refusal, _ := l.connect(o, now)
		must(t, refusal)
		n, refusal := fill(t, func() error { return l.beginStream(u, now) })
		if n != want {
			t.Errorf("%s has %d calls, want %d", o, n, want)
		}
		wantCode(t, refusal, codes.ResourceExhausted, say)
		users = append(users, u)
	}
	streams(origin{house: "a"}, 8, "pod a holds 8 calls")
	streams(origin{house: "b"}, 4, "holds 12 calls of pods")
	streams(origin{house: "c"}, 1, "holds 13 calls of pods")
	streams(origin{uid: 1}, 3, "the agent holds 16 calls")
	for _, u := range users {
		for u.streams > 0 {
			l.endStream(u)
		}
		l.disconnect(u)
	}
	if l.streams.taken+l.streams.housed+l.connections.taken+l.connections.housed != 0 {
		t.Errorf("left counted: %+v, %+v", l.streams, l.connections)
	}
}

func TestHouseRate(t *testing.T) {
	l := newLimiter(Limits{RequestsPerSecond: 80, Burst: 160}, true)
	now := time.Unix(1e9, 0)
	n, refusal := fill(t, func() error { return l.connectHouse(1, now) })
	if n != 20 {
		t.Errorf("%d requests at once", n)
	}
	wantCode(t, refusal, codes.ResourceExhausted, "pod 1 calls the agent more than 10 times a second")
}

func TestHouseAttestations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(Limits{Attestations: 16, HouseShare: 2}, true)
		var ends []func()
		attest := func(o origin, want int, say string) {
			t.Helper()
			u, _, _ := l.connect(o, time.Now())
			n, refusal := fill(t, func() error {
				end, err := l.beginAttestation(t.Context(), u)
				if err == nil {
					ends = append(ends, end)
				}
				return err
			})
			if n != want {
				t.Errorf("%s has %d slots, want %d", o, n, want)
			}
			wantCode(t, refusal, codes.ResourceExhausted, say)
		}
		attest(origin{house: "a"}, 8, "8 callers of pod a")
		attest(origin{house: "b"}, 6, "12 callers in pods") // one of each pod's is beside those
		attest(origin{house: "c"}, 1, "12 callers in pods")
		attest(origin{uid: 1}, 1, "16 callers")
		for _, end := range ends {
			end()
		}
		if len(l.attestations)+len(l.housed)+len(l.outside) != 0 {
			t.Error("slots are left taken")
		}
	})
}

// TestUsersLeaveRoomToHouses: a user with many uids at hand (subordinate ones)
// does not take what is there for pods.
func TestUsersLeaveRoomToHouses(t *testing.T) {
	l := newLimiter(Limits{Connections: 64, Streams: 64, Attestations: 64, AttestationsPerUID: 64}, true)
	now := time.Unix(1e9, 0)
	var users []*user
	n, refusal := fill(t, func() error {
		u, refusal, _ := l.connect(origin{uid: uint32(100_000 + len(users)%2)}, now)
		if refusal == nil {
			users = append(users, u)
		}
		return refusal
	})
	if n != 48 {
		t.Errorf("two uids hold %d connections of 64", n)
	}
	wantCode(t, refusal, codes.ResourceExhausted, "48 connections outside of pods")
	streams := 0
	n, refusal = fill(t, func() error { streams++; return l.beginStream(users[streams%2], now) })
	if n != 48 {
		t.Errorf("two uids hold %d calls of 64", n)
	}
	wantCode(t, refusal, codes.ResourceExhausted, "48 calls outside of pods")
	house, refusal, _ := l.connect(origin{house: "a"}, now)
	must(t, refusal)
	must(t, l.beginStream(house, now))
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(l.Limits, true)
		user, _, _ := l.connect(origin{uid: 100_000}, time.Now())
		n, refusal := fill(t, func() error { _, err := l.beginAttestation(t.Context(), user); return err })
		if n != 48 {
			t.Errorf("%d callers outside of pods are attested at a time, of 64", n)
		}
		wantCode(t, refusal, codes.ResourceExhausted, "48 callers outside of pods")
		house, _, _ := l.connect(origin{house: "a"}, time.Now())
		_, err := l.beginAttestation(t.Context(), house)
		must(t, err)
	})
}

func TestHousesAreForgotten(t *testing.T) {
	l := newLimiter(Limits{Connections: 100}, true)
	now := time.Unix(1e9, 0)
	for i := range 10_000 {
		if u, _, ok := l.connect(origin{house: fmt.Sprint(i)}, now); ok {
			l.disconnect(u)
		}
		if now = now.Add(time.Millisecond); len(l.users) > 2*100 {
			t.Fatalf("knows %d pods", len(l.users))
		}
	}
}

// The caller reads which pod it is in, and the log says so.
func TestTooManyConnectionsOfAPod(t *testing.T) {
	f := serve(t, func(c *Config) {
		c.Limits = Limits{Connections: 4, HouseShare: 4}
		c.Attestors = append(c.Attestors, housing{"1f-2e"})
	})
	f.register(f.entry("a", "/a"))
	first := f.fetch(testContext(t))
	_, err := first.Recv()
	must(t, err)
	_, err = f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.ResourceExhausted, "pod 1f-2e holds 1 connections to the agent")
	f.agent.Apply(registry.Update{HasEntries: true})
	_, err = first.Recv()
	wantCode(t, err, codes.PermissionDenied)
	if !strings.Contains(f.log.String(), "pod=1f-2e") {
		t.Errorf("the log does not name the pod:\n%s", f.log)
	}
}
