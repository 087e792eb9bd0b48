package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What kubelet says of the pod, with podInfoOnMount in the CSIDriver object. A
// pod cannot forge them: kubelet writes them over its own.
const (
	kubeletAttributes = "csi.storage.k8s.io/"
	ephemeral         = kubeletAttributes + "ephemeral"
	podNamespace      = kubeletAttributes + "pod.namespace"
	podName           = kubeletAttributes + "pod.name"
	podUID            = kubeletAttributes + "pod.uid"
)

// NodeGetInfo names the node.
func (d *Driver) NodeGetInfo(context.Context, *spec.NodeGetInfoRequest) (*spec.NodeGetInfoResponse, error) {
	return &spec.NodeGetInfoResponse{NodeId: d.cfg.NodeID}, nil
}

// NodeGetCapabilities offers the health of volumes, beside what every driver can.
func (d *Driver) NodeGetCapabilities(context.Context, *spec.NodeGetCapabilitiesRequest) (*spec.NodeGetCapabilitiesResponse, error) {
	response := &spec.NodeGetCapabilitiesResponse{}
	for _, can := range []spec.NodeServiceCapability_RPC_Type{
		spec.NodeServiceCapability_RPC_GET_VOLUME_STATS, spec.NodeServiceCapability_RPC_VOLUME_CONDITION,
	} {
		response.Capabilities = append(response.Capabilities, &spec.NodeServiceCapability{
			Type: &spec.NodeServiceCapability_Rpc{Rpc: &spec.NodeServiceCapability_RPC{Type: can}},
		})
	}
	return response, nil
}

// NodePublishVolume mounts the socket directory at the target path. Asked again
// it changes nothing; a mount of a directory that was deleted since is replaced.
func (d *Driver) NodePublishVolume(_ context.Context, req *spec.NodePublishVolumeRequest) (*spec.NodePublishVolumeResponse, error) {
	log := d.log.With(
		"namespace", printable(req.GetVolumeContext()[podNamespace]), "pod", printable(req.GetVolumeContext()[podName]),
		"uid", printable(req.GetVolumeContext()[podUID]), "volume", printable(req.GetVolumeId()), "target", printable(req.GetTargetPath()))
	did, err := d.publish(req)
	if err != nil {
		log.Error("cannot publish a volume", "error", status.Convert(err).Message())
		return nil, err
	}
	log.Info(did)
	return &spec.NodePublishVolumeResponse{}, nil
}

func (d *Driver) publish(req *spec.NodePublishVolumeRequest) (did string, err error) {
	if err := checkPublish(req); err != nil {
		return "", invalid("publish a volume: %w", err)
	}
	p, err := d.place(req.GetTargetPath())
	if err != nil {
		return "", invalid("publish a volume: target_path: %w", err)
	}
	d.mounting.Lock()
	defer d.mounting.Unlock()
	source, err := d.openSource()
	if err != nil {
		return "", status.Errorf(codes.Unavailable, "publish a volume: the Workload API's directory cannot be mounted (does the agent run on this node?): %v", err)
	}
	defer source.Close()
	if did, err = d.mountAt(p, source); err != nil {
		return "", failed("publish a volume at "+p.path, err)
	}
	return did, nil
}

// checkPublish checks all of a request but its paths.
func checkPublish(req *spec.NodePublishVolumeRequest) error {
	capability := req.GetVolumeCapability()
	mount := capability.GetMount()
	attributes := req.GetVolumeContext()
	if err := checkID(req.GetVolumeId()); err != nil {
		return err
	}
	if err := checkMap(attributes); err != nil {
		return err
	}
	switch {
	case attributes[ephemeral] != "true":
		return errors.New("only ephemeral inline volumes are offered (spec.volumes[].csi of a pod), and the CSIDriver object has to have podInfoOnMount: true and volumeLifecycleModes: [Ephemeral]")
	case !req.GetReadonly():
		return errors.New("spec.volumes[].csi.readOnly of the pod has to be true")
	case capability == nil || capability.GetAccessType() == nil:
		return errors.New("volume_capability: the access type is missing")
	case mount == nil:
		return errors.New("volume_capability: this is a directory, it cannot be a block device")
	case mount.GetFsType() != "":
		return errors.New("spec.volumes[].csi.fsType of the pod has to go: there is no file system to choose")
	case len(mount.GetMountFlags()) > 0:
		return errors.New("volume_capability: mount flags are not taken")
	case capability.GetAccessMode().GetMode() == spec.VolumeCapability_AccessMode_UNKNOWN:
		return errors.New("volume_capability: the access mode is missing")
	case len(req.GetSecrets()) > 0:
		return errors.New("spec.volumes[].csi.nodePublishSecretRef of the pod has to go: no secrets are needed")
	}
	return nil
}

