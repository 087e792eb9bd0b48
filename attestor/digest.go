package attestor

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxDigests bounds the digests remembered; one is about 200 bytes, and a
	// node has fewer programs that ask for identities.
	maxDigests = 256

	// settled is how long a file must have been left alone before its digest
	// is remembered. File systems stamp changes with a clock of some
	// milliseconds, so a change within the same tick leaves no trace.
	settled = 2 * time.Second

	hashChunk = 64 << 10
)

// version identifies one content of one file. The kernel sets the change time
// at each change of content or metadata, and nobody can set it back.
type version struct {
	program
	size         int64
	mtime, ctime unix.Timespec
}

func versionOf(st *unix.Stat_t) version {
	return version{program: programOf(st), size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// digests remembers the SHA-256 of programs, so that not every connection of
// a workload hashes its program again. Callers who ask for the same file at
// the same time share one reading; files of different callers never wait for
// each other.
type digests struct {
	now    func() time.Time
	hashes *slots // files being hashed

	mu    sync.Mutex // guards the following
	known map[version]*digest
	order []version // of known, the oldest first
}

// digest is one reading. sum and err may be read once done is closed.
type digest struct {
	done chan struct{}
	sum  string
	err  error
}

func newDigests() *digests {
	return &digests{now: time.Now, hashes: newSlots(hashesPerUser, hashesInAll), known: make(map[version]*digest)}
}

// of returns the SHA-256, in hexadecimal, of the opened file f, of which v was
// just read. What has to be hashed for it waits for a slot of the user.
func (d *digests) of(ctx context.Context, f *os.File, v version, uid uint32) (string, error) {
	fresh := d.now().Sub(time.Unix(v.ctime.Unix())) < settled
	for {
		g := d.find(v)
		if g == nil {
			// The slot comes before the claim: who waits for one holds
			// nobody up that has one.
			if err := d.hashes.acquire(ctx, uid); err != nil {
				return "", err
			}
			if fresh {
				defer d.hashes.release(uid)
				return hash(ctx, f, v)
			}
			var mine bool
			if g, mine = d.claim(v); mine {
				defer d.hashes.release(uid)
				g.sum, g.err = hash(ctx, f, v)
				if g.err != nil {
					d.forget(v, g)
				}
				close(g.done)
				return g.sum, g.err
			}
			d.hashes.release(uid)
		}
		select {
		case <-g.done:
		case <-ctx.Done():
			return "", ctx.Err()
		}
		// Another caller may have given up before we do.
		if !errors.Is(g.err, context.Canceled) && !errors.Is(g.err, context.DeadlineExceeded) {
			return g.sum, g.err
		}
	}
}

// find returns the reading of v, or nil.
func (d *digests) find(v version) *digest {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.known[v]
}

// claim returns the reading of v, and whether the caller is the one to do it.
func (d *digests) claim(v version) (g *digest, mine bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if g, ok := d.known[v]; ok {
		return g, false
	}
	if len(d.order) == maxDigests {
		delete(d.known, d.order[0])
		d.order = slices.Delete(d.order, 0, 1)
	}
	g = &digest{done: make(chan struct{})}
	d.known[v] = g
	d.order = append(d.order, v)
	return g, true
}

// forget drops a reading that failed.
func (d *digests) forget(v version, g *digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known[v] != g {
		return // made room for another meanwhile
	}
	delete(d.known, v)
	if i := slices.Index(d.order, v); i >= 0 {
		d.order = slices.Delete(d.order, i, i+1)
	}
}

// hash reads f, of version v, from its beginning to its end. It reads no more
// than the size in v, returns soon after ctx ends, and fails if the file
// changed meanwhile.
func hash(ctx context.Context, f *os.File, v version) (string, error) {
	h := sha256.New()
	content := io.NewSectionReader(f, 0, v.size)
	buf := make([]byte, hashChunk)
	for {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := content.Read(buf)
		h.Write(buf[:n])
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", err
		}
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	var statErr error
	err = raw.Control(func(fd uintptr) { statErr = unix.Fstat(int(fd), &st) })
	if err := cmp.Or(err, statErr); err != nil {
		return "", err
	}
	if versionOf(&st) != v {
		return "", fmt.Errorf("%s changed while it was read", f.Name())
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
