package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/sandbox"
)

// filesEnv hands descriptors to a child: "name=fd,name=fd".
const filesEnv = "NARTHEX_FILES"

// programEnv tells a child the descriptor that it was started through, which it
// has no use for.
const programEnv = "NARTHEX_PROGRAM"

// Names of inherited files that are no listener's socket: no listener can
// have them.
const (
	statusSocketName    = "@status"      // where the agent shows its figures to the proxy, which shows both
	statusPeerName      = "@status-peer" // how the proxy reaches it
	telemetrySocketName = "@telemetry"   // telemetry.listen
)

// child is one process of `narthex run` or `narthex demo`: this binary again,
// with one command.
type child struct {
	name   string
	binary string // path of the executable; empty: image, or this one
	image  *image // likewise; nil: this one
	args   []string
	user   *account            // whom it becomes; nil: stays who we are
	low    bool                // may bind ports below 1024 though it is not root
	files  map[string]*os.File // handed down, by name
	env    []string            // beside what every child is given
	begun  func()              // called when it was started, or could not be; may be nil
	abort  <-chan struct{}     // closed: it has stopped working, and is to say where
	stdout io.Writer           // default: ours
	stderr io.Writer           // default: ours
}

// account is a user a child can become.
type account struct {
	name     string
	uid, gid uint32
	groups   []uint32
}

// lookupAccount resolves a user name or a numeric uid.
func lookupAccount(name string) (*account, error) {
	u, err := user.Lookup(name)
	if err != nil {
		byID, idErr := user.LookupId(name)
		if idErr != nil {
			return nil, fmt.Errorf("look up user %q: %w; make it with `useradd --system --no-create-home %s`", name, err, name)
		}
		u = byID
	}
	a := &account{name: u.Username}
	ids, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("look up the groups of user %q: %w", name, err)
	}
	for i, text := range append([]string{u.Uid, u.Gid}, ids...) {
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("look up user %q: id %q: %w", name, text, err)
		}
		switch i {
		case 0:
			a.uid = uint32(n)
		case 1:
			a.gid = uint32(n)
		default:
			a.groups = append(a.groups, uint32(n))
		}
	}
	return a, nil
}

// command builds the process. The executable is opened here and run through
// its descriptor, so that a user who may not walk to it can still become the
// child.
func (c *child) command() (*exec.Cmd, func(), error) {
	from, release := c.image, func() {}
	if from == nil {
		var err error
		if from, err = openImageAt(cmp.Or(c.binary, selfPath)); err != nil {
			return nil, nil, err
		}
		release = from.close
	}
	// The program is handed down as the last file and started through that:
	// any other descriptor of ours may be overwritten by a file on its way to
	// its place in the child.
	at := 3 + len(c.files)
	cmd := &exec.Cmd{
		Path:   fmt.Sprintf("/proc/self/fd/%d", at),
		Args:   append([]string{"narthex"}, c.args...),
		Env:    append(environment(), append([]string{fmt.Sprintf("%s=%d", programEnv, at)}, c.env...)...),
		Stdout: c.stdout,
		Stderr: c.stderr,
		SysProcAttr: &syscall.SysProcAttr{
			Setpgid: true, // Ctrl-C reaches the parent, which ends its children in order
			// A parent that was killed takes its children with it, so that the
			// one started in its place finds addresses and data_dir free. A
			// child that drained would hold them for half a minute.
			Pdeathsig: syscall.SIGKILL,
		},
	}
	if cmd.Stdout == nil {
		cmd.Stdout = os.Stdout
	}
	if cmd.Stderr == nil {
		cmd.Stderr = os.Stderr
	}
	if u := c.user; u != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: u.uid, Gid: u.gid, Groups: u.groups}
		if c.low {
			cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_NET_BIND_SERVICE}
		}
	}
	var names []string
	for name, f := range c.files {
		names = append(names, fmt.Sprintf("%s=%d", name, 3+len(cmd.ExtraFiles)))
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, from.file)
	if len(names) > 0 {
		cmd.Env = append(cmd.Env, filesEnv+"="+strings.Join(names, ","))
	}
	return cmd, release, nil
}

// environment is what of ours a child is given: nothing that may hold a
// secret of somebody else's.
func environment() []string {
	var kept []string
	for _, item := range os.Environ() {
		name, _, _ := strings.Cut(item, "=")
		if slices.Contains(keptVariables, name) || strings.HasPrefix(name, "LC_") {
			kept = append(kept, item)
		}
	}
	return kept
}

