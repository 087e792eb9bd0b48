package endpoint

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/attestor"
)

// Limits bound what one local user or pod, and all of them, can make the agent
// hold and do before it knows who calls. A field that is 0 has its default.
//
// On a node of Kubernetes many pods run as one uid, and root in a pod can be
// any. So a caller in a house (see attestor.Housing) counts for that house,
// whatever its uid, and others for their uid. All houses together may hold
// three quarters of what there is: the rest is for callers outside, and for
// houses that hold next to nothing, a 512th. That is room for 128 of them,
// more than a node has pods by default, whatever the others do. Houses are
// made by the node's root alone, and a caller's is told by the kernel; one who
// could make houses could fill the agent. Of uids one may have many (subuid(5)):
// where there are houses, all callers outside may hold three quarters together,
// and the rest is for houses alone.
//
// Where the process may open 32,768 files, the defaults let 4,000 workloads of
// one uid start at the same moment, or 1,000 of one pod.
type Limits struct {
	// Connections bounds those open at a time: 8192, or a quarter of the
	// files the process may open where that is less, as each takes two.
	Connections int
	// ConnectionsPerUID bounds those of one uid: half of Connections.
	ConnectionsPerUID int
	// Streams bounds the calls open at a time: 8192; StreamsPerUID those of
	// one uid: half of Streams. A call is open from its headers to its
	// status, so a workload that watches holds one, on a connection of its
	// own, and what a user's calls make the agent hold stays below 100 MiB; or
	// 260, where each is a stream of SDS that names as much as one may.
	Streams, StreamsPerUID int
	// HouseShare says what one house may have: this part of Connections,
	// Streams, Attestations and UnreadBytes, and of the RequestsPerSecond and Burst of a
	// uid, though one of each at least. It is 8, an eighth: a pod with a
	// workload in each of a thousand processes fits, and pods that take all
	// they may are a handful to be found.
	HouseShare int
	// StreamsPerConnection bounds the calls open on one connection: 32.
	// Clients hold back what is over it, or open another connection.
	StreamsPerConnection int
	// FirstMessage bounds the time from the headers of a call to its
	// request: 10 s.
	FirstMessage time.Duration
	// Unread bounds the time a client leaves answers unread that do not fit
	// the socket any more, or that it does not take by its windows (HTTP/2)
	// though its calls have ended: 20 s. Until then these count like open ones.
	Unread time.Duration
	// UnreadBytes bounds the answers that one uid leaves unread, of its calls
	// that are open and of those that have ended: 32 MiB, or one answer if that
	// is more. What many callers are sent alike is not counted.
	UnreadBytes int
	// Attestations bounds how many callers are looked at, at a time: 1024;
	// AttestationsPerUID those of one uid: 256. A caller over it waits for
	// two seconds before it is refused.
	Attestations, AttestationsPerUID int
	// AttestationTime is how long attestors have for a caller: 10 s.
	AttestationTime time.Duration
	// RequestsPerSecond bounds the calls and connections one uid begins, and
	// the further messages of calls that take several: 20000, after Burst,
	// 40000, at once.
	RequestsPerSecond, Burst int
}

// Bounds that are not worth a setting.
const (
	// maxRefused connections over the limit stay open for refusedTime, so
	// that their callers read why they are refused; more are only closed.
	maxRefused  = 64
	refusedTime = 5 * time.Second
	// attestationWait is how long a caller waits for others to be attested.
	attestationWait = 2 * time.Second
	// A user causes at most logBurst lines in the log at once, and logRate a
	// second.
	logBurst, logRate = 20, 1
	// A caller that is denied calls again every few seconds for as long as it
	// lives: the same denial is told once in repeatEvery. Of a user, maxDenials
	// are told apart.
	repeatEvery = time.Minute
	maxDenials  = 32
)

func (l Limits) withDefaults() Limits {
	set := func(field *int, otherwise int) {
		if *field <= 0 {
			*field = otherwise
		}
	}
	set(&l.Connections, min(8192, openFiles()/4))
	set(&l.ConnectionsPerUID, (l.Connections+1)/2)
	set(&l.Streams, 8192)
	set(&l.StreamsPerUID, (l.Streams+1)/2)
	set(&l.StreamsPerConnection, 32)
	set(&l.HouseShare, 8)
	if l.FirstMessage <= 0 {
		l.FirstMessage = 10 * time.Second
	}
	if l.AttestationTime <= 0 {
		l.AttestationTime = 10 * time.Second
	}
	set(&l.UnreadBytes, 32<<20)
	if l.Unread <= 0 {
		l.Unread = 20 * time.Second
	}
	set(&l.Attestations, 1024)
	set(&l.AttestationsPerUID, min(256, l.Attestations))
	set(&l.RequestsPerSecond, 20000)
	set(&l.Burst, 2*l.RequestsPerSecond)
	return l
}

