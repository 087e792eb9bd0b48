package endpoint

import (
	"context"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Limits bound what one local user, and all of them, can make the agent hold
// and do before it knows who calls. A field that is 0 has its default. They
// are counted by uid, and on a Kubernetes node many pods run as uid 0: where
// the process may open 32,768 files, the defaults let 4,000 workloads of one
// uid start at the same moment.
type Limits struct {
	// Connections bounds those open at a time: 8192, or a quarter of the
	// files the process may open where that is less, as each takes two.
	Connections int
	// ConnectionsPerUID bounds those of one uid: half of Connections.
	ConnectionsPerUID int
	// Streams bounds the calls open at a time: 8192; StreamsPerUID those of
	// one uid: half of Streams. A call is open from its headers to its
	// status, so a workload that watches holds one, on a connection of its
	// own, and what a user's calls make the agent hold stays below 100 MiB.
	Streams, StreamsPerUID int
	// StreamsPerConnection bounds the calls open on one connection: 32.
	// Clients hold back what is over it, or open another connection.
	StreamsPerConnection int
	// FirstMessage bounds the time from the headers of a call to its
	// request: 10 s.
	FirstMessage time.Duration
	// Unread bounds the time a client leaves answers unread that do not fit
	// the socket any more: 20 s. Calls that have ended stay in memory until
	// their status is written.
	Unread time.Duration
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
	// attestationWait is how long a caller waits for others of its user to
	// be attested.
	attestationWait = 2 * time.Second
	// A user causes at most logBurst lines in the log at once, and logRate a
	// second.
	logBurst, logRate = 20, 1
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
	if l.FirstMessage <= 0 {
		l.FirstMessage = 10 * time.Second
	}
	if l.AttestationTime <= 0 {
		l.AttestationTime = 10 * time.Second
	}
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
	attestations chan struct{} // a slot each
	nobody       *user         // of connections that have no user yet

	mu          sync.Mutex // guards the following
	connections int
	streams     int
	refused     int
	users       map[uint32]*user
	sweepAt     int // number of users at which to look for those to forget
}

// user is what one uid holds and has left.
type user struct {
	uid          uint32
	attestations chan struct{} // a slot each

	// guarded by limiter.mu:
	connections int
	streams     int
	requests    bucket
	lines       bucket
	muted       int // lines since the last that was let through
}

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

func newLimiter(l Limits) *limiter {
	l = l.withDefaults()
	return &limiter{Limits: l, attestations: make(chan struct{}, l.Attestations), nobody: &user{}, users: map[uint32]*user{}, sweepAt: 64}
}

// connect counts a connection of uid. Where it is over a limit, it returns
// the status with which to refuse its calls and a nil user; ok is false where
// the connection should be closed at once. Each connect that is ok is
// followed by one disconnect with what it returned.
func (l *limiter) connect(uid uint32, now time.Time) (u *user, refusal error, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u = l.user(uid, now)
	switch {
	case u == nil || l.connections >= l.Connections:
		refusal = status.Errorf(codes.ResourceExhausted, "the agent holds %d connections, as many as it may: call again later", l.connections)
	case u.connections >= l.ConnectionsPerUID:
		refusal = status.Errorf(codes.ResourceExhausted, "uid %d holds %d connections to the agent, as many as one user may: close some, or share one", uid, u.connections)
	case !u.requests.take(now, l.RequestsPerSecond, l.Burst):
		refusal = l.tooFast(uid)
	default:
		l.connections++
		u.connections++
		return u, nil, true
	}
	if l.refused >= maxRefused {
		return nil, refusal, false
	}
	l.refused++
	return nil, refusal, true
}

func (l *limiter) disconnect(u *user) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u == nil {
		l.refused--
		return
	}
	l.connections--
	u.connections--
}

// user returns the state of uid, new where there is none, or nil where more
// users than there may be connections are known.
func (l *limiter) user(uid uint32, now time.Time) *user {
	if u := l.users[uid]; u != nil {
		return u
	}
	if len(l.users) >= l.sweepAt {
		for _, u := range l.users {
			u.requests.refill(now, l.RequestsPerSecond)
			u.lines.refill(now, logRate)
			if u.connections == 0 && u.streams == 0 && u.requests.spent == 0 && u.lines.spent == 0 {
				delete(l.users, u.uid)
			}
		}
		l.sweepAt = min(max(64, 2*len(l.users)), 2*l.Connections)
		if len(l.users) >= l.sweepAt {
			return nil
		}
	}
	u := &user{uid: uid, attestations: make(chan struct{}, l.AttestationsPerUID)}
	l.users[uid] = u
	return u
}

// beginStream counts a call that is open from now on, and refuses it where
// there are too many, or where the user calls too often. Each one that
// succeeds is followed by endStream.
func (l *limiter) beginStream(u *user, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.streams >= l.Streams:
		return status.Errorf(codes.ResourceExhausted, "the agent holds %d calls open, as many as it may: call again later", l.streams)
	case u.streams >= l.StreamsPerUID:
		return status.Errorf(codes.ResourceExhausted, "uid %d holds %d calls to the agent open, as many as one user may: end some, or share one", u.uid, u.streams)
	case !u.requests.take(now, l.RequestsPerSecond, l.Burst):
		return l.tooFast(u.uid)
	}
	l.streams++
	u.streams++
	return nil
}

func (l *limiter) endStream(u *user) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.streams--
	u.streams--
}

// request counts a further message of a call, and refuses it where the user
// sends too often.
func (l *limiter) request(u *user, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !u.requests.take(now, l.RequestsPerSecond, l.Burst) {
		return l.tooFast(u.uid)
	}
	return nil
}

func (l *limiter) tooFast(uid uint32) error {
	return status.Errorf(codes.ResourceExhausted, "uid %d calls the agent more than %d times a second: call again later, and hold a stream rather than fetching again", uid, l.RequestsPerSecond)
}

// beginAttestation takes a slot, for which it waits attestationWait at most.
// Each one that succeeds is followed by endAttestation.
func (l *limiter) beginAttestation(ctx context.Context, u *user) error {
	select {
	case u.attestations <- struct{}{}:
		select {
		case l.attestations <- struct{}{}:
			return nil
		default:
			<-u.attestations
		}
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, attestationWait)
	defer cancel()
	select {
	case u.attestations <- struct{}{}:
	case <-ctx.Done():
		return status.Errorf(codes.ResourceExhausted, "%d callers of uid %d are being attested, as many as may be at a time: call again later", cap(u.attestations), u.uid)
	}
	select {
	case l.attestations <- struct{}{}:
		return nil
	case <-ctx.Done():
		<-u.attestations
		return status.Errorf(codes.ResourceExhausted, "%d callers are being attested, as many as may be at a time: call again later", cap(l.attestations))
	}
}

func (l *limiter) endAttestation(u *user) {
	<-l.attestations
	<-u.attestations
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
