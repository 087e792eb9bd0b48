package attestor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary plays the workloads too: with childRole in its environment
// it does what the role says instead of running tests.
const (
	childRole   = "ATTESTOR_TEST_ROLE"
	childSocket = "ATTESTOR_TEST_SOCKET"
	childFrom   = "ATTESTOR_TEST_FROM"
	childOver   = "ATTESTOR_TEST_OVER"

	roleWorkload = "workload" // connects, then obeys the commands on its standard input
	roleHold     = "hold"     // says "ok" and stays until its standard input ends
	rolePeerOf   = "peerof"   // accepts from the listener in fd 3 and prints the error of PeerOf
	rolePinSelf  = "pinself"  // prints the error of pinning its own PID
	roleDisguise = "disguise" // runs a child in user and mount namespaces of its own, as roleMount
	roleMount    = "mount"    // mounts childFrom, if any, over childOver and becomes the workload found there

	inherited = 3 // the first of exec.Cmd.ExtraFiles
)

func TestMain(m *testing.M) {
	switch role := os.Getenv(childRole); role {
	case "":
		goleak.VerifyTestMain(m)
	case roleWorkload:
		exitOn(playWorkload())
	case roleHold:
		fmt.Println("ok")
		io.Copy(io.Discard, os.Stdin)
	case rolePeerOf:
		exitOn(playPeerOf())
	case roleDisguise:
		playDisguise()
	case roleMount:
		exitOn(playMount())
	case rolePinSelf:
		_, err := Pin(os.Getpid())
		fmt.Println(err)
	default:
		exitOn(fmt.Errorf("unknown role %q", role))
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// playWorkload answers each command with a line "ok", said by the program that
// runs after it.
func playWorkload() error {
	c, err := net.Dial("unix", os.Getenv(childSocket))
	if err != nil {
		return err
	}
	defer c.Close()
	in := bufio.NewReader(os.Stdin)
	for {
		fmt.Println("ok")
		line, err := in.ReadString('\n')
		if err == io.EOF {
			return nil
		}
		command, arg, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		switch command {
		case "name": // of the main thread, as prctl(2) would set it; quoted
			name, err := strconv.Unquote(arg)
			if err != nil {
				return err
			}
			if err := os.WriteFile("/proc/self/comm", []byte(name), 0); err != nil {
				return err
			}
		case "exec":
			f, err := c.(*net.UnixConn).File()
			if err != nil {
				return err
			}
			unix.FcntlInt(f.Fd(), unix.F_SETFD, 0)
			os.Setenv(childRole, roleHold)
			return syscall.Exec(arg, []string{"workload"}, os.Environ())
		case "seteuid":
			uid, _ := strconv.Atoi(arg)
			if err := syscall.Setresuid(-1, uid, -1); err != nil {
				return err
			}
		case "setegid":
			gid, _ := strconv.Atoi(arg)
			if err := syscall.Setresgid(-1, gid, -1); err != nil {
				return err
			}
		case "abandon": // leave the connection to a child of its own
			return abandon(c.(*net.UnixConn))
		default:
			return fmt.Errorf("unknown command %q", command)
		}
	}
}

func abandon(c *net.UnixConn) error {
	f, err := c.File()
	if err != nil {
		return err
	}
	grandchild := exec.Command("/proc/self/exe")
	grandchild.Env = append(os.Environ(), childRole+"="+roleHold)
	grandchild.Stdin, grandchild.Stdout = os.Stdin, os.Stdout
	grandchild.ExtraFiles = []*os.File{f}
	return grandchild.Start()
}

// playDisguise does what "unshare -Urm" does, which every user may, unless the
// system forbids it. Then it says "denied".
func playDisguise() {
	uid, gid := os.Geteuid(), os.Getegid()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childRole+"="+roleMount)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}},
	}
	if err := cmd.Start(); err != nil {
		fmt.Println("denied:", err)
		return
	}
	exitOn(cmd.Wait())
}

