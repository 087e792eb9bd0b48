package csi

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// wantError checks a call's error by its code and a part of its text.
func wantError(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || (code != codes.OK && !strings.Contains(err.Error(), text)) {
		t.Errorf("got %v, want %v with %q", err, code, text)
	}
}

// TestPublishIsRefused asks for what is not offered: nothing is mounted, made
// or removed by it.
func TestPublishIsRefused(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 5000)
	for name, c := range map[string]struct {
		change func(r *spec.NodePublishVolumeRequest, n *node)
		code   codes.Code
		text   string
	}{
		"no volume id":    {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeId = "" }, codes.InvalidArgument, "volume_id has 0 bytes"},
		"long volume id":  {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeId = long }, codes.InvalidArgument, "want 1 to 128"},
		"not ephemeral":   {func(r *spec.NodePublishVolumeRequest, _ *node) { delete(r.VolumeContext, ephemeral) }, codes.InvalidArgument, "podInfoOnMount: true"},
		"ephemeral false": {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeContext[ephemeral] = "false" }, codes.InvalidArgument, "only ephemeral inline volumes"},
		"not read-only":   {func(r *spec.NodePublishVolumeRequest, _ *node) { r.Readonly = false }, codes.InvalidArgument, "readOnly of the pod has to be true"},
		"no capability":   {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeCapability = nil }, codes.InvalidArgument, "access type is missing"},
		"no access type":  {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeCapability.AccessType = nil }, codes.InvalidArgument, "access type is missing"},
		"no access mode":  {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeCapability.AccessMode = nil }, codes.InvalidArgument, "access mode is missing"},
		"block": {func(r *spec.NodePublishVolumeRequest, _ *node) {
			r.VolumeCapability.AccessType = &spec.VolumeCapability_Block{}
		}, codes.InvalidArgument, "cannot be a block device"},
		"file system": {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeCapability.GetMount().FsType = "ext4" }, codes.InvalidArgument, "fsType of the pod has to go"},
		"mount flags": {func(r *spec.NodePublishVolumeRequest, _ *node) {
			r.VolumeCapability.GetMount().MountFlags = []string{"rw"}
		}, codes.InvalidArgument, "mount flags are not taken"},
		"attribute":       {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeContext["path\n"] = "/etc" }, codes.InvalidArgument, `volumeAttributes["path\\n"] of the pod has to go`},
		"many attributes": {func(r *spec.NodePublishVolumeRequest, _ *node) { r.VolumeContext[kubeletAttributes+"x"] = long }, codes.InvalidArgument, "volume_context has"},
		"secrets":         {func(r *spec.NodePublishVolumeRequest, _ *node) { r.Secrets = map[string]string{"a": "b"} }, codes.InvalidArgument, "no secrets are needed"},
		"no target":       {func(r *spec.NodePublishVolumeRequest, _ *node) { r.TargetPath = "" }, codes.InvalidArgument, "the path is empty"},
		"long target":     {func(r *spec.NodePublishVolumeRequest, _ *node) { r.TargetPath = "/" + long }, codes.InvalidArgument, "the system allows 4095"},
		"relative target": {func(r *spec.NodePublishVolumeRequest, n *node) { r.TargetPath = strings.TrimPrefix(n.target(), "/") }, codes.InvalidArgument, "want an absolute path"},
		"target with ..": {func(r *spec.NodePublishVolumeRequest, n *node) {
			r.TargetPath = n.kubelet + "/pods/../../outside/a/mount"
		}, codes.InvalidArgument, "want an absolute path"},
		"target with slash": {func(r *spec.NodePublishVolumeRequest, _ *node) { r.TargetPath += "/" }, codes.InvalidArgument, "want an absolute path"},
		"target with zero":  {func(r *spec.NodePublishVolumeRequest, _ *node) { r.TargetPath += "\x00" }, codes.InvalidArgument, "want an absolute path"},
		"target outside":    {func(r *spec.NodePublishVolumeRequest, n *node) { r.TargetPath = n.dir + "/outside" }, codes.InvalidArgument, "--kubelet-dir has to be"},
		"beside pods": {func(r *spec.NodePublishVolumeRequest, n *node) {
			r.TargetPath = strings.Replace(n.target(), "/pods/", "/pods-of-others/", 1)
		}, codes.InvalidArgument, "--kubelet-dir has to be"},
		"pods itself": {func(r *spec.NodePublishVolumeRequest, n *node) { r.TargetPath = n.kubelet + "/pods" }, codes.InvalidArgument, "--kubelet-dir has to be"},
		"another volume": {func(r *spec.NodePublishVolumeRequest, n *node) {
			r.TargetPath = strings.Replace(n.target(), "~csi", "~empty-dir", 1)
		}, codes.InvalidArgument, "no place of a CSI volume"},
		"too deep":           {func(r *spec.NodePublishVolumeRequest, _ *node) { r.TargetPath += "/mount" }, codes.InvalidArgument, "no place of a CSI volume"},
		"volume not there":   {func(_ *spec.NodePublishVolumeRequest, n *node) { remove(t, filepath.Dir(n.target())) }, codes.FailedPrecondition, "no such file"},
		"file at the target": {func(_ *spec.NodePublishVolumeRequest, n *node) { write(t, n.target()) }, codes.FailedPrecondition, "not a directory, and not ours"},
		"link at the target": {func(_ *spec.NodePublishVolumeRequest, n *node) { link(t, n.dir+"/outside", n.target()) }, codes.FailedPrecondition, "not a directory, and not ours"},
		"link on the way":    {linkOnTheWay(t), codes.FailedPrecondition, "symbolic link"},
		"link beneath":       {linkBeneath(t), codes.FailedPrecondition, "symbolic link"},
		"no sockets":         {func(_ *spec.NodePublishVolumeRequest, n *node) { remove(t, n.sockets) }, codes.Unavailable, "does the agent run on this node?"},
		"sockets are a link": {func(_ *spec.NodePublishVolumeRequest, n *node) { remove(t, n.sockets); link(t, "/etc", n.sockets) }, codes.Unavailable, "symbolic link"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			mkdir(t, n.dir+"/outside/a")
			request := n.publish()
			c.change(request, n)
			before := files(t, n.dir)
			d := n.bare(t)
			d.attach = func(int, int) error { t.Error("it would have mounted"); return nil }
			_, err := d.NodePublishVolume(context.Background(), request)
			wantError(t, err, c.code, c.text)
			if after := files(t, n.dir); !slices.Equal(before, after) {
				t.Errorf("files were changed:\n%q\n%q", before, after)
			}
			if !strings.Contains(n.log.String(), "pod=web-0") || !strings.Contains(n.log.String(), "namespace=shop") {
				t.Errorf("the log does not name the pod: %s", n.log)
			}
		})
	}
}

