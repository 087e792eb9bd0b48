package attestor

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots(2, 3)
		acquire := func(uid uint32, want error) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if err := s.acquire(ctx, uid); !errors.Is(err, want) {
				t.Fatalf("uid %d: %v, want %v", uid, err, want)
			}
		}
		acquire(1, nil)
		acquire(1, nil)
		acquire(1, context.DeadlineExceeded) // the user's
		acquire(2, nil)
		acquire(2, context.DeadlineExceeded) // everybody's
		s.release(1)
		acquire(2, nil)
		for _, uid := range []uint32{1, 2, 2} {
			s.release(uid)
		}
		if len(s.users) != 0 || len(s.all) != 0 {
			t.Errorf("slots of %d users, %d in all are left taken", len(s.users), len(s.all))
		}
	})
}

// What hangs holds no caller longer than it wants to wait, and only its own
// user's slots.
func TestHangingReadsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots(2, 8)
		hang := make(chan struct{})
		within := func(uid uint32, f func() error) error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			return s.do(ctx, uid, f)
		}
		for range 5 { // more than there are slots
			if err := within(1, func() error { <-hang; return nil }); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("a read that hangs: %v", err)
			}
		}
		if len(s.all) != 2 {
			t.Errorf("%d reads hang, want 2", len(s.all))
		}
		failed := errors.New("read failed")
		if err := within(2, func() error { return failed }); !errors.Is(err, failed) {
			t.Errorf("another user: %v", err)
		}
		close(hang)
		synctest.Wait()
		if err := within(1, func() error { return nil }); err != nil {
			t.Errorf("once they have ended: %v", err)
		}
		synctest.Wait()
		if len(s.users) != 0 {
			t.Errorf("slots of %d users are left taken", len(s.users))
		}
	})
}

func TestSlotsUnderLoad(t *testing.T) {
	s := newSlots(2, 3)
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			if err := s.do(t.Context(), uint32(i%3), func() error { return nil }); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for range cap(s.all) { // released behind the last answer
		if err := s.acquire(t.Context(), 9); err != nil {
			t.Fatal(err)
		}
		s.release(9)
	}
}

// A user whose programs are being hashed slows down nobody else, who shares
// a program with him.
func TestHashesOfOneUserAreBounded(t *testing.T) {
	d := newDigests()
	d.now = later
	f, v := opened(t, "program")
	for range hashesPerUser {
		if err := d.hashes.acquire(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	expired, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := d.of(expired, f, v, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a third hash: %v", err)
	}
	if _, err := d.of(t.Context(), f, v, 2); err != nil {
		t.Errorf("another user: %v", err)
	}
	if _, err := d.of(t.Context(), f, v, 1); err != nil {
		t.Errorf("what is known by now: %v", err)
	}
}
