package csi

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
)

// FuzzNodePublishVolume publishes and unpublishes by whole requests, in a tree
// with links, files and what belongs to others: whatever they say, a mount is
// made at the place of a CSI volume and nowhere else, and nothing but that is
// made or removed.
func FuzzNodePublishVolume(f *testing.F) {
	f.Add("0a1b2c3d/volumes/kubernetes.io~csi/spiffe/mount", []byte{})
	f.Add("../../outside", []byte{})
	f.Add("link/volumes/kubernetes.io~csi/spiffe/mount", []byte{})
	f.Add("0a1b2c3d/volumes/kubernetes.io~csi/link/mount", []byte{})
	f.Add("0a1b2c3d/volumes/kubernetes.io~csi/file/mount", []byte{})
	f.Add("0a1b2c3d/volumes/kubernetes.io~csi/../mount", []byte{10, 1, 'x'})
	dir, err := filepath.EvalSymlinks(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	n := &node{dir: dir, kubelet: dir + "/kubelet", sockets: dir + "/public", log: &strings.Builder{}}
	for _, d := range []string{volumeDir, "pods/0a1b2c3d/volumes/kubernetes.io~csi/file", "pods/0a1b2c3d/volumes/kubernetes.io~csi/used/mount/kept", "../outside/volumes/kubernetes.io~csi/spiffe", "../public"} {
		if err := os.MkdirAll(filepath.Join(n.kubelet, d), 0o750); err != nil {
			f.Fatal(err)
		}
	}
	for path, to := range map[string]string{"pods/link": dir + "/outside", "pods/0a1b2c3d/volumes/kubernetes.io~csi/link": dir + "/outside"} {
		if err := os.Symlink(to, filepath.Join(n.kubelet, path)); err != nil {
			f.Fatal(err)
		}
	}
	if err := os.WriteFile(n.kubelet+"/pods/0a1b2c3d/volumes/kubernetes.io~csi/file/mount", nil, 0o600); err != nil {
		f.Fatal(err)
	}
	cfg := n.config()
	cfg.Log = nil
	if err := cfg.complete(); err != nil {
		f.Fatal(err)
	}
	var at []string
	d := &Driver{cfg: cfg, pods: n.kubelet + "/pods", log: cfg.Log, attach: func(_, target int) error {
		path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(target))
		at = append(at, path)
		return err
	}}
	before := files(f, dir)
	f.Fuzz(func(t *testing.T, beneath string, more []byte) {
		request := n.publish()
		request.TargetPath = n.kubelet + "/pods/" + beneath
		other := &spec.NodePublishVolumeRequest{}
		if proto.Unmarshal(more, other) == nil {
			proto.Merge(request, other)
		}
		at = nil
		_, err := d.NodePublishVolume(context.Background(), request)
		for _, path := range at {
			if path != request.GetTargetPath() || !strings.HasPrefix(path, n.kubelet+"/pods/0a1b2c3d/volumes/kubernetes.io~csi/") {
				t.Errorf("%q was mounted at %s", request.GetTargetPath(), path)
			}
		}
		if (err == nil) != (len(at) == 1) {
			t.Errorf("%v, and mounted at %q", err, at)
		}
		_, _ = d.NodeUnpublishVolume(context.Background(), &spec.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: request.GetTargetPath()})
		if after := files(t, dir); !slices.Equal(before, after) {
			t.Fatalf("files were changed by %q", request.GetTargetPath())
		}
	})
}