func linkOnTheWay(t *testing.T) func(*spec.NodePublishVolumeRequest, *node) {
	return func(_ *spec.NodePublishVolumeRequest, n *node) {
		remove(t, filepath.Dir(n.target()))
		link(t, n.dir+"/outside", filepath.Dir(n.target()))
	}
}

// linkBeneath has a link that stays beneath the directory of pods.
func linkBeneath(t *testing.T) func(*spec.NodePublishVolumeRequest, *node) {
	return func(r *spec.NodePublishVolumeRequest, n *node) {
		link(t, n.kubelet+"/pods/0a1b2c3d", n.kubelet+"/pods/other")
		r.TargetPath = strings.Replace(r.TargetPath, "0a1b2c3d", "other", 1)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, to, path string) {
	t.Helper()
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

// TestUnpublishIsRefused leaves alone what the driver has not made.
func TestUnpublishIsRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(r *spec.NodeUnpublishVolumeRequest, n *node)
		code   codes.Code
		text   string
	}{
		"no volume id":       {func(r *spec.NodeUnpublishVolumeRequest, _ *node) { r.VolumeId = "" }, codes.InvalidArgument, "volume_id has 0 bytes"},
		"no target":          {func(r *spec.NodeUnpublishVolumeRequest, _ *node) { r.TargetPath = "" }, codes.InvalidArgument, "the path is empty"},
		"outside":            {func(r *spec.NodeUnpublishVolumeRequest, n *node) { r.TargetPath = n.dir + "/outside" }, codes.InvalidArgument, "--kubelet-dir has to be"},
		"the volume":         {func(r *spec.NodeUnpublishVolumeRequest, n *node) { r.TargetPath = filepath.Dir(n.target()) }, codes.InvalidArgument, "no place of a CSI volume"},
		"file at the target": {func(_ *spec.NodeUnpublishVolumeRequest, n *node) { write(t, n.target()) }, codes.FailedPrecondition, "not a directory, and not ours"},
		"link at the target": {func(_ *spec.NodeUnpublishVolumeRequest, n *node) { link(t, n.dir+"/outside", n.target()) }, codes.FailedPrecondition, "not a directory, and not ours"},
		"not empty":          {func(_ *spec.NodeUnpublishVolumeRequest, n *node) { mkdir(t, n.target()+"/kept") }, codes.FailedPrecondition, "not empty"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			mkdir(t, n.dir+"/outside")
			request := n.unpublish()
			c.change(request, n)
			before := files(t, n.dir)
			_, err := n.bare(t).NodeUnpublishVolume(context.Background(), request)
			wantError(t, err, c.code, c.text)
			if after := files(t, n.dir); !slices.Equal(before, after) {
				t.Errorf("files were changed:\n%q\n%q", before, after)
			}
		})
	}
}