// openFiles returns how many files the process may have open.
func openFiles() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil || r.Cur > 1<<20 {
		return 1 << 20
	}
	return int(r.Cur)
}

// limiter counts what Limits bound. Users it has not seen for a while cost
// nothing: one is forgotten when it holds no connection and its bucket is
// full again.
type limiter struct {
	Limits
	perUID, perHouse share
	attestations     chan struct{} // a slot each
	housed, outside  chan struct{} // those that houses may take, and others; outside is nil where there are no houses
	nobody           *user         // of connections that have no user yet

	mu          sync.Mutex // guards the following
	connections pool
	streams     pool
	refused     int
	users       map[origin]*user
	sweepAt     int // number of users at which to look for those to forget
}

// origin is where a caller comes from: a house, or else a uid; or it is a broker.
type origin struct {
	uid    uint32 // 0 in a house: root of a pod has all uids at hand
	house  string
	broker string // the SPIFFE ID of a broker, wherever it is; no other field is set then
}

func originOf(p *attestor.Process, housing []attestor.Housing) origin {
	for _, h := range housing {
		if house := h.House(p); house != "" {
			return origin{house: house}
		}
	}
	return origin{uid: p.UID}
}

// String names it to a caller.
func (o origin) String() string {
	if o.house != "" {
		return "pod " + o.house
	}
	if o.broker != "" {
		return "broker " + o.broker
	}
	return fmt.Sprintf("uid %d", o.uid)
}

// share is what one user may have.
type share struct{ connections, streams, attestations, rate, burst, unread int }

// user is what one origin holds and has left.
type user struct {
	origin
	may          *share
	attestations chan struct{} // a slot each

	// guarded by limiter.mu:
	connections int
	streams     int
	unread      int // bytes of answers that are on their way
	requests    bucket
	lines       bucket
	muted       int // lines since the last that was let through
	denials     map[uint64]*denial
}

// denial is one that a user's callers are told again and again.
type denial struct {
	told  time.Time
	muted int // since then
}

// pool is how many of one kind of thing there may be, and are.
type pool struct {
	most, taken int
	housed      int // those of taken that houses have
	kept        int // those that callers outside leave to houses
}

// refuse returns nil where u, who holds so many, may have one more as far as
// others are concerned.
func (p *pool) refuse(u *user, held int, what string) error {
	switch {
	case p.taken >= p.most:
		return status.Errorf(codes.ResourceExhausted, "the agent holds %d %s, as many as it may: call again later", p.taken, what)
	case u.house != "" && p.housed >= ofHouses(p.most) && held >= ofAnyHouse(p.most):
		return status.Errorf(codes.ResourceExhausted, "the agent holds %d %s of pods, as many as it may: call again later", p.housed, what)
	case u.house == "" && p.taken-p.housed >= p.most-p.kept:
		return status.Errorf(codes.ResourceExhausted, "the agent holds %d %s outside of pods, as many as it may: call again later", p.taken-p.housed, what)
	}
	return nil
}

// add counts one more that u has, or less.
func (p *pool) add(u *user, n int) {
	p.taken += n
	if u.house != "" {
		p.housed += n
	}
}

// ofHouses is how many of most all houses may have together, and how many all
// callers outside; ofAnyHouse how many one house may have whatever others have.
func ofHouses(most int) int   { return most - most/4 }
func ofAnyHouse(most int) int { return max(1, most/512) }

// bucket is a token bucket. The zero bucket is full.
type bucket struct {
	spent float64
	at    time.Time
}

func (b *bucket) refill(now time.Time, rate int) {
	b.spent = max(0, b.spent-now.Sub(b.at).Seconds()*float64(rate))
	b.at = now
}

func (b *bucket) take(now time.Time, rate, burst int) bool {
	b.refill(now, rate)
	if b.spent+1 > float64(burst) {
		return false
	}
	b.spent++
	return true
}

