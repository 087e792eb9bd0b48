package agent_test

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/attestor"
)

// playUndumpable has the test below run in a process of its own.
const playUndumpable = "AGENT_TEST_UNDUMPABLE"

// An undumpable agent of an ordinary user, whose /proc files are root's then,
// still listens, pins and attests.
func TestUndumpable(t *testing.T) {
	if os.Getenv(playUndumpable) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestUndumpable$", "-test.v")
		cmd.Env = append(os.Environ(), playUndumpable+"=1")
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4001, Gid: 4002}}
		}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestUndumpable") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	if err := agent.Undumpable(); err != nil {
		t.Fatal(err)
	}
	var core unix.Rlimit
	dumpable, _, errno := unix.Syscall6(unix.SYS_PRCTL, unix.PR_GET_DUMPABLE, 0, 0, 0, 0, 0)
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil || dumpable != 0 || errno != 0 || core != (unix.Rlimit{}) {
		t.Errorf("dumpable %d (%v), core files %+v (%v)", dumpable, errno, core, err)
	}
	s := newStage(t, entry("/orders", time.Hour))
	s.cfg.WorkloadAttestors = []attestor.Workload{attestor.NewUnix(attestor.UnixConfig{DiscoverPath: true})}
	s.start()
	s.mustFetch()
}