func playMount() error {
	from, over := os.Getenv(childFrom), os.Getenv(childOver)
	if from != "" {
		if err := unix.Mount(from, over, "", unix.MS_BIND, ""); err != nil {
			fmt.Println("denied:", err)
			return nil
		}
	}
	os.Setenv(childRole, roleWorkload)
	return syscall.Exec(filepath.Join(over, "workload"), []string{"workload", "-test.run=^$"}, os.Environ())
}

func playPeerOf() error {
	l, err := net.FileListener(os.NewFile(inherited, "listener"))
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = PeerOf(c.(*net.UnixConn))
	fmt.Println(err)
	return nil
}

// child is a running test binary in a role.
type child struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

// start runs program (a copy of the test binary) in a role. The child ends
// with the test. It is nil where we may not make the namespaces asked for, as
// in most containers.
func start(t testing.TB, program, role, socket string, change func(*exec.Cmd)) *child {
	t.Helper()
	cmd := exec.Command(program, "-test.run=^$")
	// Under the race detector a process lingers a second at its end by default.
	cmd.Env = append(os.Environ(), childRole+"="+role, childSocket+"="+socket, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	if change != nil {
		change(cmd)
	}
	// Pipes of our own: Wait would close cmd's while a grandchild talks.
	stdinR, stdinW := pipe(t)
	stdoutR, stdoutW := pipe(t)
	cmd.Stdin, cmd.Stdout = stdinR, stdoutW
	err := cmd.Start()
	if err != nil {
		stdinR.Close()
		stdinW.Close()
		stdoutR.Close()
		stdoutW.Close()
		if errors.Is(err, unix.EPERM) && cmd.SysProcAttr != nil && cmd.SysProcAttr.Cloneflags != 0 {
			return nil
		}
		t.Fatalf("start child: %v", err)
	}
	stdinR.Close()
	stdoutW.Close()
	c := &child{t: t, cmd: cmd, stdin: stdinW, out: bufio.NewReader(stdoutR)}
	t.Cleanup(func() {
		stdinW.Close()
		if cmd.ProcessState == nil {
			cmd.Wait()
		}
		io.Copy(io.Discard, c.out) // until a grandchild has ended too
		stdoutR.Close()
	})
	return c
}

func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	return r, w
}

func (c *child) expectOK() {
	c.t.Helper()
	if line, err := c.out.ReadString('\n'); line != "ok\n" {
		c.t.Fatalf("child said %q (%v), want ok", line, err)
	}
}

// do gives a command and waits until it is done.
func (c *child) do(command string) {
	c.t.Helper()
	if _, err := fmt.Fprintln(c.stdin, command); err != nil {
		c.t.Fatal(err)
	}
	c.expectOK()
}

// exit ends the child and reaps it.
func (c *child) exit() {
	c.t.Helper()
	c.stdin.Close()
	c.reap()
}

func (c *child) reap() {
	c.t.Helper()
	if err := c.cmd.Wait(); err != nil {
		c.t.Fatalf("child: %v", err)
	}
}

// self runs the test binary without naming a path, which another user may not
// be able to walk.
const self = "/proc/self/exe"

// connect starts a workload and returns it with our end of its connection.
func connect(t testing.TB, program string, change func(*exec.Cmd)) (*child, *net.UnixConn) {
	t.Helper()
	l := listen(t)
	defer l.Close()
	c := start(t, program, roleWorkload, l.Addr().String(), change)
	c.expectOK()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return c, conn
}

var sockets atomic.Int64

// listen listens on an abstract socket, which any user may connect to.
func listen(t testing.TB) *net.UnixListener {
	t.Helper()
	name := fmt.Sprintf("@narthex-attestor-test-%d-%d", os.Getpid(), sockets.Add(1))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// copyOfSelf copies the test binary, so that there is another program that
// knows the roles.
func copyOfSelf(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "workload")
	// Written by another process: a child forked by a parallel test would
	// hold our descriptor for a moment, and exec fail with ETXTBSY.
	cmd := exec.Command("dd", "of="+path, "bs=1M", "status=none")
	cmd.Stdin = strings.NewReader(string(content))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("dd: %v %s", err, out)
	}
	if err := os.Chmod(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func isRoot() bool { return os.Geteuid() == 0 }
