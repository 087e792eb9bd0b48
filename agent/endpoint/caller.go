package endpoint

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// How often a caller whose stream is open is attested again.
const (
	// attestPause is between two attestations of one caller, whatever its
	// attestors say.
	attestPause = time.Second
	// After an attestation at which an attestor failed, the next comes after
	// retryFirst, then after twice as long each time, up to retryMost; all a
	// quarter more or less by chance.
	retryFirst, retryMost = 5 * time.Second, time.Minute
	// keptFor is for how long an attestor may fail before what it found of a
	// caller counts no more.
	keptFor = 10 * time.Minute
)

// caller is one held call: the process it is about, and what is watched for it.
// It belongs to the goroutine of its call. There are thousands, so it holds no
// goroutine, no timer while nothing failed, and no selectors: the
// registry has those, once for all who have the same.
//
// Whatever has the caller attested again (a Follower, the timer, the end of an
// attestation) interrupts the watch the call waits in. An interrupt is not
// lost where it comes while something is sent, nor is a change between Attest
// and Follow: a Follower compares with what was found.
type caller struct {
	server   *Server
	subject  *subject // whom it is about
	delegate *subject // who asks in its name; nil: it asks itself
	encoder  *encoder
	watch    *registry.Watch

	attested time.Time            // when it last was
	failed   string               // which attestors failed then and why, empty where none did
	failures int                  // attestations in a row at which one did
	failing  map[string]time.Time // since when each of those fails, by type; nil where none does
	lapsed   bool                 // what one of them found counts no more
	follows  []func()             // end what Followers do for it
	retry    *time.Timer          // nil unless an attestation is planned
	again    chan attestation     // an attestation that is going on, or nil
	cancel   context.CancelFunc   // of it
}

// attestation is what attestors made of a caller.
type attestation struct {
	selectors []attestor.Selector // sorted, without duplicates
	failed    []attestor.Outcome  // of those that failed while another succeeded
	err       error               // nobody could tell, or it is gone
}

// failedOf tells whether the attestor of this type failed.
func (a *attestation) failedOf(kind string) bool {
	return slices.ContainsFunc(a.failed, func(o attestor.Outcome) bool { return o.Type == kind })
}

// awayOf tells whether the attestor of this type failed for reasons of its own.
func (a *attestation) awayOf(kind string) bool {
	return slices.ContainsFunc(a.failed, func(o attestor.Outcome) bool {
		return o.Type == kind && !errors.Is(o.Err, attestor.ErrNotKnown)
	})
}

// reason is why attestors failed, on one line; empty where none did.
func (a *attestation) reason() string {
	if a.err != nil {
		return a.err.Error()
	}
	reasons := make([]string, len(a.failed))
	for i, o := range a.failed {
		reasons[i] = o.Failure().Error()
	}
	return strings.Join(reasons, "; ")
}

