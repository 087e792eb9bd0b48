package k8s

import (
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

func TestCheck(t *testing.T) {
	otherCA, _ := issue(t, "other")
	for name, test := range map[string]struct {
		change func(k *kubelet)
		want   []string
	}{
		"all is well": {},
		"403": {func(k *kubelet) {
			k.answer = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }
		}, []string{"403 Forbidden", "the agent's ClusterRole or its binding", "rbac.kubelet"}},
		"another CA": {func(k *kubelet) { write(t, k.cfg.CA, string(otherCA)) }, []string{"unknown authority", "kubelet.skip_verification", "agent.kubelet.skipVerification"}},
	} {
		t.Run(name, func(t *testing.T) {
			k := startKubelet(t, manyPods(3))
			if test.change != nil {
				test.change(k)
			}
			a := New(Config{NodeName: nodeName, Kubelet: k.cfg}).inside(1, "app")
			if err := a.Problem(); !errors.Is(err, errNotAsked) {
				t.Errorf("the problem before anybody asked is %v", err)
			}
			err := a.Check(t.Context())
			if problem := a.Problem(); !errors.Is(problem, err) {
				t.Errorf("checked with %v, and the problem is %v", err, problem)
			}
			if len(test.want) == 0 {
				if err != nil {
					t.Fatal(err)
				}
				if _, err := running(t, a).Attest(t.Context(), self(t)); err != nil || k.asked() != 1 {
					t.Errorf("attests with %v after %d requests: the answer of the check is not used", err, k.asked())
				}
				return
			}
			for _, want := range test.want {
				if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
					t.Errorf("got %v\nwant one line with %q", err, want)
				}
			}
		})
	}
}

// TestHeals: a kubelet that refuses at first is asked again though nobody calls,
// less and less often.
func TestHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var well atomic.Bool
		s := &script{list: func(int) ([]byte, error) {
			if well.Load() {
				return manyPods(1), nil
			}
			return nil, errors.New("403 Forbidden")
		}}
		a := New(Config{})
		a.source = newSource(s.ask, nil)
		a.readFirst = func() (string, error) { return "0::/init.scope\n", nil }
		running(t, a)
		time.Sleep(time.Hour)
		if n := s.asked.Load(); n < 100 || n > 150 || a.Problem() == nil {
			t.Errorf("asked %d times in an hour, problem %v", n, a.Problem())
		}
		well.Store(true)
		time.Sleep(retryMost * 11 / 10)
		synctest.Wait()
		before := s.asked.Load()
		if err := a.Problem(); err != nil {
			t.Errorf("has not healed: %v", err)
		}
		time.Sleep(time.Hour)
		if n := s.asked.Load(); n != before {
			t.Errorf("asked %d times more, on behalf of nobody", n-before)
		}
	})
}

func TestSeesNode(t *testing.T) {
	for name, test := range map[string]struct {
		own, first string
		bad        bool
	}{
		"a service of the node":              {ownService, "0::/init.scope\n", false},
		"a node without cgroups of its own":  {ownAlone, ownAlone, false},
		"hostPID":                            {ownPod, "0::/init.scope\n", false},
		"hostPID in a cgroup namespace":      {ownAlone, "0::/../../../../init.scope\n", false},
		"the pod's pause container is first": {ownPod, "0::/kubepods/burstable/pod" + uidB + "/" + idA + "\n", true},
		"it is, in a cgroup namespace":       {ownAlone, "0::/../cri-containerd-" + idA + ".scope\n", true},
		"a container of the pod is first":    {ownPod, ownPod, true},
	} {
		a := New(Config{})
		a.source = newSource((&script{list: always(manyPods(1))}).ask, nil)
		a.readOwn = func() (string, error) { return test.own, nil }
		a.readFirst = func() (string, error) { return test.first, nil }
		err := a.Check(t.Context())
		if errors.Is(err, attestor.ErrPIDNamespace) != test.bad || test.bad && !strings.Contains(err.Error(), "hostPID: true") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
