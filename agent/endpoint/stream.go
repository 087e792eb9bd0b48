package endpoint

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// What a caller may wait for before its first answer.
const (
	// readyWait is how long a caller waits for an agent that is starting, or
	// for its SVID to be signed. It waits less where its own deadline is
	// sooner, so that it reads the reason rather than the deadline.
	readyWait = 5 * time.Second
	// syncWait is how long a caller nothing is known of is held while the
	// server is asked.
	syncWait = time.Second
)

// encoder makes the answers of one method.
type encoder struct {
	method string
	early  bool // there are answers for callers whose SVIDs are not signed yet
	// standing tells where a caller with this view stands.
	standing func(*registry.View) standing
	// encode makes the answer. It is called once for a view that is
	// entitled; equal views make equal parts.
	encode func(*registry.View) mem.BufferSlice
	// mayBeEmpty says that who is denied gets an answer that says so, and
	// stays.
	mayBeEmpty bool
	// refuse makes the refusal of who is denied; nil: noIdentity.
	refuse func(*registry.View) *refusal
	// fetch, where it is set, makes the answer instead, of what the agent has
	// to ask the server for, and tells when to make another one. Its error is
	// the status that ends the stream.
	fetch func(context.Context, *registry.View) (*frame, time.Time, error)
	// waits says that a caller no entry matches is held until one does.
	waits bool
}

// standing is where a caller stands with one method.
type standing int

const (
	unsynced  standing = iota // the agent does not know yet
	denied                    // no entry matches
	pending                   // an entry matches; there is nothing to send yet
	entitled                  // there is an answer
	unoffered                 // the server does not sign what the method is for
)

// standingOf is where a caller stands who wants its SVIDs.
func standingOf(v *registry.View) standing {
	switch {
	case !v.Synced:
		return unsynced
	case len(v.Identities) == 0 && v.Pending == 0:
		return denied
	case len(v.Identities) == 0 || !hasBundle(v):
		return pending
	}
	return entitled
}

// hasBundle tells whether there is a bundle to verify anybody with: to hand
// out one without authorities would cut callers off.
func hasBundle(v *registry.View) bool { return v.Bundle != nil && len(v.Bundle.DER) > 0 }

// watch answers a caller for as long as it stays: attest it, watch what it
// may have, and send what e makes of each view. It returns the status that
// ends the stream.
func (s *Server) watch(stream grpc.ServerStream, e *encoder) error {
	c := &caller{server: s, subject: &connOf(stream.Context()).subject, encoder: e}
	return c.serve(stream.Context(), stream, c.begin)
}

// serve is watch of a caller whose first view begin returns, until ctx ends.
func (c *caller) serve(ctx context.Context, stream grpc.ServerStream, begin func(context.Context) (*registry.View, error)) error {
	s := c.server
	var view *registry.View
	err := s.deep.do(func() (err error) {
		ctx, free := s.tie(ctx)
		defer free()
		view, err = begin(ctx)
		return err
	})
	if err != nil {
		return err
	}
	defer c.end()
	if !s.held.add(c.watch) {
		c.watch.Close() // the one answer that is there, and no more
	}
	var sent *frame
	var refresh time.Time
	defer func() { s.frames.release(sent) }()
	for {
		view = unexpired(view, time.Now())
		sends := false
		switch c.encoder.standing(view) {
		case unsynced:
			if sent != nil {
				return s.takenBack()
			}
			return s.notReady(view)
		case denied:
			if (sent == nil || c.lapsed) && c.failed != "" {
				return c.unknown() // which takes nothing back
			}
			if sends = c.encoder.mayBeEmpty; !sends {
				return c.deny(view, nil)
			}
		case entitled:
			sends = true
		case pending:
			// The caller keeps what it has: its SVID is being replaced.
		case unoffered:
			return errNoWIT
		}
		if sends {
			if sent, refresh, err = c.tell(ctx, stream, view, sent); err != nil {
				return err
			}
		}
		next, err := c.next(ctx, refresh)
		if err != nil {
			return err
		}
		if next != nil {
			view = next
		}
	}
}

// takenBack ends what was served by an agent that was banned or evicted. To a
// client, Unavailable would mean that what it has is still good.
func (s *Server) takenBack() error {
	return status.Errorf(codes.PermissionDenied, "what this process was given has been taken back: %v", s.agent.Unready())
}

// tell sends the answer to view, unless that is what was sent last. It returns
// what was sent last then, and when to make another one.
func (c *caller) tell(ctx context.Context, stream grpc.ServerStream, view *registry.View, sent *frame) (_ *frame, refresh time.Time, err error) {
	frames := &c.server.frames
	next, refresh, err := c.answer(ctx, view)
	if err != nil {
		return sent, refresh, err
	}
	if next.same(sent) {
		frames.release(next)
		return sent, refresh, nil
	}
	frames.release(sent)
	return next, refresh, c.send(stream, next)
}

