package proxy

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// parkAfter is how long a stream waits with a goroutine of its own for bytes
// to come; then it is parked. It is noticed up to once again that late.
const parkAfter = 500 * time.Millisecond

// sleeper is work that waits for bytes from one inlet, and gives up its
// goroutine while none come: a direction of a connection, or a client that may
// send its next request.
type sleeper struct {
	c    *conn
	src  inlet
	work interface{ run() } // what it is part of

	state atomic.Int32
	place place // in the lot; set before state becomes parked

	bytes *atomic.Uint64 // that came; it is silent while they stay the same
	seen  uint64         // of bytes when last looked at; guarded by conn.mu
}

// The states of a sleeper.
const (
	moving int32 = iota // a goroutine waits in src.next, or will
	kicked              // it was asked to park when nothing comes
	parked              // no goroutine: in the lot
	busy                // it does something else than to wait
	over                // it ended
)

// lot is where silent streams are parked: one epoll set watches all of their
// sockets, and who becomes readable gets a goroutine again. A goroutine that
// waits costs several KiB, a parked stream a slot here.
type lot struct {
	file *os.File // of the epoll set, in the runtime's own poller
	raw  syscall.RawConn
	set  int // the descriptor of file; File.Fd would make it block

	mu    sync.Mutex // guards the following
	slots []slot
	free  []int32
}

// slot is a place in the lot. turn tells its occupants apart: an event that
// was read for one must not wake the next.
type slot struct {
	sleeper *sleeper
	turn    int32
}

// place is where a stream is parked.
type place struct {
	slot, turn int32
	watched    bool // its socket is in the epoll set
}

func newLot() (*lot, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an epoll set for silent connections: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("make an epoll set for silent connections: %w", err), unix.Close(fd))
	}
	file := os.NewFile(uintptr(fd), "parked connections")
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make an epoll set for silent connections: %w", err), file.Close())
	}
	return &lot{file: file, raw: raw, set: fd}, nil
}

// close ends run. No stream may be parked then.
func (l *lot) close() { _ = l.file.Close() }

// run wakes streams whose sockets became readable, until close.
func (l *lot) run() {
	var events [128]unix.EpollEvent
	for {
		n := 0
		err := l.raw.Read(func(fd uintptr) bool {
			var err error
			n, err = unix.EpollWait(int(fd), events[:], 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
		if err != nil {
			return
		}
		for _, e := range events[:max(n, 0)] {
			if s := l.at(e.Fd, e.Pad); s != nil {
				s.wake()
			}
		}
	}
}

// enter gives s a slot.
func (l *lot) enter(s *sleeper) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.free) == 0 {
		l.free = append(l.free, int32(len(l.slots)))
		l.slots = append(l.slots, slot{})
	}
	n := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	l.slots[n].sleeper = s
	s.place.slot, s.place.turn = n, l.slots[n].turn
}

// leave takes the slot back.
func (l *lot) leave(s *sleeper) {
	l.mu.Lock()
	defer l.mu.Unlock()
	here := &l.slots[s.place.slot]
	here.sleeper = nil
	here.turn++
	l.free = append(l.free, s.place.slot)
}

// at returns who is parked there.
func (l *lot) at(slot, turn int32) *sleeper {
	l.mu.Lock()
	defer l.mu.Unlock()
	if here := l.slots[slot]; here.turn == turn {
		return here.sleeper
	}
	return nil
}

// watch has the lot told once when a socket can be read, has ended or has
// failed.
func (l *lot) watch(socket syscall.RawConn, at place, op int) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: at.slot, Pad: at.turn}
	var failed error
	err := socket.Control(func(fd uintptr) { failed = unix.EpollCtl(l.set, op, int(fd), &event) })
	return errors.Join(err, failed)
}

// park gives the goroutine of the stream up. It reports false when the stream
// is to go on instead.
func (s *sleeper) park() bool {
	s.src.resume()
	s.src.rest()
	lot := s.c.l.proxy.lot
	if told, ok := s.src.(herald); ok {
		return s.parkUntold(told, lot)
	}
	if s.src.socket() == nil {
		s.state.Store(moving)
		return false
	}
	lot.enter(s)
	socket, at, op := s.src.socket(), s.place, unix.EPOLL_CTL_MOD
	if !at.watched {
		s.place.watched, op = true, unix.EPOLL_CTL_ADD
	}
	s.state.Store(parked)
	// From here on somebody else may wake it, and this goroutine must not
	// touch it any more unless it is the one who wakes it.
	if err := lot.watch(socket, at, op); err != nil && s.state.CompareAndSwap(parked, moving) {
		lot.leave(s)
		return false
	}
	return true
}

// parkUntold is park where who brings bytes wakes it.
func (s *sleeper) parkUntold(told herald, lot *lot) bool {
	lot.enter(s)
	s.state.Store(parked)
	if told.came() && s.state.CompareAndSwap(parked, moving) { // before it could be woken
		lot.leave(s)
		return false
	}
	return true
}

// wake gives a parked stream a goroutine again; it does nothing to others.
func (s *sleeper) wake() {
	if !s.state.CompareAndSwap(parked, moving) {
		return
	}
	s.c.l.proxy.lot.leave(s)
	go s.runAgain()
}

func (s *sleeper) runAgain() {
	s.c.awake()
	s.work.run()
}

// begin has nobody interrupt what follows a wait.
func (s *sleeper) begin() {
	if s.state.CompareAndSwap(moving, busy) {
		return
	}
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.state.Swap(busy) == kicked {
		s.src.resume()
	}
}
