package endpoint

import (
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// Goroutines are used again, go when there is nothing to do, and have all gone
// after close.
func TestDeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDeep()
		before := runtime.NumGoroutine()
		more := func() int { synctest.Wait(); return runtime.NumGoroutine() - before }
		want := errors.New("said by the function")
		for range 3 {
			if err := d.do(func() error { return want }); !errors.Is(err, want) {
				t.Errorf("got %v", err)
			}
			synctest.Wait() // it waits for more
		}
		if n := more(); n != 1 {
			t.Errorf("%d goroutines for one job at a time", n)
		}

		release := make(chan struct{})
		for range 3 {
			d.start(func() { <-release })
		}
		if n := more(); n != 3 {
			t.Errorf("%d goroutines for three jobs at a time", n)
		}
		time.Sleep(3 * stackKept)
		if n := more(); n != 3 {
			t.Errorf("%d goroutines while three are busy", n)
		}
		close(release)
		time.Sleep(3 * stackKept)
		if n := more(); n != 0 {
			t.Errorf("%d goroutines with nothing to do", n)
		}

		d.start(func() {})
		slow := make(chan struct{})
		d.start(func() { time.Sleep(time.Hour); close(slow) })
		d.close()
		select {
		case <-slow:
		default:
			t.Error("close did not wait for a job")
		}
		if n := more(); n != 0 {
			t.Errorf("%d goroutines after close", n)
		}
	})
}