// newLimiter makes a limiter. houses says that callers may be in one.
func newLimiter(l Limits, houses bool) *limiter {
	l = l.withDefaults()
	part := func(of int) int { return max(1, of/l.HouseShare) }
	made := &limiter{
		Limits:       l,
		perUID:       share{l.ConnectionsPerUID, l.StreamsPerUID, l.AttestationsPerUID, l.RequestsPerSecond, l.Burst, l.UnreadBytes},
		perHouse:     share{part(l.Connections), part(l.Streams), part(l.Attestations), part(l.RequestsPerSecond), part(l.Burst), part(l.UnreadBytes)},
		attestations: make(chan struct{}, l.Attestations),
		housed:       make(chan struct{}, ofHouses(l.Attestations)),
		nobody:       &user{},
		connections:  pool{most: l.Connections},
		streams:      pool{most: l.Streams},
		users:        map[origin]*user{},
		sweepAt:      64,
	}
	if houses {
		made.connections.kept, made.streams.kept = l.Connections-ofHouses(l.Connections), l.Streams-ofHouses(l.Streams)
		made.outside = make(chan struct{}, ofHouses(l.Attestations))
	}
	return made
}

// connect counts a connection from o. Where it is over a limit, it returns
// the status with which to refuse its calls and a nil user; ok is false where
// the connection should be closed at once. Each connect that is ok is
// followed by one disconnect with what it returned.
func (l *limiter) connect(o origin, now time.Time) (u *user, refusal error, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u = l.user(o, now); u == nil {
		refusal = status.Error(codes.ResourceExhausted, "the agent was called by as many users as it may know: call again later")
	} else if refusal = l.mayConnect(u, now); refusal == nil {
		l.connections.add(u, 1)
		u.connections++
		return u, nil, true
	}
	return nil, refusal, l.hold()
}

// refuse counts a connection whose calls are refused, and returns false where it
// should be closed at once. Where it returns true, one disconnect of no user
// follows.
func (l *limiter) refuse() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hold()
}

// hold is refuse with limiter.mu held.
func (l *limiter) hold() bool {
	if l.refused >= maxRefused {
		return false
	}
	l.refused++
	return true
}

func (l *limiter) mayConnect(u *user, now time.Time) error {
	if err := l.connections.refuse(u, u.connections, "connections"); err != nil {
		return err
	}
	if u.connections >= u.may.connections {
		return status.Errorf(codes.ResourceExhausted, "%s holds %d connections to the agent, as many as one may: close some, or share one", u.origin, u.connections)
	}
	return u.request(now)
}

func (l *limiter) disconnect(u *user) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u == nil {
		l.refused--
		return
	}
	l.connections.add(u, -1)
	u.connections--
}

// user returns the state of o, new where there is none, or nil where more
// users than there may be connections are known.
func (l *limiter) user(o origin, now time.Time) *user {
	if u := l.users[o]; u != nil {
		return u
	}
	if len(l.users) >= l.sweepAt {
		for _, u := range l.users {
			u.requests.refill(now, u.may.rate)
			u.lines.refill(now, logRate)
			if u.connections == 0 && u.streams == 0 && u.unread == 0 && u.requests.spent == 0 && u.lines.spent == 0 && u.denied(now) == 0 {
				delete(l.users, u.origin)
			}
		}
		l.sweepAt = min(max(64, 2*len(l.users)), 2*l.Connections)
		if len(l.users) >= l.sweepAt {
			return nil
		}
	}
	u := &user{origin: o, may: &l.perUID}
	if o.house != "" {
		u.may = &l.perHouse
	}
	u.attestations = make(chan struct{}, u.may.attestations)
	l.users[o] = u
	return u
}

// beginStream counts a call that is open from now on, and refuses it where
// there are too many, or where the user calls too often. Each one that
// succeeds is followed by endStream.
func (l *limiter) beginStream(u *user, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.streams.refuse(u, u.streams, "calls"); err != nil {
		return err
	}
	if u.streams >= u.may.streams {
		return status.Errorf(codes.ResourceExhausted, "%s holds %d calls to the agent open, as many as one may: end some, or share one", u.origin, u.streams)
	}
	if err := u.request(now); err != nil {
		return err
	}
	l.streams.add(u, 1)
	u.streams++
	return nil
}

func (l *limiter) endStream(u *user) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.streams.add(u, -1)
	u.streams--
}

