package attestor

import (
	"errors"
	"os"
	"testing"
)

func TestFact(t *testing.T) {
	t.Parallel()
	p, err := Pin(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	away := errors.New("not now")
	finds := 0
	first := NewFact(func(got *Process) (int, error) {
		if got != p {
			t.Errorf("asked of %v", got)
		}
		if finds++; finds == 1 {
			return 0, away
		}
		return finds, nil
	})
	if _, err := first.Of(p); !errors.Is(err, away) {
		t.Errorf("error %v, want %v", err, away)
	}
	for range 2 {
		if got, err := first.Of(p); got != 2 || err != nil {
			t.Errorf("%d, %v; want 2, found once", got, err)
		}
	}
	if got, err := NewFact(func(*Process) (int, error) { return 7, nil }).Of(p); got != 7 || err != nil {
		t.Errorf("another fact: %d, %v", got, err)
	}
	again, err := Pin(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	p = again
	if got, err := first.Of(again); got != 3 || err != nil {
		t.Errorf("pinned anew: %d, %v; want it found anew", got, err)
	}
}
