package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The files of the data directory.
const (
	leaseFile = "lease"
	stateFile = "agent.json"
	stateTemp = stateFile + ".tmp-" // and a number: while it is written
)

// stateLimit bounds what is read of a state file: an SVID and a trust bundle
// are a few KiB.
const stateLimit = 4 << 20

// state is what the agent keeps between runs beside its private key, which
// the key store keeps. It is written after the key and names it, so that a
// crash between the two leaves the older, complete pair in force.
type state struct {
	Version      int       `json:"version"`
	TrustDomain  string    `json:"trust_domain"`
	KeyID        string    `json:"key_id,omitempty"`
	SVID         [][]byte  `json:"svid,omitempty"`   // DER, leaf first
	Bundle       [][]byte  `json:"bundle,omitempty"` // DER
	Reattestable bool      `json:"reattestable,omitempty"`
	Strange      time.Time `json:"strange_since,omitzero"` // since when the server is not one of Bundle
	Written      time.Time `json:"written"`
}

const stateVersion = 1

// errCorruptState is wrapped when a state file holds what no agent wrote.
var errCorruptState = errors.New("state file is corrupt")

// dataDir is the agent's directory, held under a lease: two agents that share
// one would evict each other at the server.
type dataDir struct {
	path string

	mu    sync.Mutex // guards the following
	lease *os.File   // nil: not ours
}

// openDataDir makes the directory where it is missing (0700), and narrows the
// mode of one that is the agent's. Nothing in it may be written before take.
func openDataDir(path string) (*dataDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make data_dir: %w; set data_dir to a directory that the agent's user can make", err)
	}
	if err := narrow(path); err != nil {
		return nil, fmt.Errorf("open data_dir: %w", err)
	}
	return &dataDir{path: path}, nil
}

// narrow takes a directory from all but its owner, who runs this. One that may
// be meant for something else is left as it is, which is an error.
func narrow(path string) error {
	dir, err := ownDir(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	info, err := dir.Stat()
	if err != nil {
		return err
	}
	mode := info.Mode()
	if mode.Perm()&0o077 == 0 {
		return nil
	}
	empty, agents, err := contents(dir)
	switch {
	case err != nil:
		return err
	case mode&fs.ModeSticky != 0:
		return fmt.Errorf("%s is a directory for everybody (mode %#o, sticky): choose another", path, mode.Perm())
	case mode.Perm()&0o022 != 0 && !empty:
		return fmt.Errorf("others can write to %s (mode %#o), so what is in it may be anybody's: choose another, or empty it and chmod 0700 it", path, mode.Perm())
	case !empty && !agents:
		return fmt.Errorf("%s (mode %#o) holds other things and nothing of an agent: choose another, or chmod 0700 it if it is the agent's alone", path, mode.Perm())
	}
	if err := dir.Chmod(0o700); err != nil {
		return fmt.Errorf("%s has mode %#o, and it cannot be narrowed to 0700: %w; "+
			"it holds private keys: chmod 0700 it, or choose another", path, mode.Perm(), err)
	}
	// Until now others could have put something there.
	if empty, _, err = contents(dir); err == nil && !empty && !agents {
		err = fmt.Errorf("somebody has just put something into %s: look at it, and remove it", path)
	}
	return err
}

// contents tells whether a directory is empty but for what a file system has in
// its root, and whether an agent has left its state there.
func contents(dir *os.File) (empty, agents bool, err error) {
	if _, err := dir.Seek(0, io.SeekStart); err != nil {
		return false, false, err
	}
	const most = 64 // to look at: an agent leaves a handful
	names, err := dir.Readdirnames(most)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, false, err
	}
	empty = true
	for _, name := range names {
		empty = empty && name == "lost+found"
		agents = agents || name == leaseFile || name == stateFile
	}
	return empty, agents, nil
}

// LeasePath is the file of a data directory that the agent which serves has
// locked (flock(2)).
func LeasePath(dataDir string) string { return filepath.Join(dataDir, leaseFile) }

// HeldError says that another agent holds the lease of a data directory.
type HeldError struct {
	DataDir string
	PID     string // of the one that holds it, as it wrote it down; it may be of another pid namespace
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("data_dir %s is in use by another agent (pid %s): stop it, or give this one a data_dir of its own", e.DataDir, e.PID)
}

// take takes the lease. It ends with the process, however it ends. The error is
// a *HeldError where another process has it.
func (d *dataDir) take() error {
	f, err := os.OpenFile(LeasePath(d.path), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("take the lease of data_dir: %w; the agent must own and be able to write %s", err, d.path)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := os.ReadFile(f.Name())
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return &HeldError{DataDir: d.path, PID: strings.TrimSpace(string(holder))}
		}
		return fmt.Errorf("take the lease of data_dir %s: %w", d.path, err)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0) // for the message above only
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lease = f
	return nil
}

// leaseTime bounds how long a lease may be on its way from one agent to the
// next, or be looked at by a third.
const leaseTime = 3 * time.Second