var keptVariables = []string{
	"PATH", "HOME", "LANG", "TZ", "TMPDIR", "HOST_PROC", "DBUS_SYSTEM_BUS_ADDRESS",
	"GODEBUG", "GOGC", "GOMAXPROCS", "GOMEMLIMIT", "GOTRACEBACK", "GOCOVERDIR",
}

// keepFilesToOurselves marks every descriptor that this process was started
// with, apart from the standard three, as not for its children.
func keepFilesToOurselves() error {
	if err := unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("keep descriptors from the children: %w", err)
	}
	return nil
}

// killAfter is how long a child that was asked a second time may take to end.
const killAfter = 5 * time.Second

// settled is how old a child must be to be sent SIGHUP: before it listens for
// the signal, the signal ends it.
const settled = time.Second

// run starts the child and waits for it. When ctx ends it is asked to end
// (SIGTERM); when kill ends it is asked to end at once (SIGTERM again), and
// killed when it does not. Signals sent to hangup are passed on.
func (c *child) run(ctx, kill context.Context, hangup <-chan struct{}) error {
	// The kernel sends Pdeathsig when the thread that started the child ends,
	// so this goroutine keeps its thread until the child is gone.
	runtime.LockOSThread()
	if c.user == nil {
		defer runtime.UnlockOSThread()
	}
	cmd, release, err := c.command()
	if err == nil {
		if c.user != nil {
			err = sandbox.ConfineChildren(c.low) // the thread is never unlocked: it ends with this goroutine
		}
		if err == nil {
			err = cmd.Start()
		}
		release()
	}
	if c.begun != nil {
		c.begun()
	}
	if err != nil {
		return fmt.Errorf("start %s: %w", c.name, err)
	}
	exited := make(chan struct{})
	started := time.Now()
	var tending sync.WaitGroup
	tending.Go(func() {
		var listening <-chan time.Time
		abort := c.abort
		for ending := ctx.Done(); ; {
			select {
			case <-exited:
				return
			case <-hangup:
				listening = time.After(time.Until(started.Add(settled)))
			case <-listening:
				_ = cmd.Process.Signal(syscall.SIGHUP)
			case <-abort: // the runtime prints every goroutine, and ends
				_ = cmd.Process.Signal(syscall.SIGABRT)
				abort = nil
			case <-ending:
				_ = cmd.Process.Signal(syscall.SIGTERM)
				ending = nil
			case <-kill.Done():
				_ = cmd.Process.Signal(syscall.SIGTERM)
				select {
				case <-exited:
				case <-time.After(killAfter):
					_ = cmd.Process.Kill()
				}
				return
			}
		}
	})
	err = cmd.Wait()
	close(exited)
	tending.Wait()
	if err != nil {
		return fmt.Errorf("%s ended: %w", c.name, err)
	}
	return nil
}

// inherited are the descriptors that the parent handed down, by name.
type inherited map[string]*os.File

// nameProcess gives this process the name that ps and pgrep show: a child runs
// through a descriptor of its executable, whose number would be its name.
func nameProcess(name string) {
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0) // at most 15 bytes; only for people
}

// takeInherited returns them. They are not handed down further.
func takeInherited() (inherited, error) {
	if fd, err := strconv.Atoi(os.Getenv(programEnv)); err == nil && fd >= 3 {
		_ = unix.Close(fd)
	}
	_ = os.Unsetenv(programEnv)
	value, ok := os.LookupEnv(filesEnv)
	if !ok {
		return nil, nil
	}
	_ = os.Unsetenv(filesEnv)
	files := inherited{}
	for _, item := range strings.Split(value, ",") {
		name, fd, ok := strings.Cut(item, "=")
		n, err := strconv.Atoi(fd)
		if !ok || err != nil || n < 3 {
			return nil, fmt.Errorf("%s: %q is not name=descriptor", filesEnv, item)
		}
		unix.CloseOnExec(n)
		files[name] = os.NewFile(uintptr(n), name)
	}
	return files, nil
}

// listener returns the listening socket of that name, or nil where there is
// none.
func (in inherited) listener(name string) (net.Listener, error) {
	f, ok := in[name]
	if !ok {
		return nil, nil
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take over socket %s: %w", name, err)
	}
	delete(in, name)
	return l, f.Close()
}

// path returns a path that leads to the file of that name for as long as it
// is open, or "".
func (in inherited) path(name string) string {
	f, ok := in[name]
	if !ok {
		return ""
	}
	return fmt.Sprintf("/proc/self/fd/%d", f.Fd())
}

// close closes what was inherited and not taken over.
func (in inherited) close() {
	for _, f := range in {
		_ = f.Close()
	}
}
