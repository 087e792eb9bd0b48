package k8s

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

var (
	_ attestor.Follower  = (*Attestor)(nil)
	_ attestor.Housing   = (*Attestor)(nil)
	_ attestor.Runner    = (*Attestor)(nil)
	_ attestor.Dependent = (*Attestor)(nil)
)

func TestAttest(t *testing.T) {
	k := startKubelet(t, manyPods(3))
	a := running(t, New(Config{NodeName: nodeName, Kubelet: k.cfg}).inside(2, "debug"))
	if a.Type() != "k8s" {
		t.Errorf("type %q", a.Type())
	}
	for range 3 {
		selectors, err := a.Attest(t.Context(), self(t))
		if err != nil {
			t.Fatal(err)
		}
		all := values(selectors) + "\n"
		for _, want := range []string{"k8s:pod-name:orders-2\n", "k8s:container-name:debugger\n", "k8s:sa:orders\n"} {
			if !strings.Contains(all, want) {
				t.Errorf("lacks %s", want)
			}
		}
	}
	if k.asked() != 1 {
		t.Errorf("%d requests", k.asked())
	}
}

// TestOutsideOfPods: this test itself, a real process, is in no pod.
func TestOutsideOfPods(t *testing.T) {
	cgroup, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	k := startKubelet(t, manyPods(1))
	a := running(t, New(Config{Kubelet: k.cfg}))
	p := self(t)
	if strings.Contains(string(cgroup), "kubepods") { // where the tests run in a pod
		a.in(func(*attestor.Process) (string, error) { return "0::/system.slice/cron.service\n", nil })
	}
	waitFor(t, a.source, func(s *source) bool { return s.newest != nil }) // which nobody asked for
	selectors, err := a.Attest(t.Context(), p)
	if err != nil || len(selectors) != 0 || k.asked() != 1 || a.House(p) != "" {
		t.Fatalf("got %v, %v, %d requests, house %q", selectors, err, k.asked(), a.House(p))
	}
	a.Follow(p, nil, func() { t.Error("changed") })()
}

func TestHouse(t *testing.T) {
	a := New(Config{}).inside(1, "app")
	p := &attestor.Process{}
	if got := a.House(p); got != podUID(1) {
		t.Errorf("house %q", got)
	}
	a.in(func(*attestor.Process) (string, error) { return "0::/../" + idA, nil })
	if got := a.House(p); got != idA {
		t.Errorf("house of a sibling %q", got)
	}
	a.in(func(*attestor.Process) (string, error) { return "", os.ErrNotExist })
	if got := a.House(p); got != "unplaced" {
		t.Errorf("house of one that cannot be placed %q", got)
	}
}

// TestOneRequest: a hundred callers of a hundred new containers at once cost
// one request.
func TestOneRequest(t *testing.T) {
	k := startKubelet(t, manyPods(100))
	release := make(chan struct{})
	k.answer = func(w http.ResponseWriter, _ *http.Request) {
		<-release
		_, _ = w.Write(k.pods)
	}
	a := running(t, New(Config{NodeName: nodeName, Kubelet: k.cfg}))
	pinned := self(t)
	var callers sync.WaitGroup
	for n := range 100 {
		callers.Go(func() {
			q := question{place: place{podUID(n), containerID(n, "app")}}
			r, err := a.source.find(t.Context(), q, pinned.Alive)
			if err != nil || !strings.HasPrefix(r.who, fmt.Sprintf("shop/orders-%d ", n)) {
				t.Errorf("caller %d: %v, %v", n, r, err)
			}
		})
	}
	waitFor(t, a.source, func(s *source) bool { return s.next.waiting == 100 })
	close(release)
	callers.Wait()
	if k.asked() != 1 {
		t.Errorf("%d requests", k.asked())
	}
}

// waitFor waits until something is true of a source that others change.
func waitFor(t *testing.T, s *source, met func(*source) bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		s.mu.Lock()
		ok := met(s)
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("it never was")
		}
	}
}

// script is a kubelet without a network, for tests in which time is made.
type script struct {
	asked atomic.Int32
	takes time.Duration
	list  func(n int) ([]byte, error) // the n-th answer, from 0
}