// with returns the selectors of a caller that had those of last. What an
// attestor found once stays until the same attestor finds something else: that
// it is away says nothing of the caller. So while the kubelet is away, a pod is
// neither cut off nor left with less. A caller that the attestor does not know
// any more loses what it found: else one could see to it that it is not found
// again, and be what it was for good. For the same reason away counts only for
// as long as it has not lapsed, which is told by the attestor's type.
func (a *attestation) with(last []attestor.Selector, lapsed func(kind string) bool) []attestor.Selector {
	if len(a.failed) == 0 {
		return a.selectors
	}
	all := slices.Clone(a.selectors)
	for _, s := range last {
		if a.awayOf(s.Type) && !lapsed(s.Type) {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, attestor.Selector.Compare)
	return all
}

// begin attests the caller, returns the first view there is an answer for, and
// sees to it that the caller is attested again. After an error nothing is held.
func (c *caller) begin(ctx context.Context) (*registry.View, error) {
	a, view, err := c.find(ctx)
	if err == nil {
		c.conclude(&a)
	}
	return view, err
}

// find attests the caller and returns the first view there is an answer for. It
// leaves a watch, unless there is an error.
func (c *caller) find(ctx context.Context) (attestation, *registry.View, error) {
	a := c.server.attest(ctx, c.subject, false)
	switch {
	case isGone(a.err):
		return a, nil, c.gone(a.err)
	case errors.Is(a.err, attestor.ErrAttestation):
		return a, nil, status.Error(codes.Unavailable, a.err.Error())
	case a.err != nil:
		return a, nil, a.err
	}
	c.failed = a.reason()
	view, err := c.first(ctx, func() *registry.Watch { return c.watchFor(a.selectors) })
	if err != nil {
		c.watch.Close()
	}
	return a, view, err
}

// end lets go of what the caller holds.
func (c *caller) end() {
	c.server.held.remove(c.watch)
	c.rest()
	if c.again != nil {
		c.cancel()
		for range c.again { // until it has returned
		}
	}
	c.watch.Close()
}

// rest ends whatever would have the caller attested again.
func (c *caller) rest() {
	for _, stop := range c.follows {
		stop()
	}
	c.follows = nil
	if c.retry != nil {
		c.retry.Stop()
		c.retry = nil
	}
}

// next returns the next view, or nil where there is none until then, which is
// not zero. It attests the caller again when it is time.
func (c *caller) next(ctx context.Context, until time.Time) (*registry.View, error) {
	wait := ctx
	if !until.IsZero() {
		var cancel context.CancelFunc
		wait, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	view, err := c.nextWithin(ctx, wait)
	if err != nil && wait.Err() != nil && ctx.Err() == nil {
		return nil, nil
	}
	return view, err
}

// nextWithin is next for who waits no longer than until wait ends, which is not
// the end of an attestation that is going on.
func (c *caller) nextWithin(ctx, wait context.Context) (*registry.View, error) {
	for {
		view, err := c.watch.Next(wait)
		if !errors.Is(err, registry.ErrInterrupted) {
			return view, err
		}
		if err := c.interrupted(ctx); err != nil {
			return nil, err
		}
	}
}

// interrupted sees why the watch was interrupted.
func (c *caller) interrupted(ctx context.Context) error {
	select {
	case a := <-c.again:
		return c.server.deep.do(func() error { return c.apply(&a) })
	default:
	}
	if c.again != nil {
		return nil // what changed meanwhile is seen when it is followed again
	}
	if wait := time.Until(c.attested.Add(attestPause)); wait > 0 {
		c.plan(wait)
		return nil
	}
	// Not in this goroutine: an attestor that hangs must not keep from the
	// caller that what it has is taken back.
	ctx, c.cancel = c.server.tie(ctx)
	again, watch, quiet := make(chan attestation, 1), c.watch, c.failures > 0
	c.again = again
	go func() {
		defer close(again)
		again <- c.server.attest(ctx, c.subject, quiet)
		watch.Interrupt()
	}()
	return nil
}

// plan has the watch interrupted after a while.
func (c *caller) plan(wait time.Duration) {
	if c.retry != nil {
		c.retry.Stop()
	}
	c.retry = time.AfterFunc(wait, c.watch.Interrupt)
}

// apply makes the caller one that a was found of. Where nobody could be asked, it
// stays what it is.
func (c *caller) apply(a *attestation) error {
	c.cancel()
	c.again, c.cancel = nil, nil
	if isGone(a.err) {
		return c.gone(a.err)
	}
	last := c.watch.Selectors()
	told := a.err == nil || errors.Is(a.err, attestor.ErrAttestation)
	c.lapsed = false
	selectors := a.with(last, func(kind string) bool {
		since, failing := c.failing[kind]
		lapsed := failing && time.Since(since) >= keptFor
		c.lapsed = c.lapsed || lapsed
		return lapsed
	})
	if told && !slices.Equal(selectors, last) {
		watch := c.watchFor(selectors)
		if !c.server.held.replace(c.watch, watch) {
			watch.Close()
			return errStopping
		}
		watch.Succeed(c.watch)
		c.watch = watch
	}
	c.conclude(a)
	return nil
}

// conclude follows what may change from now on, and plans the next attestation
// where an attestor failed. One that failed is not followed: it could say at
// once, and again and again, that what it found is not so any more.
func (c *caller) conclude(a *attestation) {
	c.rest()
	c.attested, c.failed = time.Now(), a.reason()
	if c.failed == "" {
		c.failures, c.failing, c.lapsed = 0, nil, false
	} else {
		c.plan(retryAfter(c.failures))
		c.failures++
		c.fail(a)
	}
	if a.err != nil {
		return
	}
	for _, f := range c.server.followers {
		if !a.failedOf(f.Type()) {
			c.follow(f)
		}
	}
}

// follow has f interrupt the watch when what it found changes.
func (c *caller) follow(f attestor.Follower) {
	found, changed := c.watch.Selectors(), c.watch.Interrupt
	if c.subject.object == nil {
		c.follows = append(c.follows, f.Follow(c.subject.process, found, changed))
	} else if o, ok := f.(attestor.Objects); ok && knows(o, c.subject.object) {
		c.follows = append(c.follows, o.FollowObject(*c.subject.object, found, changed))
	}
}

// fail notes since when attestors fail. An attestation that was not made says
// nothing of them.
func (c *caller) fail(a *attestation) {
	if a.err != nil && !errors.Is(a.err, attestor.ErrAttestation) {
		return
	}
	before := c.failing
	c.failing = make(map[string]time.Time, len(a.failed))
	for _, o := range a.failed {
		c.failing[o.Type] = c.attested
		if since, ok := before[o.Type]; ok {
			c.failing[o.Type] = since
		}
	}
}

// retryAfter is how long to wait after so many failures and another one.
func retryAfter(failures int) time.Duration {
	wait := min(retryFirst<<min(failures, 10), retryMost)
	return wait*3/4 + rand.N(wait/2)
}

// attest asks the attestors for a process or an object. quiet keeps those that
// fail out of the log.
func (s *Server) attest(ctx context.Context, c *subject, quiet bool) (a attestation) {
	end, err := s.limits.beginAttestation(ctx, c.user)
	if err != nil {
		if ctx.Err() == nil && !quiet {
			s.note(c, "attestation refused", "error", err)
		}
		return attestation{err: err}
	}
	defer end()
	bounded, cancel := context.WithTimeout(ctx, s.limits.AttestationTime)
	defer cancel()
	observe := func(o attestor.Outcome) {
		s.meter.attested(o)
		if o.Err == nil || ctx.Err() != nil {
			return
		}
		a.failed = append(a.failed, o)
		if !quiet {
			s.note(c, "attestor failed", "attestor", o.Type, "error", o.Err)
		}
	}
	if c.object != nil {
		a.selectors, a.err = s.attestObject(bounded, c.object, observe)
	} else {
		a.selectors, a.err = attestor.AttestObserved(bounded, c.process, s.attestors, observe)
	}
	if ctx.Err() != nil {
		a.err = ctx.Err()
	}
	return a
}
