package attestor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fixed answers the same for every process, after a while.
type fixed struct {
	kind   string
	values []string
	err    error
	after  time.Duration
}

func (f fixed) Type() string { return f.kind }

func (f fixed) Attest(ctx context.Context, _ *Process) ([]Selector, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(f.after):
	}
	var found []Selector
	for _, v := range f.values {
		found = append(found, Selector{f.kind, v})
	}
	return found, f.err
}

func pinSelf(t *testing.T) *Process {
	t.Helper()
	p, err := Pin(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func TestAttest(t *testing.T) {
	broken := errors.New("kubelet is away")
	for name, test := range map[string]struct {
		attestors []Workload
		want      string
		err       []error
	}{
		"sorted, without duplicates": {
			attestors: []Workload{fixed{kind: "unix", values: []string{"uid:1", "gid:2", "uid:1"}}, fixed{kind: "k8s", values: []string{"ns:a"}}},
			want:      "k8s:ns:a unix:gid:2 unix:uid:1",
		},
		"one fails": {
			attestors: []Workload{fixed{kind: "k8s", values: []string{"ns:half"}, err: broken}, fixed{kind: "unix", values: []string{"uid:1"}}},
			want:      "unix:uid:1",
		},
		"one knows nothing": {
			attestors: []Workload{fixed{kind: "docker"}, fixed{kind: "k8s", err: broken}},
		},
		"all fail": {
			attestors: []Workload{fixed{kind: "k8s", err: broken}, fixed{kind: "unix", err: fs.ErrPermission}},
			err:       []error{ErrAttestation, broken, fs.ErrPermission},
		},
		"none": {err: []error{ErrAttestation}},
	} {
		t.Run(name, func(t *testing.T) {
			selectors, err := Attest(t.Context(), pinSelf(t), test.attestors)
			if got := join(selectors); got != test.want {
				t.Errorf("selectors %q, want %q", got, test.want)
			}
			if (err != nil) != (len(test.err) > 0) {
				t.Errorf("error %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("error of several lines: %v", err)
			}
			for _, want := range test.err {
				if !errors.Is(err, want) {
					t.Errorf("error %v does not wrap %v", err, want)
				}
			}
			if errors.Is(err, ErrProcessGone) {
				t.Errorf("error %v wraps ErrProcessGone", err)
			}
		})
	}
}

func join(selectors []Selector) string {
	var all []string
	for _, s := range selectors {
		all = append(all, s.String())
	}
	return strings.Join(all, " ")
}

func TestAttestObserved(t *testing.T) {
	p := pinSelf(t)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		begin := time.Now()
		var outcomes []Outcome
		selectors, err := AttestObserved(ctx, p, []Workload{
			fixed{kind: "k8s", after: time.Hour},
			fixed{kind: "docker", after: 3 * time.Second, values: []string{"label:a:b"}},
			fixed{kind: "unix", after: 2 * time.Second, values: []string{"uid:1", "gid:1"}},
		}, func(o Outcome) { outcomes = append(outcomes, o) })
		if err != nil || join(selectors) != "docker:label:a:b unix:gid:1 unix:uid:1" {
			t.Fatalf("selectors %v, error %v", selectors, err)
		}
		if took := time.Since(begin); took != 5*time.Second {
			t.Errorf("took %v: not side by side, or not bounded by the context", took)
		}
		want := []Outcome{
			{Type: "k8s", Duration: 5 * time.Second, Err: context.DeadlineExceeded},
			{Type: "docker", Duration: 3 * time.Second, Selectors: 1},
			{Type: "unix", Duration: 2 * time.Second, Selectors: 2},
		}
		if !slices.Equal(outcomes, want) {
			t.Errorf("outcomes %+v, want %+v", outcomes, want)
		}
	})
}

// Whatever the attestors found: of a process that is gone nothing counts.
func TestAttestOfAProcessThatIsGone(t *testing.T) {
	p := pinSelf(t)
	p.Close()
	for _, w := range []Workload{fixed{kind: "unix", values: []string{"uid:1"}}, fixed{kind: "unix", err: fs.ErrNotExist}} {
		selectors, err := Attest(t.Context(), p, []Workload{w})
		wantGone(t, err, "attest process")
		if selectors != nil || errors.Is(err, ErrAttestation) {
			t.Fatalf("selectors %v, error %v", selectors, err)
		}
	}
}