func (s *script) ask(ctx context.Context, old *list) (*list, error) {
	began := time.Now()
	n := int(s.asked.Add(1)) - 1
	select {
	case <-time.After(s.takes):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	data, err := s.list(n)
	if err != nil {
		return nil, err
	}
	l, err := decode(bytes.NewReader(data), nodeName, old)
	if err == nil {
		l.began = began
	}
	return l, err
}

func (s *script) attestor(t *testing.T) *Attestor {
	a := New(Config{})
	a.source = newSource(s.ask, nil)
	return running(t, a)
}

func always(list []byte) func(int) ([]byte, error) {
	return func(int) ([]byte, error) { return list, nil }
}

// TestWaitsForTheContainer: a kubelet that answers quickly is asked again
// sooner, and all who wait for a container cost the same requests.
func TestWaitsForTheContainer(t *testing.T) {
	unready := podList(podJSON(1, func(p map[string]any) { status(p, "containerStatuses", 0)["containerID"] = "" }))
	pinned := self(t)
	for takes, pause := range map[time.Duration]time.Duration{
		time.Millisecond: leastMissPause, 20 * time.Millisecond: 200 * time.Millisecond, time.Second: mostMissPause,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &script{takes: takes, list: func(n int) ([]byte, error) {
				switch {
				case n < 3:
					return podList(), nil
				case n < 6:
					return unready, nil
				}
				return manyPods(3), nil
			}}
			a := s.attestor(t).inside(1, "app")
			var callers sync.WaitGroup
			began := time.Now()
			for range 50 {
				callers.Go(func() {
					if selectors, err := a.Attest(t.Context(), pinned); err != nil || len(selectors) == 0 {
						t.Errorf("got %v, %v", selectors, err)
					}
				})
			}
			callers.Wait()
			if took := time.Since(began); s.asked.Load() != 7 || took != 7*takes+6*pause {
				t.Errorf("requests of %s: %d of them in %s", takes, s.asked.Load(), took)
			}
		})
	}
}

// TestLongRequest: a list that is older than maxAge when it comes is an answer to
// those who asked before it was asked for.
func TestLongRequest(t *testing.T) {
	pinned := self(t)
	synctest.Test(t, func(t *testing.T) {
		const takes = 2 * maxAge
		s := &script{takes: takes, list: always(podList(podJSON(1, nil)))}
		a := s.attestor(t).inside(1, "app")
		ctx, cancel := context.WithTimeout(t.Context(), 4*takes)
		defer cancel()
		began := time.Now()
		found, err := a.Attest(ctx, pinned)
		if err != nil || len(found) == 0 {
			t.Fatalf("got %d selectors, %v", len(found), err)
		}
		if took := time.Since(began); took != takes {
			t.Errorf("it took %s, want %s", took, takes)
		}
	})
}

// TestUnknownContainer: it is waited for 30 s in all; after that, whoever
// asks for it hears so at once, and the kubelet is asked each 5 s at most.
func TestUnknownContainer(t *testing.T) {
	pinned := self(t)
	synctest.Test(t, func(t *testing.T) {
		s := &script{list: always(manyPods(3))}
		a := s.attestor(t).inside(7, "app")
		attest := func() (time.Duration, error) {
			began := time.Now()
			selectors, err := a.Attest(t.Context(), pinned)
			if err == nil {
				t.Fatalf("found %v", selectors)
			}
			return time.Since(began), err
		}
		took, err := attest()
		want := "container " + containerID(7, "app") + " of pod " + podUID(7) + ": the kubelet does not list it among its 3 pods"
		if !strings.HasPrefix(err.Error(), want) || took != patience {
			t.Errorf("error %v after %s", err, took)
		}
		before := s.asked.Load()
		for range 100 {
			if took, _ := attest(); took != 0 {
				t.Fatalf("answered after %s", took)
			}
		}
		if s.asked.Load() != before {
			t.Errorf("%d requests for what is known to be unknown", s.asked.Load()-before)
		}
		time.Sleep(unknownAge)
		if took, _ := attest(); took != 0 || s.asked.Load() != before+1 {
			t.Errorf("answered after %s and %d requests", took, s.asked.Load()-before)
		}
	})
}

func TestCallerGivesUp(t *testing.T) {
	pinned := self(t)
	synctest.Test(t, func(t *testing.T) {
		s := &script{list: always(manyPods(3))}
		a := s.attestor(t).inside(7, "app")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := a.Attest(ctx, pinned)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "does not list it among") {
			t.Errorf("error %v", err)
		}
		// Nobody waits any more: the kubelet is left in peace.
		before := s.asked.Load()
		time.Sleep(time.Hour)
		if after := s.asked.Load(); after > before+1 {
			t.Errorf("%d requests on behalf of nobody", after-before)
		}
	})
}

// TestPodDeletedWhileItAsks: the process is gone before the kubelet answers.
func TestPodDeletedWhileItAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{list: always(manyPods(1))}
		a := s.attestor(t)
		began := time.Now()
		gone := func() error {
			if time.Since(began) > 2*time.Second {
				return attestor.ErrProcessGone
			}
			return nil
		}
		_, err := a.source.find(t.Context(), question{place: place{podUID(7), containerID(7, "app")}}, gone)
		if !errors.Is(err, attestor.ErrProcessGone) || time.Since(began) > 3*time.Second {
			t.Errorf("error %v after %s", err, time.Since(began))
		}
	})
}