func checkID(id string) error {
	if id == "" || len(id) > maxString {
		return fmt.Errorf("volume_id has %d bytes, want 1 to %d", len(id), maxString)
	}
	return nil
}

// checkMap checks the attributes of the volume: those of kubelet and no others,
// as nobody would heed them.
func checkMap(attributes map[string]string) error {
	if len(attributes) > maxEntries {
		return fmt.Errorf("volume_context has %d attributes, want at most %d", len(attributes), maxEntries)
	}
	size := 0
	for key, value := range attributes {
		if !strings.HasPrefix(key, kubeletAttributes) {
			return fmt.Errorf("spec.volumes[].csi.volumeAttributes[%q] of the pod has to go: the driver takes none", printable(key))
		}
		size += len(key) + len(value)
	}
	if size > maxMap {
		return fmt.Errorf("volume_context has %d bytes, want at most %d", size, maxMap)
	}
	return nil
}

// mountAt has the volume's place show source.
func (d *Driver) mountAt(p volumePlace, source *os.File) (did string, err error) {
	dir, err := d.openDir(p)
	if err != nil {
		return "", err // kubelet makes it before it asks
	}
	defer dir.Close()
	want, err := look(source)
	if err != nil {
		return "", err
	}
	if err := unix.Mkdirat(int(dir.Fd()), mountName, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", &os.PathError{Op: "mkdir", Path: p.path, Err: err}
	}
	target, err := openTarget(dir)
	if err != nil {
		return "", err
	}
	defer func() { _ = target.Close() }()
	have, err := look(target)
	switch {
	case err != nil:
		return "", err
	case have.shows(want):
		return "the volume is published already", nil
	case !have.directory:
		return "", errNotDirectory
	}
	did = "published a volume"
	if have.mounted {
		did = "published a volume in the place of a stale mount"
		_ = target.Close()
		if target, err = detach(dir); err != nil {
			return "", err
		}
	}
	return did, d.attach(int(source.Fd()), int(target.Fd()))
}

var errNotDirectory = errors.New("what is there is not a directory, and not ours: move it away")

// NodeUnpublishVolume takes away what NodePublishVolume made, and every mount
// there. What is gone already is no error.
func (d *Driver) NodeUnpublishVolume(_ context.Context, req *spec.NodeUnpublishVolumeRequest) (*spec.NodeUnpublishVolumeResponse, error) {
	log := d.log.With("volume", printable(req.GetVolumeId()), "target", printable(req.GetTargetPath()))
	if err := d.unpublish(req); err != nil {
		log.Error("cannot unpublish a volume", "error", status.Convert(err).Message())
		return nil, err
	}
	log.Info("unpublished a volume")
	return &spec.NodeUnpublishVolumeResponse{}, nil
}

func (d *Driver) unpublish(req *spec.NodeUnpublishVolumeRequest) error {
	if err := checkID(req.GetVolumeId()); err != nil {
		return invalid("unpublish a volume: %w", err)
	}
	p, err := d.place(req.GetTargetPath())
	if err != nil {
		return invalid("unpublish a volume: target_path: %w", err)
	}
	d.mounting.Lock()
	defer d.mounting.Unlock()
	if err := d.removeAt(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return failed("unpublish a volume at "+p.path, err)
	}
	return nil
}

func (d *Driver) removeAt(p volumePlace) error {
	dir, err := d.openDir(p)
	if err != nil {
		return err
	}
	defer dir.Close()
	left, err := detach(dir)
	if left != nil {
		defer left.Close()
	}
	if err != nil {
		return err
	}
	what, err := look(left)
	if err != nil {
		return err
	}
	if !what.directory {
		return errNotDirectory
	}
	if err := unix.Unlinkat(int(dir.Fd()), mountName, unix.AT_REMOVEDIR); err != nil {
		return &os.PathError{Op: "rmdir", Path: p.path, Err: err}
	}
	return nil
}

