package k8s

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// maxAge is how old an answer may be that is given without asking anew.
	// Which pod a container is in never changes; its labels and owners do.
	maxAge = 15 * time.Second
	// missShare is how many times as long as the last request the agent waits
	// before it makes another one on behalf of containers that the kubelet does
	// not know yet, but no less and no more than the following. So a kubelet
	// that has time is asked soon again, and none spends more than a tenth of
	// a CPU on answers.
	missShare      = 10
	leastMissPause = 100 * time.Millisecond
	mostMissPause  = 500 * time.Millisecond
	// errorAge is for how long the failure of a request is everybody's.
	errorAge = time.Second
	// patience is how long a container is waited for, from when it was first
	// asked for; afterwards it is unknown in every list that is not older
	// than unknownAge.
	patience   = 30 * time.Second
	unknownAge = 5 * time.Second
	// forgetAfter is when an unknown container is forgotten, to be waited for
	// anew, and maxUnknown how many are remembered.
	forgetAfter = 10 * time.Minute
	maxUnknown  = 1024
	// followPeriod is the time between two requests, ±10 %, while somebody
	// follows a process.
	followPeriod = 10 * time.Second
	// retryLeast is how long after a failure the kubelet is asked again where
	// nobody waits for it, doubled for each failure in a row up to retryMost,
	// ±10 %.
	retryLeast = time.Second
	retryMost  = 30 * time.Second
	// staleAfter is how old the newest list may be before followers are told that
	// it may not be so any more: what they were given is not to stay for good.
	staleAfter = 5 * time.Minute
)

// errNotRunning is what callers get before Run and after it.
var errNotRunning = errors.New("the agent is about to end, the kubelet is not asked any more")

// source keeps the newest list of the kubelet. All requests are made by the
// one goroutine of run, however many ask.
type source struct {
	ask    func(ctx context.Context, old *list) (*list, error)
	report func(error)
	wake   chan struct{} // holds one token when there is something new to do

	mu        sync.Mutex // guards the following
	newest    *list      // nil until a request succeeded
	ended     time.Time  // when the last request did
	err       error      // of the last request
	missPause time.Duration
	failures  int      // in a row
	next      *outcome // of the request under way, or of the next one
	unknown   map[string]time.Time
	followers map[*follower]struct{}
	refresh   time.Time // when followers want to know
	retry     time.Time // when to ask again after a failure, or for the first time
	over      bool      // run has returned
}

// outcome is what those wait for who cannot be answered.
type outcome struct {
	done    chan struct{}
	waiting int
}

func newSource(ask func(context.Context, *list) (*list, error), report func(error)) *source {
	return &source{
		ask: ask, report: report, wake: make(chan struct{}, 1), next: &outcome{done: make(chan struct{})},
		unknown: map[string]time.Time{}, followers: map[*follower]struct{}{},
	}
}

// find answers q from the newest list, or from the first that knows it. It
// gives up when ctx ends, when alive does not return nil any more, or when the
// container has been waited for long enough.
func (s *source) find(ctx context.Context, q question, alive func() error) (*record, error) {
	asked, arrived := false, time.Now()
	for {
		s.mu.Lock()
		found, err := s.answer(q, arrived, asked)
		if found != nil || err != nil {
			s.mu.Unlock()
			return found, err
		}
		next := s.next
		next.waiting++
		s.mu.Unlock()
		s.poke()
		select {
		case <-next.done:
			asked = true
		case <-ctx.Done():
			s.mu.Lock()
			defer s.mu.Unlock()
			next.waiting--
			return nil, fmt.Errorf("%w: %w", s.unknownNow(q), ctx.Err())
		}
		if err := alive(); err != nil {
			return nil, err
		}
	}
}

