// Package csi is a driver of the Container Storage Interface that mounts the
// directory of the Workload API's socket into pods: an ephemeral inline volume
// of csi.spiffe.io, instead of a hostPath, which policies of clusters forbid.
//
//	d, err := csi.New(csi.Config{NodeID: node, SocketDir: "/run/narthex/public", …})
//	if err != nil {
//		return err // says what of the place is not as it has to be
//	}
//	return d.Serve(ctx) // registers with kubelet; until ctx ends
//
// It knows nothing of identities: who in the pod gets which is decided by the
// agent when a process connects. Only kubelet speaks to it, over sockets in
// directories of root's, and it mounts nowhere but in a volume's place beneath
// kubelet's pods directory.
package csi

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/narthex-id/narthex/internal/watch"
)

// DriverName is the name that pods and the CSIDriver object use.
const DriverName = "csi.spiffe.io"

// Bounds of the CSI specification, "Size Limits", and of the kernel's paths.
const (
	maxString  = 128
	maxNodeID  = 256
	maxPath    = 4095
	maxEntries = 64 // attributes of one volume; 4 KiB in all
	maxMap     = 4 << 10
)

// Config says where the driver stands on its node. All paths are absolute, and
// the same for kubelet as for the driver.
type Config struct {
	DriverName      string       // default DriverName
	Version         string       // of this program, for kubelet
	NodeID          string       // names the node to whoever looks at its CSINode object; 1 to 256 bytes
	SocketDir       string       // what is mounted: the directory of the Workload API's socket
	KubeletDir      string       // kubelet's --root-dir: volumes are in pods, our socket in plugins/DriverName
	RegistrationDir string       // where kubelet looks for plugins; default KubeletDir/plugins_registry
	Log             hclog.Logger // nil: silent
}

// Driver serves kubelet. Make it with New, run it with Serve once.
type Driver struct {
	spec.UnimplementedIdentityServer
	spec.UnimplementedNodeServer
	registration.UnimplementedRegistrationServer

	cfg    Config
	pods   string // kubelet's directory of pods
	log    hclog.Logger
	attach func(source, target int) error // bind mounts; another in tests

	driver, registrar *door

	mounting sync.Mutex // one change of mounts at a time: kubelet repeats a call that it gave up waiting for

	mu    sync.Mutex // guards the following
	state error      // why kubelet has not registered us; nil once it has
}

var errUnregistered = errors.New("kubelet has not registered the driver yet")

// New checks the place and opens the sockets; nothing is answered before Serve.
// It fails where mounts could not be made, or would not be seen by pods.
func New(cfg Config) (*Driver, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	d := &Driver{cfg: cfg, pods: filepath.Join(cfg.KubeletDir, "pods"), log: cfg.Log, attach: bindMount, state: errUnregistered}
	if err := checkPlace(d.pods); err != nil {
		return nil, err
	}
	if err := d.open(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// complete fills in defaults and checks the rest.
func (c *Config) complete() error {
	if c.DriverName == "" {
		c.DriverName = DriverName
	}
	if c.RegistrationDir == "" {
		c.RegistrationDir = filepath.Join(c.KubeletDir, "plugins_registry")
	}
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	if err := checkName(c.DriverName); err != nil {
		return err
	}
	if c.NodeID == "" || len(c.NodeID) > maxNodeID {
		return fmt.Errorf("the node's name has %d bytes, want 1 to %d", len(c.NodeID), maxNodeID)
	}
	for _, dir := range []struct{ what, path string }{
		{"socket directory", c.SocketDir}, {"kubelet's directory", c.KubeletDir}, {"registration directory", c.RegistrationDir},
	} {
		if !filepath.IsAbs(dir.path) || filepath.Clean(dir.path) != dir.path || dir.path == "/" {
			return fmt.Errorf("%s %q: want an absolute path without . and .. and without a slash at its end, and not /", dir.what, dir.path)
		}
	}
	return nil
}

// checkName checks a driver's name: CSI, GetPluginInfo.
func checkName(name string) error {
	const alphanumeric = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	if n := len(name); n == 0 || n > 63 || strings.Trim(name, alphanumeric+"-.") != "" ||
		!strings.ContainsRune(alphanumeric, rune(name[0])) || !strings.ContainsRune(alphanumeric, rune(name[n-1])) {
		return fmt.Errorf("driver name %q: want 1 to 63 letters, digits, dashes and dots, with a letter or digit at both ends, as %s", name, DriverName)
	}
	return nil
}

// open makes both sockets. That of registration comes last: kubelet calls as
// soon as it is there.
func (d *Driver) open() (err error) {
	d.driver = &door{path: d.endpoint(), private: true, server: newServer(), log: d.log}
	d.registrar = &door{path: filepath.Join(d.cfg.RegistrationDir, d.cfg.DriverName+"-reg.sock"), server: newServer(), log: d.log}
	spec.RegisterIdentityServer(d.driver.server, d)
	spec.RegisterNodeServer(d.driver.server, d)
	registration.RegisterRegistrationServer(d.registrar.server, d)
	for _, door := range d.doors() {
		if err := door.open(); err != nil {
			return err
		}
	}
	return nil
}

func (d *Driver) doors() []*door { return []*door{d.driver, d.registrar} }

// endpoint is the path of the driver's own socket.
func (d *Driver) endpoint() string {
	return filepath.Join(d.cfg.KubeletDir, "plugins", d.cfg.DriverName, "csi.sock")
}

// Close removes the sockets, where they are still the driver's own. It is for a
// Driver that never serves: the end of Serve does the same.
func (d *Driver) Close() error {
	return errors.Join(d.registrar.close(), d.driver.close())
}

// Serve answers kubelet until ctx ends, and makes the sockets again when they
// are removed. It waits for calls under way, at most drainTimeout.
func (d *Driver) Serve(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, door := range d.doors() {
		door.serve(g)
	}
	g.Go(func() error {
		watch.Files(ctx, watch.Config{
			Paths:   func() []string { return []string{d.driver.path, d.registrar.path} },
			Changed: func() { d.reopen(g) },
			Log:     d.log,
		})
		// The registration goes first: kubelet stops to call.
		return errors.Join(d.registrar.close(), d.driver.close())
	})
	return g.Wait()
}

// reopen makes the sockets again that others have removed or replaced.
func (d *Driver) reopen(g *errgroup.Group) {
	for _, door := range d.doors() {
		if door.stands() {
			continue
		}
		if err := door.open(); err != nil {
			d.log.Error("the socket was removed and cannot be made again; trying on", "error", err)
			d.setState(err)
			continue
		}
		d.log.Warn("the socket was removed and is made again", "socket", door.path)
		if door == d.registrar {
			d.setState(errUnregistered)
		}
		door.serve(g)
	}
}

func (d *Driver) setState(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state = err
}

// Ready returns why the driver cannot do its work: kubelet has not registered
// it, or refused to. nil when it has.
func (d *Driver) Ready() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// Live returns an error when the driver can only be mended by being started
// again: a directory that its container was given is gone from the host, and
// one that took its place is not to be seen from inside.
func (d *Driver) Live() error {
	for _, dir := range []string{d.cfg.SocketDir, d.pods, d.cfg.RegistrationDir} {
		if gone := deleted(dir); gone != "" {
			return fmt.Errorf("%s was deleted on the host: what is there now is seen by a container that is started again", gone)
		}
	}
	return nil
}
