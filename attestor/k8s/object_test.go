package k8s

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

func podNamed(namespace, name, uid string) attestor.Object {
	return attestor.Object{Plural: "pods", Group: "core", Namespace: namespace, Name: name, UID: uid}
}

func TestAttestObject(t *testing.T) {
	t.Parallel()
	metadata := func(key, value string) func(map[string]any) {
		return func(p map[string]any) { p["metadata"].(map[string]any)[key] = value }
	}
	list := podList(
		podJSON(1, nil), podJSON(2, nil),
		podJSON(3, nil), podJSON(3, nil), // two of one UID
		podJSON(4, nil), podJSON(5, metadata("name", "orders-4")), // two of one name
		podJSON(6, func(p map[string]any) { p["spec"].(map[string]any)["nodeName"] = "node-2" }),
	)
	for name, test := range map[string]struct {
		object   attestor.Object
		uid      string
		notKnown bool
		absent   bool
	}{
		"by name":         {object: podNamed("shop", "orders-1", ""), uid: podUID(1)},
		"by UID":          {object: podNamed("", "", podUID(2)), uid: podUID(2)},
		"by both":         {object: podNamed("shop", "orders-2", podUID(2)), uid: podUID(2)},
		"another's UID":   {object: podNamed("shop", "orders-1", podUID(2)), absent: true},
		"another's name":  {object: podNamed("shop", "orders-2", podUID(1)), absent: true},
		"other namespace": {object: podNamed("billing", "orders-1", ""), absent: true},
		"nobody's name":   {object: podNamed("shop", "orders-9", ""), absent: true},
		"nobody's UID":    {object: podNamed("", "", podUID(9)), absent: true},
		"two of a UID":    {object: podNamed("", "", podUID(3)), notKnown: true},
		"two of a name":   {object: podNamed("shop", "orders-4", ""), notKnown: true},
		"another node's":  {object: podNamed("shop", "orders-6", ""), notKnown: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &script{list: always(list)}
				a := s.attestor(t)
				uid, found, err := a.AttestObject(t.Context(), test.object)
				if errors.Is(err, attestor.ErrNoObject) != test.absent || errors.Is(err, attestor.ErrNotKnown) != test.notKnown || (err == nil) != (test.uid != "") {
					t.Fatalf("got %v", err)
				}
				if uid != test.uid {
					t.Errorf("got UID %s, want %s", uid, test.uid)
				}
				if err == nil && !slices.Contains(found, attestor.Selector{Type: "k8s", Value: "pod-uid:" + uid}) {
					t.Errorf("got %v", found)
				}
				for _, s := range found {
					if strings.HasPrefix(s.Value, keyContainer) {
						t.Errorf("got %s, of one of its containers", s)
					}
				}
			})
		})
	}
}

// TestAttestObjectAsksAnew: a list that is older than the call does not say that
// a pod is not there.
func TestAttestObjectAsksAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{list: func(n int) ([]byte, error) {
			switch n {
			case 0:
				return podList(podJSON(1, nil)), nil
			case 1:
				return podList(podJSON(1, nil), podJSON(2, nil)), nil
			}
			return nil, errors.New("away")
		}}
		a := s.attestor(t)
		for _, step := range []struct {
			after time.Duration
			pod   string
			asked int32
			says  string
		}{
			{0, "orders-1", 1, ""},
			{time.Second, "orders-1", 1, ""}, // known, and young
			{time.Second, "orders-2", 2, ""},
			{time.Second, "orders-2", 2, ""},
			{time.Second, "orders-3", 3, "away"},
			{2 * maxAge, "orders-1", 4, "away"},
		} {
			time.Sleep(step.after)
			_, _, err := a.AttestObject(t.Context(), podNamed("shop", step.pod, ""))
			if step.says == "" && err != nil || step.says != "" && (err == nil || !strings.Contains(err.Error(), step.says) || errors.Is(err, attestor.ErrNoObject)) {
				t.Errorf("%s: got %v, want %q", step.pod, err, step.says)
			}
			if got := s.asked.Load(); got < step.asked {
				t.Errorf("%s: asked %d times, want %d", step.pod, got, step.asked)
			}
		}
	})
}

func TestAttestObjectGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{takes: time.Minute, list: always(podList())}
		a := s.attestor(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := a.AttestObject(ctx, podNamed("shop", "orders-1", "")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the end of the context", err)
		}
	})
}

func TestFollowObject(t *testing.T) {
	t.Parallel()
	same := podList(podJSON(1, nil))
	for name, test := range map[string]struct {
		list []byte // from the second on
		told int32
	}{
		"nothing":         {same, 0},
		"another pod":     {podList(podJSON(1, nil), podJSON(2, nil)), 0},
		"a label":         {podList(podJSON(1, func(p map[string]any) { labels(p)["version"] = "v2" })), 1},
		"gone":            {podList(), 1},
		"another of name": {podList(podJSON(1, func(p map[string]any) { p["metadata"].(map[string]any)["uid"] = podUID(7) })), 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &script{list: func(n int) ([]byte, error) {
					if n == 0 {
						return same, nil
					}
					return test.list, nil
				}}
				a := s.attestor(t)
				o := podNamed("shop", "orders-1", "")
				uid, found, err := a.AttestObject(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				o.UID = uid
				var told atomic.Int32
				stop := a.FollowObject(o, found, func() { told.Add(1) })
				defer stop()
				time.Sleep(time.Minute)
				synctest.Wait()
				if told.Load() != test.told {
					t.Errorf("told %d times, want %d", told.Load(), test.told)
				}
			})
		})
	}
}

func TestKnows(t *testing.T) {
	t.Parallel()
	a := New(Config{})
	if !a.Knows("pods", "core") || a.Knows("pods", "apps") || a.Knows("deployments", "apps") || a.Knows("pods", "") {
		t.Error("it knows other objects than pods")
	}
	if New(Config{Signatures: noSignatures{}}).Knows("pods", "core") {
		t.Error("a pod is known by its name where images are to be signed")
	}
}

type noSignatures struct{}

func (noSignatures) Selectors(context.Context, string) ([]string, error) { return nil, nil }
