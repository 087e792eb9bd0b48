package csi

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/narthex-id/narthex/internal/socket"
)

// asKubelet finds the plugin by its registration socket and registers it, as
// kubelet does, and returns a client of the driver.
func asKubelet(t *testing.T, n *node, refuse string) spec.NodeClient {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	plugin := registration.NewRegistrationClient(dial(t, n.registration()))
	info, err := plugin.GetInfo(ctx, &registration.InfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if info.GetType() != registration.CSIPlugin || info.GetName() != DriverName || len(info.GetSupportedVersions()) == 0 {
		t.Errorf("info %v", info)
	}
	conn := dial(t, info.GetEndpoint())
	named, err := spec.NewIdentityClient(conn).GetPluginInfo(ctx, &spec.GetPluginInfoRequest{})
	if err != nil || named.GetName() != DriverName || named.GetVendorVersion() != "1.2.3" {
		t.Errorf("plugin %v, %v", named, err)
	}
	driver := spec.NewNodeClient(conn)
	if got, err := driver.NodeGetInfo(ctx, &spec.NodeGetInfoRequest{}); err != nil || got.GetNodeId() != "node-1" {
		t.Errorf("node %v, %v", got, err)
	}
	if _, err := plugin.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: refuse == "", Error: refuse}); err != nil {
		t.Fatal(err)
	}
	return driver
}

func (n *node) registration() string {
	return filepath.Join(n.kubelet, "plugins_registry", DriverName+"-reg.sock")
}

// TestRegistration is the whole way of kubelet over real sockets: it finds the
// plugin, registers it, has a volume published, and loses and finds it again.
func TestRegistration(t *testing.T) {
	if !inSpace(t) {
		return
	}
	n := newNode(t)
	n.share(t)
	d, stop := n.serve(t, n.config())
	if err := d.Ready(); !errors.Is(err, errUnregistered) {
		t.Errorf("ready before kubelet came: %v", err)
	}
	asKubelet(t, n, "no such version")
	if err := d.Ready(); err == nil || !strings.Contains(err.Error(), "kubelet refused the driver: no such version") {
		t.Errorf("ready though refused: %v", err)
	}
	driver := asKubelet(t, n, "")
	if err := d.Ready(); err != nil {
		t.Error(err)
	}
	ctx := context.Background()
	can, err := driver.NodeGetCapabilities(ctx, &spec.NodeGetCapabilitiesRequest{})
	if err != nil || len(can.GetCapabilities()) != 2 {
		t.Errorf("capabilities %v, %v", can, err)
	}
	if _, err := driver.NodePublishVolume(ctx, n.publish()); err != nil {
		t.Error(err)
	}
	if mountsAt(t, n.target()) != 1 {
		t.Error("not mounted")
	}
	if _, err := driver.NodeUnpublishVolume(ctx, n.unpublish()); err != nil {
		t.Error(err)
	}
	_, err = driver.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{})
	wantError(t, err, codes.Unimplemented, "")
	big := n.publish()
	big.VolumeId = strings.Repeat("x", maxMessage)
	_, err = driver.NodePublishVolume(ctx, big)
	wantError(t, err, codes.ResourceExhausted, "")

	for path, mode := range map[string]os.FileMode{d.endpoint(): 0o600, filepath.Dir(d.endpoint()): 0o700, n.registration(): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want mode %o", path, info.Mode(), err, mode)
		}
	}
	stop()
	for _, path := range []string{d.endpoint(), n.registration()} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

// TestSocketsRemoved has kubelet remove the files, as it does with its
// directories: the driver makes them again, and is found again.
func TestSocketsRemoved(t *testing.T) {
	if !inSpace(t) {
		return
	}
	n := newNode(t)
	n.share(t)
	d, _ := n.serve(t, n.config())
	asKubelet(t, n, "")
	for _, path := range []string{n.registration(), d.endpoint()} {
		again := made(t, path)
		remove(t, path)
		again()
		asKubelet(t, n, "")
		if err := d.Ready(); err != nil {
			t.Errorf("after %s was removed: %v", path, err)
		}
	}
}

// made returns a func that waits until a file is made at path.
func made(t *testing.T, path string) func() {
	t.Helper()
	w, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	return func() {
		defer w.Close()
		limit := time.After(time.Minute)
		for {
			select {
			case e := <-w.Events:
				if e.Name == path && e.Has(fsnotify.Create) {
					return
				}
			case <-limit:
				t.Fatalf("%s was not made again", path)
			}
		}
	}
}

// TestSockets is what may stand where the driver wants to listen.
func TestSockets(t *testing.T) {
	t.Parallel()
	cfg := newNode(t).config()
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(cfg.KubeletDir)
	path := dir + "/s/csi.sock"
	open := func() (*listener, error) { return listen(path, true, cfg.Log) }
	first, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(); !errors.Is(err, socket.ErrServed) {
		t.Errorf("a socket that is served was replaced: %v", err)
	}
	_ = first.Close() // as a process that was killed leaves it
	second, err := open()
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := first.Remove(); err != nil || !second.Stands() {
		t.Errorf("the first removed the second's file: %v", err)
	}
	if err := second.Remove(); err != nil || second.Stands() {
		t.Errorf("its own file is left: %v", err)
	}
	write(t, path)
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("over a file: %v", err)
	}
	long := dir + "/" + strings.Repeat("x", 110)
	if _, err := listen(long, false, cfg.Log); err == nil || !strings.Contains(err.Error(), "the system allows 107") {
		t.Errorf("a long path: %v", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestOnlyRootCalls(t *testing.T) {
	t.Parallel()
	own := uint32(os.Geteuid())
	for uid, ok := range map[uint32]bool{0: true, own: true, own + 1: false, 65534: own == 65534} {
		if err := admits(&unix.Ucred{Pid: 7, Uid: uid}); (err == nil) != ok {
			t.Errorf("user %d: %v", uid, err)
		}
	}
	client, server, err := pair(t)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	defer server.Close()
	if err := checkPeer(server); err != nil {
		t.Error(err)
	}
}

func pair(t *testing.T) (client net.Conn, server *net.UnixConn, err error) {
	l := listenAt(t, newNode(t).dir+"/s").(*net.UnixListener)
	if client, err = net.Dial("unix", l.Addr().String()); err == nil {
		server, err = l.AcceptUnix()
	}
	return client, server, err
}

func TestConfig(t *testing.T) {
	t.Parallel()
	good := Config{NodeID: "n", SocketDir: "/run/narthex/public", KubeletDir: "/var/lib/kubelet"}
	if err := good.complete(); err != nil || good.RegistrationDir != "/var/lib/kubelet/plugins_registry" || good.DriverName != DriverName {
		t.Errorf("%+v, %v", good, err)
	}
	for want, change := range map[string]func(*Config){
		"node's name has 0 bytes":     func(c *Config) { c.NodeID = "" },
		"node's name has 257 bytes":   func(c *Config) { c.NodeID = strings.Repeat("n", 257) },
		`socket directory "run"`:      func(c *Config) { c.SocketDir = "run" },
		`socket directory "/"`:        func(c *Config) { c.SocketDir = "/" },
		`kubelet's directory "/a/.."`: func(c *Config) { c.KubeletDir = "/a/.." },
		`registration directory "/a/`: func(c *Config) { c.RegistrationDir = "/a/" },
		`driver name "../x"`:          func(c *Config) { c.DriverName = "../x" },
		`driver name "x-"`:            func(c *Config) { c.DriverName = "x-" },
	} {
		c := good
		change(&c)
		if err := c.complete(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