// TestKubeletAway: what is known is given on for 15 s; then, and to those
// whose container is not known, nothing.
func TestKubeletAway(t *testing.T) {
	pinned := self(t)
	away := errors.New("connection refused")
	synctest.Test(t, func(t *testing.T) {
		var reported []error
		var down atomic.Bool
		s := &script{list: func(int) ([]byte, error) {
			if down.Load() {
				return nil, away
			}
			return manyPods(3), nil
		}}
		a := New(Config{})
		a.source = newSource(s.ask, func(err error) { reported = append(reported, err) })
		running(t, a).inside(1, "app")
		attest := func(want error) {
			t.Helper()
			if _, err := a.Attest(t.Context(), pinned); !errors.Is(err, want) {
				t.Fatalf("error %v, want %v", err, want)
			}
		}
		attest(nil)
		time.Sleep(maxAge - time.Second)
		attest(nil)
		down.Store(true)
		a.inside(9, "app")
		attest(away)
		a.inside(1, "app")
		attest(nil)
		time.Sleep(time.Second)
		attest(away)
		n := s.asked.Load()
		attest(away)
		if now := s.asked.Load(); now != n {
			t.Errorf("%d requests at one moment", now-n+1)
		}
		time.Sleep(errorAge)
		attest(away)
		down.Store(false)
		time.Sleep(errorAge)
		attest(nil)
		synctest.Wait()
		if len(reported) != 2 || !errors.Is(reported[0], away) || reported[1] != nil {
			t.Errorf("reported %v", reported)
		}
	})
}

func TestAfterRun(t *testing.T) {
	pinned := self(t)
	synctest.Test(t, func(t *testing.T) {
		s := &script{takes: time.Hour, list: always(manyPods(1))}
		a := New(Config{}).inside(1, "app")
		a.source = newSource(s.ask, nil)
		ctx, cancel := context.WithCancel(t.Context())
		var both sync.WaitGroup
		both.Go(func() { _ = a.Run(ctx) })
		both.Go(func() {
			if _, err := a.Attest(t.Context(), pinned); !errors.Is(err, errNotRunning) {
				t.Errorf("error %v", err)
			}
		})
		synctest.Wait()
		cancel()
		both.Wait()
		if _, err := a.Attest(t.Context(), pinned); !errors.Is(err, errNotRunning) {
			t.Errorf("error %v", err)
		}
	})
}

// signer signs every image.
type signer struct{ err error }

func (s signer) Selectors(_ context.Context, image string) ([]string, error) {
	return []string{"image-signature:verified", "image-signature-subject:" + image}, s.err
}

func TestSignatures(t *testing.T) {
	k := startKubelet(t, manyPods(3))
	image := "registry.example.org/shop/app@sha256:" + strings.Repeat("e", 64)
	for _, podOnly := range []bool{false, true} {
		a := running(t, New(Config{NodeName: nodeName, Kubelet: k.cfg, PodOnly: podOnly, Signatures: signer{}}).inside(1, "app"))
		var found []attestor.Selector
		for range 2 { // the shared selectors stay as they are
			var err error
			if found, err = a.Attest(t.Context(), self(t)); err != nil {
				t.Fatal(err)
			}
			all := values(found) + "\n"
			if strings.Count(all, "k8s:image-signature:verified\n") != 1 || !strings.Contains(all, "k8s:image-signature-subject:"+image+"\n") || strings.Contains(all, "container-name") == podOnly {
				t.Errorf("pod only %v: got %s", podOnly, all)
			}
		}
		a.Follow(self(t), found, func() { t.Errorf("pod only %v: changed", podOnly) })()
	}
	broken := errors.New("registry away")
	a := running(t, New(Config{NodeName: nodeName, Kubelet: k.cfg, Signatures: signer{broken}}).inside(1, "app"))
	if selectors, err := a.Attest(t.Context(), self(t)); !errors.Is(err, broken) || selectors != nil {
		t.Errorf("got %v, %v", selectors, err)
	}
}

// BenchmarkCaller is a caller of which all is known but where it is, with what
// its connection asks of the attestor: limits, selectors, following.
func BenchmarkCaller(b *testing.B) {
	l, err := decode(bytes.NewReader(manyPods(110)), nodeName, nil)
	if err != nil {
		b.Fatal(err)
	}
	a := New(Config{NodeName: nodeName})
	a.source.newest = l
	a.in(func(p *attestor.Process) (string, error) { // of this process's size, read as any other's
		if _, err := cgroupOf(p); err != nil {
			return "", err
		}
		return "0::/kubepods/burstable/pod" + podUID(50) + "/" + containerID(50, "app") + "\n", nil
	})
	pinned := make([]*attestor.Process, 200)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if i %= len(pinned); i == 0 {
			b.StopTimer()
			for i := range pinned {
				if pinned[i] != nil {
					pinned[i].Close()
				}
				if pinned[i], err = attestor.Pin(os.Getpid()); err != nil {
					b.Fatal(err)
				}
			}
			l.began = time.Now()
			b.StartTimer()
		}
		p := pinned[i]
		selectors, err := a.Attest(b.Context(), p)
		if err != nil || len(selectors) == 0 || a.House(p) == "" {
			b.Fatal(selectors, err)
		}
		a.Follow(p, selectors, func() {})()
	}
}
