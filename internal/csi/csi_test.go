package csi

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// spaceEnv marks the process that runs the tests with mounts in a mount
// namespace of its own.
const spaceEnv = "CSI_TEST_SPACE"

func TestMain(m *testing.M) {
	if os.Getenv(spaceEnv) != "" {
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

// inSpace runs the test in a mount namespace of its own: as root, or as a user
// who is root there, which not every system allows. It reports whether the test
// runs there now; where not, it ran there.
func inSpace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(spaceEnv) != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), spaceEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNS
	} else {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Skipf("needs a mount namespace: run as root, or allow user namespaces: %v", err)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// node is a node as kubelet leaves it, with one pod.
type node struct {
	dir, kubelet, sockets string
	log                   *strings.Builder
}

const volumeDir = "pods/0a1b2c3d/volumes/kubernetes.io~csi/spiffe"

func newNode(t *testing.T) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "csi") // short: paths of sockets are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	n := &node{dir: dir, kubelet: filepath.Join(dir, "kubelet"), sockets: filepath.Join(dir, "public"), log: &strings.Builder{}}
	mkdir(t, filepath.Join(n.kubelet, volumeDir))
	mkdir(t, filepath.Join(n.kubelet, "plugins_registry"))
	mkdir(t, n.sockets)
	return n
}

func mkdir(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o750); err != nil {
		t.Fatal(err)
	}
}

// share makes the directory of pods a mount that propagates, as in a container
// with mountPropagation: Bidirectional.
func (n *node) share(t *testing.T) {
	t.Helper()
	pods := filepath.Join(n.kubelet, "pods")
	if err := errors.Join(unix.Mount(pods, pods, "", unix.MS_BIND, ""), unix.Mount("", pods, "", unix.MS_SHARED, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(pods, unix.MNT_DETACH) })
}

func (n *node) target() string { return filepath.Join(n.kubelet, volumeDir, mountName) }

func (n *node) config() Config {
	return Config{
		NodeID: "node-1", Version: "1.2.3", SocketDir: n.sockets, KubeletDir: n.kubelet,
		Log: hclog.New(&hclog.LoggerOptions{Output: n.log, Level: hclog.Debug}),
	}
}

// bare is a driver without sockets.
func (n *node) bare(t *testing.T) *Driver {
	t.Helper()
	cfg := n.config()
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	return &Driver{cfg: cfg, pods: filepath.Join(cfg.KubeletDir, "pods"), log: cfg.Log, attach: bindMount, state: errUnregistered}
}

// serve runs a driver until the test ends, or until stop.
func (n *node) serve(t *testing.T, cfg Config) (d *Driver, stop func()) {
	t.Helper()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return d, stop
}

// dial is kubelet's way to a socket.
func dial(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func (n *node) publish() *spec.NodePublishVolumeRequest {
	return &spec.NodePublishVolumeRequest{
		VolumeId:   "csi-0123",
		TargetPath: n.target(),
		VolumeCapability: &spec.VolumeCapability{
			AccessType: &spec.VolumeCapability_Mount{Mount: &spec.VolumeCapability_MountVolume{}},
			AccessMode: &spec.VolumeCapability_AccessMode{Mode: spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		Readonly:      true,
		VolumeContext: map[string]string{ephemeral: "true", podName: "web-0", podNamespace: "shop", podUID: "0a1b2c3d", kubeletAttributes + "serviceAccount.name": "web"},
	}
}

func (n *node) unpublish() *spec.NodeUnpublishVolumeRequest {
	return &spec.NodeUnpublishVolumeRequest{VolumeId: "csi-0123", TargetPath: n.target()}
}

// mountsAt returns how many mounts are stacked on a path.
func mountsAt(t *testing.T, path string) (count int) {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); len(fields) > 4 && fields[4] == path {
			count++
		}
	}
	return count
}

// files lists all there is beneath a directory, with what links lead to.
func files(t testing.TB, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to, _ := os.Readlink(path)
		list = append(list, e.Type().String()+" "+path+" "+to)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(list)
	return list
}