// TestUnpublishOfWhatIsGone takes what kubelet or a reboot has taken before.
func TestUnpublishOfWhatIsGone(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(n *node){
		"no target":             func(*node) {},
		"a target, not mounted": func(n *node) { mkdir(t, n.target()) },
		"no volume":             func(n *node) { remove(t, filepath.Dir(n.target())) },
		"no pod": func(n *node) {
			if err := os.RemoveAll(n.kubelet + "/pods/0a1b2c3d"); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			prepare(n)
			for range 2 {
				if _, err := n.bare(t).NodeUnpublishVolume(context.Background(), n.unpublish()); err != nil {
					t.Error(err)
				}
			}
			if _, err := os.Lstat(n.target()); !os.IsNotExist(err) {
				t.Errorf("the target is left: %v", err)
			}
		})
	}
}

// TestMount is the life of a volume with real mounts.
func TestMount(t *testing.T) {
	if !inSpace(t) {
		return
	}
	n := newNode(t)
	n.share(t)
	d := n.bare(t)
	ctx := context.Background()
	first := listenAt(t, n.sockets+"/api.sock")
	for range 2 { // kubelet may ask again
		if _, err := d.NodePublishVolume(ctx, n.publish()); err != nil {
			t.Fatal(err)
		}
		if got := mountsAt(t, n.target()); got != 1 {
			t.Fatalf("%d mounts, want 1", got)
		}
	}
	if err := reach(n.target() + "/api.sock"); err != nil {
		t.Errorf("the socket is not reached by the volume: %v", err)
	}
	var fsys unix.Statfs_t
	if err := unix.Statfs(n.target(), &fsys); err != nil || fsys.Flags&statfsFlags != statfsFlags {
		t.Errorf("flags %x, %v: want read-only, no devices, no programs, no set-user-ID", fsys.Flags, err)
	}
	if err := os.WriteFile(n.target()+"/new", nil, 0o600); err == nil {
		t.Error("a file could be made in the volume")
	}
	condition(t, d, n, "")

	// The agent is started again: the directory is the same.
	_ = first.Close()
	condition(t, d, n, "the agent does not run")
	listenAt(t, n.sockets+"/api.sock")
	if err := reach(n.target() + "/api.sock"); err != nil {
		t.Errorf("the new socket is not reached by the volume: %v", err)
	}
	condition(t, d, n, "")

	for range 2 {
		if _, err := d.NodeUnpublishVolume(ctx, n.unpublish()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(n.target()); !os.IsNotExist(err) || mountsAt(t, n.target()) != 0 {
		t.Errorf("the target is left: %v", err)
	}
	if _, err := os.Lstat(n.sockets + "/api.sock"); err != nil {
		t.Errorf("the agent's own socket is gone: %v", err)
	}
}

// TestSocketDirReplaced deletes the directory and makes it again: a volume that
// shows the old one is told of, and replaced when kubelet asks again.
func TestSocketDirReplaced(t *testing.T) {
	if !inSpace(t) {
		return
	}
	n := newNode(t)
	n.share(t)
	d := n.bare(t)
	ctx := context.Background()
	if _, err := d.NodePublishVolume(ctx, n.publish()); err != nil {
		t.Fatal(err)
	}
	remove(t, n.sockets)
	condition(t, d, n, "directory is gone")
	mkdir(t, n.sockets)
	listenAt(t, n.sockets+"/api.sock")
	condition(t, d, n, "deleted and made again")
	if _, err := d.NodePublishVolume(ctx, n.publish()); err != nil {
		t.Fatal(err)
	}
	condition(t, d, n, "")
	if got := mountsAt(t, n.target()); got != 1 {
		t.Errorf("%d mounts, want 1", got)
	}
	if !strings.Contains(n.log.String(), "in the place of a stale mount") {
		t.Errorf("the log does not say so: %s", n.log)
	}
}

// TestMountsOfOthers has mounts on the target that another driver left there.
func TestMountsOfOthers(t *testing.T) {
	if !inSpace(t) {
		return
	}
	n := newNode(t)
	n.share(t)
	d := n.bare(t)
	ctx := context.Background()
	mkdir(t, n.target())
	for range 3 { // writable, one for each restart of kubelet
		if err := unix.Mount(n.sockets, n.target(), "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	condition(t, d, n, "another than this driver makes")
	if _, err := d.NodePublishVolume(ctx, n.publish()); err != nil {
		t.Fatal(err)
	}
	if got := mountsAt(t, n.target()); got != 1 {
		t.Errorf("%d mounts after publishing, want 1", got)
	}
	for range 3 {
		if err := unix.Mount(n.sockets, n.target(), "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.NodeUnpublishVolume(ctx, n.unpublish()); err != nil {
		t.Fatal(err)
	}
	if got := mountsAt(t, n.target()); got != 0 {
		t.Errorf("%d mounts after unpublishing, want none", got)
	}
	if entries, err := os.ReadDir(n.kubelet + "/pods/0a1b2c3d/volumes/kubernetes.io~csi/spiffe"); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// TestPlaceIsChecked starts where pods would not see what is mounted.
func TestPlaceIsChecked(t *testing.T) {
	if !inSpace(t) {
		return
	}
	n := newNode(t)
	pods := filepath.Join(n.kubelet, "pods")
	if err := checkPlace(pods); err == nil || !strings.Contains(err.Error(), "mountPropagation: Bidirectional") {
		t.Errorf("a mount that propagates nowhere: %v", err)
	}
	n.share(t)
	if err := checkPlace(pods); err != nil {
		t.Error(err)
	}
	if err := checkPlace(pods + "/none"); err == nil || !strings.Contains(err.Error(), "--kubelet-dir") {
		t.Errorf("no directory of pods: %v", err)
	}
}

// TestDeletedOnTheHost sees that a directory which the container was given is
// another now: only a new container sees the new one.
func TestDeletedOnTheHost(t *testing.T) {
	if !inSpace(t) {
		return
	}
	n := newNode(t)
	d := n.bare(t)
	outside, inside := n.dir+"/host", n.dir+"/inside"
	mkdir(t, outside+"/public")
	mkdir(t, inside)
	if err := unix.Mount(outside, inside, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(inside, unix.MNT_DETACH) })
	d.cfg.SocketDir = inside + "/public"
	if err := d.Live(); err != nil {
		t.Error(err)
	}
	remove(t, inside+"/public") // the agent may make it again
	if err := d.Live(); err != nil {
		t.Error(err)
	}
	remove(t, outside)
	if err := d.Live(); err == nil || !strings.Contains(err.Error(), inside+" was deleted on the host") {
		t.Errorf("got %v", err)
	}
}

// condition checks what NodeGetVolumeStats says of the volume; "" is well.
func condition(t *testing.T, d *Driver, n *node, want string) {
	t.Helper()
	got, err := d.NodeGetVolumeStats(context.Background(), &spec.NodeGetVolumeStatsRequest{VolumeId: "csi-0123", VolumePath: n.target()})
	if err != nil {
		t.Error(err)
		return
	}
	c := got.GetVolumeCondition()
	if c.GetAbnormal() != (want != "") || !strings.Contains(c.GetMessage(), want) {
		t.Errorf("the condition is %v, want %q", c, want)
	}
	if len(got.GetUsage()) != 2 {
		t.Errorf("usage %v: kubelet takes an answer without any for an error", got.GetUsage())
	}
}

func TestStatsOfNoVolume(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	d := n.bare(t)
	stats := func(path string) error {
		got, err := d.NodeGetVolumeStats(context.Background(), &spec.NodeGetVolumeStatsRequest{VolumeId: "v", VolumePath: path})
		if err == nil && !got.GetVolumeCondition().GetAbnormal() {
			t.Errorf("%s is well", path)
		}
		return err
	}
	wantError(t, stats(n.target()), codes.NotFound, "no such file")
	wantError(t, stats("/etc"), codes.InvalidArgument, "--kubelet-dir")
	mkdir(t, n.target())
	wantError(t, stats(n.target()), codes.OK, "")
}

func listenAt(t *testing.T, path string) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func reach(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	return c.Close()
}

func TestPrintable(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"web-0":                  "web-0",
		"a\nb":                   `a\nb`,
		"\x1b[31m":               `\x1b[31m`,
		strings.Repeat("x", 300): strings.Repeat("x", 253) + "…",
	} {
		if got := printable(in); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}