// answer is find for this moment: neither a record nor an error means that
// another list is needed. asked says that this caller has waited for the last
// request, so that how it ended is what it gets.
func (s *source) answer(q question, arrived time.Time, asked bool) (*record, error) {
	now := time.Now()
	// A list that took long to read is old when it comes. Who asked before it
	// was asked for gets no better one.
	if l := s.newest; l != nil && (now.Sub(l.began) < maxAge || !l.began.Before(arrived)) {
		found, err := q.in(l)
		if found != nil || err != nil {
			delete(s.unknown, q.container)
			return found, err
		}
		since, known := s.unknown[q.container]
		if !known {
			if since = arrived; len(s.unknown) < maxUnknown {
				s.unknown[q.container] = arrived
			}
		}
		if now.Sub(since) >= patience && now.Sub(l.began) < unknownAge {
			return nil, s.unknownNow(q)
		}
	}
	switch {
	case s.over:
		return nil, errNotRunning
	case s.err != nil && (asked || now.Sub(s.ended) < errorAge):
		return nil, s.err
	}
	return nil, nil
}

// unknownNow says why there is no answer to q.
func (s *source) unknownNow(q question) error {
	where := "container " + q.container
	if q.pod != "" {
		where += " of pod " + q.pod
	}
	l := s.newest
	switch {
	case l == nil:
		return fmt.Errorf("%s: the kubelet has not answered yet", where)
	case l.elsewhere == l.count && l.count > 0:
		return s.notListed("%s: all %d pods that the kubelet lists are of other nodes; is node_name_env right?", where, l.count)
	case q.pod != "" && l.pods[q.pod] != nil:
		return s.notListed("%s (%.200s): the kubelet does not list the container yet", where, l.pods[q.pod].who)
	}
	return s.notListed("%s: the kubelet does not list it among its %d pods; is it the kubelet of this node?", where, l.count)
}

// notListed is an error about the process, unless the kubelet's last answer was
// none: then the container may be in the next.
func (s *source) notListed(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if s.err != nil {
		return err
	}
	return unsure(err)
}

func (s *source) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run makes the requests until ctx ends.
func (s *source) run(ctx context.Context) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.over = true
		close(s.next.done)
		s.next = &outcome{done: make(chan struct{})}
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		pause, wanted := s.pause()
		if wanted && pause <= 0 {
			s.request(ctx)
			if ctx.Err() != nil {
				return
			}
			continue
		}
		if !wanted {
			pause = time.Hour // somebody will wake it
		}
		timer.Reset(pause)
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-timer.C:
		}
	}
}

// pause is the time until the next request, if one is wanted.
func (s *source) pause() (time.Duration, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	switch {
	case s.next.waiting > 0:
		return s.ended.Add(s.missPause).Sub(now), true
	case len(s.followers) > 0:
		return s.refresh.Sub(now), true
	case s.newest == nil || s.err != nil:
		return s.retry.Sub(now), true
	}
	return 0, false
}

// request asks the kubelet once and lets everybody know how it ended.
func (s *source) request(ctx context.Context) {
	s.mu.Lock()
	old := s.newest
	s.mu.Unlock()
	began := time.Now()
	l, err := s.ask(ctx, old)

	s.mu.Lock()
	now := time.Now()
	s.ended, s.err = now, err
	s.missPause = mostMissPause
	if err == nil {
		s.missPause = min(max(missShare*now.Sub(began), leastMissPause), mostMissPause)
	}
	s.refresh = now.Add(spread(followPeriod))
	var told []func()
	if err == nil {
		s.newest = l
		s.forget(now)
		told = s.tell(l)
	} else if s.newest != nil && now.Sub(s.newest.began) >= staleAfter {
		told = s.tellAll()
	}
	close(s.next.done)
	s.next = &outcome{done: make(chan struct{})}
	report := s.count(err)
	s.retry = now.Add(spread(min(retryLeast<<min(s.failures, 10)/2, retryMost)))
	s.mu.Unlock()

	for _, changed := range told {
		changed()
	}
	if report && s.report != nil && ctx.Err() == nil {
		s.report(err)
	}
}

// spread moves d by up to ±10 %.
func spread(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.9 + rand.Float64()/5))
}

// count counts failures in a row and tells whether to report this outcome.
func (s *source) count(err error) bool {
	before := s.failures
	if err == nil {
		s.failures = 0
		return before > 0
	}
	s.failures++
	return before%10 == 0
}

// forget drops containers that have been unknown for long.
func (s *source) forget(now time.Time) {
	for id, since := range s.unknown {
		if now.Sub(since) >= forgetAfter {
			delete(s.unknown, id)
		}
	}
}
