package handover

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Lock is a file that the process that serves has locked (flock(2)). The kernel
// takes the lock back when the process ends, however it ends, so that one that
// waits for its place finds out. Handing over, the old process unlocks it
// before it says `yours`.
type Lock struct{ file *os.File }

// ErrLocked is returned by Take where another process has the lock.
var ErrLocked = errors.New("another process has it")

// passTime bounds how long the lock may be on its way from one process to the
// other, or be looked at by a third.
const passTime = 3 * time.Second

// OpenLock opens the file, made with mode 0600 where it is missing, in a
// directory that is made likewise (0700). It takes nothing.
func OpenLock(path string) (*Lock, error) {
	if err := makeDir(path); err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	return &Lock{f}, nil
}

// Take takes the lock, and waits a moment for one that is on its way.
func (l *Lock) Take() error {
	for until := time.Now().Add(passTime); ; time.Sleep(passTime / 100) {
		err := unix.Flock(int(l.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("lock %s: %w", l.file.Name(), err)
		case time.Now().After(until):
			return fmt.Errorf("lock %s: %w", l.file.Name(), ErrLocked)
		}
	}
}

// Free reports whether nobody has the lock.
func (l *Lock) Free() bool {
	// Shared, so that several that look do not see each other.
	if unix.Flock(int(l.file.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil {
		return false
	}
	_ = l.Release()
	return true
}

// Release gives the lock back; where this process does not have it, it does
// nothing.
func (l *Lock) Release() error {
	if err := unix.Flock(int(l.file.Fd()), unix.LOCK_UN); err != nil {
		return fmt.Errorf("unlock %s: %w", l.file.Name(), err)
	}
	return nil
}

// Close closes the file, and gives the lock back with that.
func (l *Lock) Close() error { return l.file.Close() }