// answer makes the answer for a caller that is entitled to one, and tells when
// to make another one; zero: when there is another view.
func (c *caller) answer(ctx context.Context, view *registry.View) (f *frame, refresh time.Time, err error) {
	if c.encoder.fetch == nil {
		return c.server.frames.acquire(c.encoder, view), time.Time{}, nil
	}
	err = c.server.deep.do(func() (err error) {
		ctx, free := c.server.tie(ctx)
		defer free()
		f, refresh, err = c.encoder.fetch(ctx, view)
		return err
	})
	return f, refresh, err
}

// held are the watches of open streams. At shutdown they are closed, which
// ends the Next their streams wait in.
type held struct {
	mu      sync.Mutex // guards the following
	watches map[*registry.Watch]struct{}
	closed  bool
}

// add returns false where the server has been told to stop.
func (h *held) add(w *registry.Watch) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.watches[w] = struct{}{}
	}
	return !h.closed
}

// replace returns false, and adds nothing, where the server has been told to
// stop.
func (h *held) replace(old, w *registry.Watch) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		delete(h.watches, old)
		h.watches[w] = struct{}{}
	}
	return !h.closed
}

func (h *held) remove(w *registry.Watch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.watches, w)
}

func (h *held) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for w := range h.watches {
		w.Close()
	}
}

// send sends one answer, to the process that called and to no other: a child
// that got hold of its socket is not entitled to what comes after its end. Nor
// is a delegate once the process it asked for is another one.
func (c *caller) send(stream grpc.ServerStream, f *frame) error {
	if err := c.server.deep.do(c.alive); err != nil {
		return err
	}
	return stream.SendMsg(f)
}

// alive returns nil while the process that called, and the one it is about, are
// what they were.
func (c *caller) alive() error {
	if c.delegate != nil && c.delegate.process != nil {
		if err := c.delegate.process.Alive(); err != nil {
			return gone(err)
		}
	}
	if c.subject.process == nil {
		return nil
	}
	if err := c.subject.process.Alive(); err != nil {
		return c.gone(err)
	}
	return nil
}

// gone is the answer where the process the call is about is gone.
func (c *caller) gone(err error) error {
	if c.subject.object != nil {
		return status.Error(codes.NotFound, err.Error())
	}
	if c.delegate != nil {
		return status.Errorf(codes.NotFound, "the process asked for is not there any more: %v", err)
	}
	return gone(err)
}

func gone(err error) error {
	return status.Errorf(codes.Unauthenticated, "the process that connected is not the caller any more: %v", err)
}

// first waits until there is an answer for the caller, or until it is known
// that there is none: nothing known of a caller has the server asked at once,
// unless an attestor failed. It leaves a watch, one that watch made, whatever it
// returns.
func (c *caller) first(ctx context.Context, watch func() *registry.Watch) (*registry.View, error) {
	wait, cancel := context.WithTimeout(ctx, firstWait(ctx))
	defer cancel()
	s := c.server
	c.watch = watch()
	var view *registry.View
	var synced bool
	var syncErr error
	for {
		next, err := c.watch.Next(wait)
		if err == nil {
			view = unexpired(next, time.Now())
			if stands := c.encoder.standing(view); stands == entitled || stands == unoffered {
				return view, nil
			}
		}
		isDenied := view != nil && c.encoder.standing(view) == denied
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case isDenied && c.failed != "":
			return nil, c.unknown()
		case isDenied && !synced:
			// A new watch tells what there is after the sync also where
			// that is what there was.
			known := c.watch.Selectors()
			c.watch.Close()
			synced, syncErr = true, c.sync(wait, known)
			c.watch = watch()
		case isDenied && s.agent.Unready() == nil && c.encoder.mayBeEmpty:
			return view, nil
		case isDenied && s.agent.Unready() == nil && away(syncErr):
			return nil, status.Errorf(codes.Unavailable, "no registration entry that the agent knows of matches the caller, and the server cannot be asked for others now: %v", syncErr)
		case isDenied && s.agent.Unready() == nil:
			if err := c.deny(view, syncErr); !c.encoder.waits {
				return nil, err
			}
			return view, nil
		case isDenied || err != nil:
			return nil, s.notReady(view)
		}
	}
}

// watchFor watches what a caller with these selectors may have.
func (c *caller) watchFor(selectors []attestor.Selector) *registry.Watch {
	w := c.server.agent.Watch(selectors)
	if c.encoder.early {
		w.Early()
	}
	return w
}

// firstWait is how long first may take: a fifth of the caller's time is left to
// tell it the reason.
func firstWait(ctx context.Context) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		return min(readyWait, time.Until(deadline)*4/5)
	}
	return readyWait
}

