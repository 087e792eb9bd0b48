package k8s

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

// TestFollow: what each list makes of a process that was attested by the
// first. An empty list is one without the pod.
func TestFollow(t *testing.T) {
	pinned := self(t)
	same := podList(podJSON(1, nil), podJSON(2, func(p map[string]any) { labels(p)["version"] = "v9" }))
	labelled := podList(podJSON(1, func(p map[string]any) { labels(p)["version"] = "v2" }))
	owned := podList(podJSON(1, func(p map[string]any) { p["metadata"].(map[string]any)["ownerReferences"] = nil }))
	twice := podList(podJSON(1, nil), podJSON(1, nil))
	away := errors.New("away")
	for name, test := range map[string]struct {
		lists [][]byte // from the second on; nil: the request fails
		when  int      // the list that changes it, from 1; 0: none
	}{
		"nothing":           {[][]byte{same, same, same}, 0},
		"a label":           {[][]byte{same, labelled, same}, 2},
		"an owner":          {[][]byte{owned, same}, 1},
		"gone":              {[][]byte{podList(), podList(), podList()}, 2},
		"gone for a moment": {[][]byte{podList(), same, podList(), same}, 0},
		"kubelet away":      {[][]byte{nil, nil, nil, same}, 0},
		"gone while away":   {[][]byte{podList(), nil, nil, podList()}, 4},
		"two of it":         {[][]byte{twice}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &script{list: func(n int) ([]byte, error) {
					switch {
					case n == 0:
						return same, nil
					case n > len(test.lists):
						return test.lists[len(test.lists)-1], nil
					case test.lists[n-1] == nil:
						return nil, away
					}
					return test.lists[n-1], nil
				}}
				a := s.attestor(t).inside(1, "app")
				found, err := a.Attest(t.Context(), pinned)
				if err != nil {
					t.Fatal(err)
				}
				found = append([]attestor.Selector{{Type: "unix", Value: "uid:1"}, {Type: "k8s", Value: "image-signature:verified"}}, found...)
				var told, at atomic.Int32
				stop := a.Follow(pinned, found, func() {
					told.Add(1)
					at.Store(s.asked.Load() - 1)
				})
				time.Sleep(time.Duration(len(test.lists)) * 11 * time.Second)
				synctest.Wait()
				if want := int32(min(test.when, 1)); told.Load() != want || at.Load() != int32(test.when) {
					t.Errorf("told %d times, by list %d; want list %d", told.Load(), at.Load(), test.when)
				}
				stop()
				stop()
				before := s.asked.Load()
				time.Sleep(time.Hour)
				if after := s.asked.Load(); after > before {
					t.Errorf("%d requests on behalf of nobody", after-before)
				}
				if told.Load() > 1 {
					t.Error("told again")
				}
			})
		})
	}
}

// TestFollowStale: that the kubelet has not answered for long is told once.
func TestFollowStale(t *testing.T) {
	pinned := self(t)
	synctest.Test(t, func(t *testing.T) {
		s := &script{list: func(n int) ([]byte, error) {
			if n == 0 {
				return manyPods(2), nil
			}
			return nil, errors.New("away")
		}}
		a := s.attestor(t).inside(1, "app")
		found, err := a.Attest(t.Context(), pinned)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		told := make(chan time.Duration, 10)
		defer a.Follow(pinned, found, func() { told <- time.Since(began) })()
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(told) != 1 {
			t.Fatalf("told %d times", len(told))
		}
		if after := <-told; after < staleAfter || after > staleAfter+2*followPeriod {
			t.Errorf("told after %s", after)
		}
	})
}

// TestFollowIsLate: the list has changed between attestation and following.
func TestFollowIsLate(t *testing.T) {
	pinned := self(t)
	k := startKubelet(t, manyPods(2))
	a := running(t, New(Config{NodeName: nodeName, Kubelet: k.cfg}).inside(1, "app"))
	found, err := a.Attest(t.Context(), pinned)
	if err != nil {
		t.Fatal(err)
	}
	told := 0
	a.Follow(pinned, found[1:], func() { told++ })()
	if told != 1 {
		t.Errorf("told %d times of another pod", told)
	}
	a.in(func(*attestor.Process) (string, error) { return "", os.ErrNotExist })
	a.Follow(pinned, found, func() { told++ })()
	if told != 2 {
		t.Errorf("told %d times of a process that is gone", told-1)
	}
}

// TestFollowers: one request tells all of them.
func TestFollowers(t *testing.T) {
	pinned := self(t)
	synctest.Test(t, func(t *testing.T) {
		s := &script{list: func(n int) ([]byte, error) {
			if n < 4 {
				return manyPods(2), nil
			}
			return podList(podJSON(0, nil), podJSON(1, func(p map[string]any) { labels(p)["version"] = "v2" })), nil
		}}
		a := s.attestor(t)
		var told [2]atomic.Int32
		for n := range 2 {
			a.inside(n, "app")
			found, err := a.Attest(t.Context(), pinned)
			if err != nil {
				t.Fatal(err)
			}
			for range 100 {
				defer a.Follow(pinned, found, func() { told[n].Add(1) })()
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if asked := s.asked.Load(); asked < 5 || asked > 7 {
			t.Errorf("%d requests in a minute", asked)
		}
		if told[0].Load() != 0 || told[1].Load() != 100 {
			t.Errorf("told %d and %d", told[0].Load(), told[1].Load())
		}
	})
}

// stamp is what an image is signed with, until it is changed.
type stamp struct {
	mu     sync.Mutex // guards the following
	values []string
	err    error
}

func (s *stamp) Selectors(context.Context, string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.values, s.err
}

func (s *stamp) change(values []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values, s.err = values, err
}

// TestFollowSignatures: an open stream is asked again when what its image is
// signed with changes, and not while that cannot be told.
func TestFollowSignatures(t *testing.T) {
	pinned := self(t)
	signed := []string{"image-signature:verified", "image-signature-subject:a"}
	for name, test := range map[string]struct {
		before []string
		after  []string
		err    error
		told   int32
	}{
		"the same, in another order": {signed, []string{signed[1], signed[0]}, nil, 0},
		"another signer":             {signed, []string{signed[0], "image-signature-subject:b"}, nil, 1},
		"not signed any more":        {signed, nil, attestor.ErrNotKnown, 1},
		"nothing, allowed unsigned":  {signed, nil, nil, 1},
		"the registry is away":       {signed, nil, errors.New("away"), 0},
		"never was signed":           {nil, signed, nil, 0},
	} {
		for _, podOnly := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, pod only %t", name, podOnly), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := &script{list: always(manyPods(3))}
					of := &stamp{values: test.before}
					a := New(Config{PodOnly: podOnly, Signatures: of})
					a.source = newSource(s.ask, nil)
					running(t, a).inside(1, "app")
					found, err := a.Attest(t.Context(), pinned)
					if err != nil {
						t.Fatal(err)
					}
					var told atomic.Int32
					defer a.Follow(pinned, found, func() { told.Add(1) })()
					time.Sleep(time.Minute)
					if n := told.Load(); n != 0 {
						t.Fatalf("told %d times of nothing", n)
					}
					of.change(test.after, test.err)
					time.Sleep(2 * signaturesPause)
					synctest.Wait()
					if n := told.Load(); n != test.told {
						t.Errorf("told %d times, want %d", n, test.told)
					}
				})
			})
		}
	}
}