// holdAnswer counts an answer of so many bytes, and refuses it where the user leaves
// too many unread. Each that succeeds is followed by freeAnswer.
func (l *limiter) holdAnswer(u *user, size int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u.unread > 0 && u.unread+size > u.may.unread {
		return status.Errorf(codes.ResourceExhausted, "%s leaves %d bytes of the agent's answers unread, and may leave %d: read them", u.origin, u.unread, u.may.unread)
	}
	u.unread += size
	return nil
}

func (l *limiter) freeAnswer(u *user, size int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u.unread -= size
}

// request counts a further message of a call, and refuses it where the user
// sends too often.
func (l *limiter) request(u *user, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return u.request(now)
}

// request is called with limiter.mu held.
func (u *user) request(now time.Time) error {
	if !u.requests.take(now, u.may.rate, u.may.burst) {
		return status.Errorf(codes.ResourceExhausted, "%s calls the agent more than %d times a second: call again later, and hold a stream rather than fetching again", u.origin, u.may.rate)
	}
	return nil
}

// beginAttestation takes the slots of an attestation, for which it waits
// attestationWait at most. Where it succeeds, end gives them back.
func (l *limiter) beginAttestation(ctx context.Context, u *user) (end func(), err error) {
	wait := waiting{ctx: ctx, slots: make([]chan struct{}, 0, 3)}
	if !wait.take(u.attestations) {
		return nil, wait.refused("%d callers of %s are being attested, as many as may be at a time: call again later", cap(u.attestations), u.origin)
	}
	// Its own slot is among those it counts here, so no more than the few
	// come past at a time.
	if u.house != "" && len(u.attestations) > ofAnyHouse(l.Attestations) && !wait.take(l.housed) {
		return nil, wait.refused("%d callers in pods are being attested, as many as may be at a time: call again later", cap(l.housed))
	}
	if u.house == "" && l.outside != nil && !wait.take(l.outside) {
		return nil, wait.refused("%d callers outside of pods are being attested, as many as may be at a time: call again later", cap(l.outside))
	}
	if !wait.take(l.attestations) {
		return nil, wait.refused("%d callers are being attested, as many as may be at a time: call again later", cap(l.attestations))
	}
	return wait.free, nil
}

// waiting is a caller that takes several slots within attestationWait.
type waiting struct {
	ctx   context.Context
	late  <-chan time.Time // nil until it has to wait
	slots []chan struct{}  // taken
}

func (w *waiting) take(slot chan struct{}) bool {
	select {
	case slot <- struct{}{}:
		w.slots = append(w.slots, slot)
		return true
	default:
	}
	if w.late == nil {
		w.late = time.After(attestationWait)
	}
	select {
	case slot <- struct{}{}:
		w.slots = append(w.slots, slot)
		return true
	case <-w.late:
	case <-w.ctx.Done():
	}
	return false
}

// refused gives back what was taken, and says why.
func (w *waiting) refused(format string, args ...any) error {
	w.free()
	if err := w.ctx.Err(); err != nil {
		return err
	}
	return status.Errorf(codes.ResourceExhausted, format, args...)
}

func (w *waiting) free() {
	for _, slot := range w.slots {
		<-slot
	}
}

// mayLog tells whether u may cause another line in the log, and how many were
// kept back since the last.
func (l *limiter) mayLog(u *user, now time.Time) (muted int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !u.lines.take(now, logRate, logBurst) {
		u.muted++
		return 0, false
	}
	muted, u.muted = u.muted, 0
	return muted, true
}

// mayTell tells whether a denial of u may go to the log, and how many like it
// were kept back since the last that did. same is what it has in common with
// those that are alike.
func (l *limiter) mayTell(u *user, same uint64, now time.Time) (muted int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := u.denials[same]
	switch {
	case d == nil && len(u.denials) >= maxDenials && u.denied(now) >= maxDenials:
		return 0, true // mayLog bounds them
	case d == nil:
		if u.denials == nil {
			u.denials = map[uint64]*denial{}
		}
		d = &denial{}
		u.denials[same] = d
	case now.Sub(d.told) < repeatEvery:
		d.muted++
		return 0, false
	}
	muted = d.muted
	d.told, d.muted = now, 0
	return muted, true
}

// denied forgets denials that were not repeated, and returns how many are left.
// It is called with limiter.mu held.
func (u *user) denied(now time.Time) int {
	for same, d := range u.denials {
		if now.Sub(d.told) >= 2*repeatEvery {
			delete(u.denials, same)
		}
	}
	return len(u.denials)
}