func (c *caller) sync(ctx context.Context, selectors []attestor.Selector) error {
	ctx, cancel := context.WithTimeout(ctx, syncWait)
	defer cancel()
	return c.server.agent.Sync(ctx, c.subject.user.String(), selectors)
}

// away reports whether a sync failed because the server could not be asked:
// then nobody knows that there is no entry. A server that is slow has been
// asked a moment before.
func away(syncErr error) bool {
	return syncErr != nil && !errors.Is(syncErr, context.DeadlineExceeded) && !errors.Is(syncErr, context.Canceled)
}

// notReady is the answer to a caller who is to call again; view is the last
// it had, or nil.
func (s *Server) notReady(view *registry.View) error {
	if err := s.agent.Unready(); err != nil {
		return status.Errorf(codes.Unavailable, "the agent is not ready: %v", err)
	}
	switch {
	case view != nil && view.PendingErr != nil:
		return status.Errorf(codes.Unavailable, "the caller is entitled to an identity that could not be signed: %v", view.PendingErr)
	case view != nil && view.Synced && !hasBundle(view):
		return status.Error(codes.Unavailable, "the agent has no bundle of its trust domain yet")
	case view != nil && !view.Synced:
		return status.Error(codes.Unavailable, "the agent has not synced with the server yet")
	}
	const unsigned = "the caller is entitled to an identity that is not signed yet"
	if err := s.agent.Problem(); err != nil {
		return status.Errorf(codes.Unavailable, "%s: %v", unsigned, err)
	}
	return status.Error(codes.Unavailable, unsigned)
}

// unknown is the answer to a caller of which not all is known, and no entry
// matches what is.
func (c *caller) unknown() error {
	return status.Errorf(codes.Unavailable, "the caller was not attested in full, and what is known of it entitles it to nothing; call again: %s", c.failed)
}

// Of a caller's selectors, which are its own to choose where they are labels,
// the log shows so many, of so many bytes each.
const maxShown, maxShownLength = 40, 200

// refusal is what a caller is told who is denied, and what the log says of it.
type refusal struct {
	status      error
	event, hint string
}

var noIdentity = &refusal{
	status: errNoIdentity,
	event:  "no identity issued",
	hint:   "no registration entry of this agent has only selectors that are among these, or the parent of the one that does is not this node",
}

// deny is the answer to a caller no entry matches. What would make it match
// is for the operator, in the log: the caller may be anybody.
func (c *caller) deny(view *registry.View, syncErr error) error {
	r := noIdentity
	if c.encoder.refuse != nil {
		r = c.encoder.refuse(view)
	}
	selectors := c.watch.Selectors()
	found := make([]string, 0, maxShown+1)
	for _, selector := range selectors[:min(len(selectors), maxShown)] {
		found = append(found, fmt.Sprintf("%.*s", maxShownLength, selector))
	}
	if more := len(selectors) - maxShown; more > 0 {
		found = append(found, fmt.Sprintf("and %d more", more))
	}
	repeats, ok := c.server.limits.mayTell(c.subject.user, sameDenial(r.event+" "+c.encoder.method, found), time.Now())
	if !ok {
		return r.status
	}
	args := []any{"method", c.encoder.method, "selectors", found, "hint", r.hint}
	if repeats > 0 {
		args = append(args, "repeated", repeats)
	}
	if syncErr != nil {
		args = append(args, "sync_error", syncErr)
	}
	if c.failed != "" {
		args = append(args, "attestation_error", c.failed)
	}
	c.server.note(c.subject, r.event, args...)
	return r.status
}

var errNoIdentity = status.Error(codes.PermissionDenied, "no identity issued: no registration entry matches the caller; the agent's log has the selectors it was found to have")

var denialSeed = maphash.MakeSeed()

// sameDenial is one number for denials that say the same.
func sameDenial(method string, selectors []string) uint64 {
	var h maphash.Hash
	h.SetSeed(denialSeed)
	for _, part := range append([]string{method}, selectors...) {
		_, _ = h.WriteString(part)
		_ = h.WriteByte(0)
	}
	return h.Sum64()
}

// unexpired is view without SVIDs that have ended: those are never sent, and
// count as pending.
func unexpired(view *registry.View, now time.Time) *registry.View {
	for i := range view.Identities {
		if !now.Before(view.Identities[i].SVID.NotAfter) {
			return withoutExpired(view, now)
		}
	}
	return view
}

func withoutExpired(view *registry.View, now time.Time) *registry.View {
	v := *view
	v.Identities = nil
	for _, id := range view.Identities {
		if now.Before(id.SVID.NotAfter) {
			v.Identities = append(v.Identities, id)
		} else {
			v.Pending++
			v.Unsigned = append(slices.Clip(v.Unsigned), id.Entry)
		}
	}
	slices.SortFunc(v.Unsigned, func(a, b *registry.Entry) int { return strings.Compare(a.ID, b.ID) })
	return &v
}