// await takes the lease, and waits a moment for one that is on its way.
func (d *dataDir) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTime)
	defer cancel()
	tick := time.NewTicker(leaseTime / 100)
	defer tick.Stop()
	for {
		err := d.take()
		var held *HeldError
		if !errors.As(err, &held) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// ownDir opens a directory of ours. It fails where the directory belongs to
// somebody else, who could read and replace what is in it, or is reached by a
// link that somebody else but root can point elsewhere.
func ownDir(path string) (*os.File, error) {
	link, err := os.Lstat(filepath.Clean(path))
	if err != nil {
		return nil, err
	}
	if uid := owner(link); link.Mode().Type() == fs.ModeSymlink && uid != os.Geteuid() && uid != 0 {
		return nil, fmt.Errorf("%s is a symbolic link that belongs to user %d, not to user %d who runs this: name the directory itself", path, uid, os.Geteuid())
	}
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	info, err := dir.Stat()
	if err == nil && owner(info) != os.Geteuid() {
		err = fmt.Errorf("%s belongs to user %d, not to user %d who runs this: chown it, or choose another", path, owner(info), os.Geteuid())
	}
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return dir, nil
}

// owner is the user a file belongs to.
func owner(info fs.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

// close gives the lease back, if there is one.
func (d *dataDir) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lease == nil {
		return nil
	}
	f := d.lease
	d.lease = nil
	return f.Close()
}

// load reads the state. A missing file is an empty state. A corrupt one is
// set aside under another name, which the error (wrapping errCorruptState)
// tells, and the state is empty. What another run left unfinished is removed.
func (d *dataDir) load(trustDomain string) (state, error) {
	unfinished, _ := filepath.Glob(filepath.Join(d.path, stateTemp+"*")) // fails for bad patterns only
	for _, path := range unfinished {
		_ = os.Remove(path) // the next run finds it again
	}
	s, err := d.read(trustDomain)
	if errors.Is(err, errCorruptState) {
		err = d.setAside(err)
	}
	return s, err
}

// read is load without the right to change anything: a corrupt file stays where
// it is.
func (d *dataDir) read(trustDomain string) (state, error) {
	data, err := readState(filepath.Join(d.path, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, nil
	}
	if err != nil {
		return state{}, fmt.Errorf("read agent state: %w", err)
	}
	var s state
	if err := json.Unmarshal(data, &s); err != nil {
		return state{}, fmt.Errorf("%w: %w", errCorruptState, err)
	}
	if s.Version != stateVersion {
		return state{}, fmt.Errorf("%w: version %d, want %d", errCorruptState, s.Version, stateVersion)
	}
	if s.TrustDomain != trustDomain {
		return state{}, fmt.Errorf("data_dir %s belongs to an agent of trust domain %q, not %q: give this agent a data_dir of its own",
			d.path, s.TrustDomain, trustDomain)
	}
	return s, nil
}

// readState returns the content of a state file that we have written: another
// user's would name the server that is trusted. The error wraps errCorruptState
// where the file is too long.
func readState(path string) ([]byte, error) {
	return readOwn(path, 0o022, "no agent of this user has written it so: look at who could, then remove it and the agent will attest anew")
}

// readOwn returns the content of a file of ours, for which others have none of
// the rights in shut; advice ends what is said of one that is otherwise. It
// follows no symbolic link, and does not wait for a writer should the path be a
// pipe. The error wraps errCorruptState where the file has more than stateLimit
// bytes.
func readOwn(path string, shut fs.FileMode, advice string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link: put the file itself there, or remove the link and the agent will attest anew", path)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	switch mode := info.Mode(); {
	case !mode.IsRegular():
		return nil, fmt.Errorf("%s is no regular file: %s", path, advice)
	case owner(info) != os.Geteuid():
		return nil, fmt.Errorf("%s belongs to user %d, not to user %d who runs this: %s", path, owner(info), os.Geteuid(), advice)
	case mode.Perm()&0o022&shut != 0:
		return nil, fmt.Errorf("%s can be written by others (mode %#o): %s", path, mode.Perm(), advice)
	case mode.Perm()&shut != 0:
		return nil, fmt.Errorf("%s can be read by others (mode %#o): %s", path, mode.Perm(), advice)
	}
	data, err := io.ReadAll(io.LimitReader(f, stateLimit+1))
	if err == nil && len(data) > stateLimit {
		err = fmt.Errorf("%w: more than %d bytes", errCorruptState, stateLimit)
	}
	return data, err
}

// setAside renames the state file, so that a person can look at it and the
// agent can attest anew.
func (d *dataDir) setAside(problem error) error {
	path := filepath.Join(d.path, stateFile)
	aside := fmt.Sprintf("%s.corrupt-%s", path, time.Now().UTC().Format("20060102T150405.000"))
	if err := os.Rename(path, aside); err != nil {
		return fmt.Errorf("set a corrupt state file aside: %w", err)
	}
	if !errors.Is(problem, errCorruptState) {
		problem = fmt.Errorf("%w: %w", errCorruptState, problem)
	}
	return fmt.Errorf("%w; set aside as %s", problem, aside)
}

// store writes the state so that a crash at any moment leaves the old one or
// the new one, whole.
func (d *dataDir) store(s state) error {
	s.Version, s.Written = stateVersion, time.Now().UTC()
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("write agent state: %w", err)
	}
	path := filepath.Join(d.path, stateFile)
	tmp, err := os.CreateTemp(d.path, stateTemp+"*") // 0600
	if err != nil {
		return fmt.Errorf("write agent state: %w", err)
	}
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("write agent state: %w", err)
	}
	dir, err := os.Open(d.path)
	if err != nil {
		return fmt.Errorf("write agent state: %w", err)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return fmt.Errorf("write agent state: %w", err)
	}
	return nil
}