// NodeGetVolumeStats tells whether the pod reaches the Workload API by its
// volume, and how full the file system of that directory is.
func (d *Driver) NodeGetVolumeStats(_ context.Context, req *spec.NodeGetVolumeStatsRequest) (*spec.NodeGetVolumeStatsResponse, error) {
	if err := checkID(req.GetVolumeId()); err != nil {
		return nil, invalid("look at a volume: %w", err)
	}
	p, err := d.place(req.GetVolumePath())
	if err != nil {
		return nil, invalid("look at a volume: volume_path: %w", err)
	}
	response := &spec.NodeGetVolumeStatsResponse{VolumeCondition: &spec.VolumeCondition{Message: "the Workload API's directory is mounted"}}
	usage, err := d.examine(p)
	if errors.Is(err, fs.ErrNotExist) && usage == nil {
		return nil, status.Errorf(codes.NotFound, "look at a volume: %v", err)
	}
	response.Usage = usage
	if err != nil {
		response.VolumeCondition = &spec.VolumeCondition{Abnormal: true, Message: err.Error()}
		d.log.Warn("a volume is not as it should be", "volume", printable(req.GetVolumeId()), "target", p.path, "error", err)
	}
	return response, nil
}

// examine returns the usage of a volume, nil where nothing is mounted, and what
// is wrong with it.
func (d *Driver) examine(p volumePlace) ([]*spec.VolumeUsage, error) {
	dir, err := d.openDir(p)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	target, err := openTarget(dir)
	if err != nil {
		return nil, err
	}
	defer target.Close()
	have, err := look(target)
	if err != nil {
		return nil, err
	}
	if !have.mounted {
		return nil, errors.New("nothing is mounted here: start the pod again")
	}
	usage, err := usageOf(target)
	if err != nil {
		return nil, err
	}
	source, err := d.openSource()
	if err != nil {
		return usage, fmt.Errorf("the Workload API's directory is gone (does the agent run on this node?): %w", err)
	}
	defer source.Close()
	want, err := look(source)
	switch {
	case err != nil:
		return usage, err
	case have.file != want.file:
		return usage, fmt.Errorf("%s was deleted and made again since it was mounted here: start the pod again", d.cfg.SocketDir)
	case !have.shows(want):
		return usage, errors.New("the mount is another than this driver makes (read-only, no programs, no devices): start the pod again")
	}
	return usage, holdsSocket(source)
}

func usageOf(f *os.File) ([]*spec.VolumeUsage, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: f.Name(), Err: err}
	}
	block := int64(st.Bsize) //nolint:unconvert // of another type on some architectures
	return []*spec.VolumeUsage{
		{Unit: spec.VolumeUsage_BYTES, Total: int64(st.Blocks) * block, Available: int64(st.Bavail) * block, Used: int64(st.Blocks-st.Bfree) * block},
		{Unit: spec.VolumeUsage_INODES, Total: int64(st.Files), Available: int64(st.Ffree), Used: int64(st.Files - st.Ffree)},
	}, nil
}

// maxListed bounds how much of the directory is read for its socket.
const maxListed = 256

func holdsSocket(source *os.File) error {
	dir, err := os.Open("/proc/self/fd/" + strconv.Itoa(int(source.Fd())))
	if err != nil {
		return fmt.Errorf("list the Workload API's directory: %w", err)
	}
	defer dir.Close()
	entries, _ := dir.ReadDir(maxListed)
	for _, e := range entries {
		if e.Type() == fs.ModeSocket {
			return nil
		}
	}
	return errors.New("no socket is in the Workload API's directory: the agent does not run; the pod will see its socket when it does")
}

// invalid says what has to be changed in a request.
func invalid(format string, err error) error {
	return status.Error(codes.InvalidArgument, fmt.Errorf(format, err).Error())
}

// failed says what is wrong with the place.
func failed(doing string, err error) error {
	code := codes.Internal
	if errors.Is(err, errNotDirectory) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, fs.ErrNotExist) {
		code = codes.FailedPrecondition
	}
	return status.Errorf(code, "%s: %v", doing, err)
}

// maxPrinted is as long as a name in Kubernetes can be.
const maxPrinted = 253

// printable bounds a text that others chose, and escapes what would not be text
// in a line of the log.
func printable(s string) string {
	cut := s
	if len(cut) > maxPrinted {
		cut = cut[:maxPrinted] + "…"
	}
	if quoted := strconv.QuoteToGraphic(cut); quoted != `"`+cut+`"` {
		return quoted[1 : len(quoted)-1]
	}
	return cut
}
