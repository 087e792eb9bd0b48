package fetch

import (
	"context"
	"errors"
	"reflect"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/fileset"
)

// Waits of Follow where it names none.
const (
	DefaultSettle = 2 * time.Second
	DefaultRetry  = 5 * time.Second
)

// Follow writes what is given, again and again, and tells who reads it.
type Follow struct {
	Names *Names
	// Put writes a set of files; nil: nothing is written and nobody told.
	Put func([]fileset.File) error
	// Sweep removes the set before, once nobody opens its files any more.
	Sweep func() error
	// Tell tells readers of a new set and returns when they know. What fails is
	// tried once more after Retry, then with the next change.
	Tell func(context.Context) error
	// Show is called with each change, before it is written; may be nil.
	Show func(*Given)
	// Settle is the time readers have to open all files of a set once they were
	// told: no other comes before it is over. Default DefaultSettle.
	Settle time.Duration
	// Retry is the time after which what failed is tried again. Default
	// DefaultRetry.
	Retry time.Duration
	Log   hclog.Logger
}

// following is the state of one Run.
type following struct {
	*Follow
	last    *Given         // that came
	inForce []fileset.File // that were put
	want    []fileset.File // to be put; nil: what is last is in force
	putAt   time.Time
	quiet   time.Time // until then readers read
	tellAt  time.Time // of the second attempt; zero: none
	unswept bool
	ends    time.Time // of the identity; zero: none, or said
	doubt   string    // that was said
}

// Run takes what is given, each complete, until ctx ends.
func (f *Follow) Run(ctx context.Context, given <-chan *Given) {
	c := *f
	if c.Settle <= 0 {
		c.Settle = DefaultSettle
	}
	if c.Retry <= 0 {
		c.Retry = DefaultRetry
	}
	s := &following{Follow: &c}
	wake := time.NewTimer(time.Hour)
	defer wake.Stop()
	for {
		if at := s.next(); at.IsZero() {
			wake.Stop()
		} else {
			wake.Reset(time.Until(at))
		}
		select {
		case <-ctx.Done():
			return
		case g := <-given:
			s.take(g)
		case <-wake.C:
		}
		s.work(ctx)
	}
}

// next is when there is something to do; zero: never.
func (s *following) next() time.Time {
	var first time.Time
	note := func(at time.Time) {
		if first.IsZero() || at.Before(first) {
			first = at
		}
	}
	if s.want != nil {
		note(later(s.putAt, s.quiet))
	}
	if !s.tellAt.IsZero() {
		note(s.tellAt)
	}
	if s.unswept {
		note(s.quiet)
	}
	if !s.ends.IsZero() {
		note(s.ends)
	}
	return first
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

func (s *following) take(g *Given) {
	if g.equal(s.last) {
		return
	}
	s.last, s.ends = g, g.Ends()
	if s.Show != nil {
		s.Show(g)
	}
	if s.Put == nil {
		return
	}
	if doubt := s.Names.Doubt(g); doubt != s.doubt {
		if doubt != "" {
			s.Log.Warn(doubt)
		}
		s.doubt = doubt
	}
	if !s.Names.All && len(g.Identities) > 0 {
		s.ends = g.Identities[0].NotAfter // of the one that is written
	}
	files, err := s.Names.Files(g)
	switch {
	case err != nil:
		s.Log.Error("cannot make files of what was given; those before stay", "error", err)
	case reflect.DeepEqual(files, s.inForce): // what has changed is not written
		s.want = nil
	default:
		s.want, s.putAt = files, time.Time{}
	}
}

// work does what is due.
func (s *following) work(ctx context.Context) {
	if now := time.Now(); !s.ends.IsZero() && !now.Before(s.ends) {
		s.Log.Error("the identity has ended and no other has come: whoever uses it is refused", "ended", s.ends)
		s.ends = time.Time{}
	}
	if now := time.Now(); s.unswept && !now.Before(s.quiet) {
		s.unswept = false
		if err := s.Sweep(); err != nil {
			s.Log.Warn("files of before are left", "error", err)
		}
	}
	now := time.Now()
	switch {
	case s.want != nil && !now.Before(later(s.putAt, s.quiet)):
		s.put(ctx)
	case !s.tellAt.IsZero() && !now.Before(s.tellAt):
		s.tellAt = time.Time{}
		if err := s.tell(ctx); err != nil {
			s.Log.Error("readers could not be told again; they are with the next change", "error", err)
		}
	}
}

func (s *following) put(ctx context.Context) {
	if err := s.Put(s.want); err != nil {
		s.Log.Error("cannot write the files; those before stay", "error", err, "again_in", s.Retry)
		s.putAt = time.Now().Add(s.Retry)
		return
	}
	about := []any{"files", len(s.want)}
	if !s.ends.IsZero() {
		about = append(about, "ends", s.ends.UTC().Format(time.RFC3339))
	}
	s.Log.Info("wrote new files", about...)
	s.inForce, s.want, s.tellAt, s.unswept = s.want, nil, time.Time{}, true
	if err := s.tell(ctx); err != nil {
		s.Log.Error("readers were not told of the new files", "error", err, "again_in", s.Retry)
		s.tellAt = time.Now().Add(s.Retry)
	}
}

func (s *following) tell(ctx context.Context) error {
	var err error
	if s.Tell != nil {
		err = s.Tell(ctx)
	}
	s.quiet = time.Now().Add(s.Settle)
	if errors.Is(ctx.Err(), context.Canceled) {
		err = nil // it is us who end
	}
	return err
}
