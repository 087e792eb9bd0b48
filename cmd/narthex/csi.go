package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/csi"
	"github.com/narthex-id/narthex/internal/sandbox"
	"github.com/narthex-id/narthex/internal/telemetry/expose"
)

// csiOptions are the flags of `narthex csi`.
type csiOptions struct {
	driver              csi.Config
	health              string
	logLevel, logFormat string
}

func newCSI() *cobra.Command {
	var o csiOptions
	cmd := &cobra.Command{
		Use:   "csi",
		Short: "Run the CSI driver: mount the Workload API into pods",
		Long: `Mounts the directory of the Workload API's socket into pods that ask for it by an
ephemeral inline volume of csi.spiffe.io, read-only: no pod needs a hostPath.
It runs once on each node, as root in a privileged container with

  /var/lib/kubelet/pods                    mountPropagation: Bidirectional
  /var/lib/kubelet/plugins/csi.spiffe.io   its own socket
  /var/lib/kubelet/plugins_registry        where it registers with kubelet, itself
  /run/narthex                             what is mounted

all at the paths they have on the node. It has no configuration file, speaks to
nobody but kubelet, and gives up every privilege but to mount.`,
		Example: `  narthex csi --node-id worker-1
  narthex csi --kubelet-dir /var/snap/microk8s/common/var/lib/kubelet

In a pod:
  volumes:
    - name: spiffe
      csi: {driver: csi.spiffe.io, readOnly: true}`,
	}
	flags := cmd.Flags()
	flags.StringVar(&o.driver.SocketDir, "socket-dir", "/run/narthex/public", "directory to mount: that of the agent's Workload API socket; no symbolic links")
	flags.StringVar(&o.driver.KubeletDir, "kubelet-dir", "/var/lib/kubelet", "kubelet's --root-dir")
	flags.StringVar(&o.driver.RegistrationDir, "registration-dir", "", "where kubelet looks for plugins (default: plugins_registry in --kubelet-dir)")
	flags.StringVar(&o.driver.DriverName, "driver-name", csi.DriverName, "name of the driver, as in the CSIDriver object and in pods")
	flags.StringVar(&o.driver.NodeID, "node-id", "", "name of the node (default: $NODE_NAME, else the host's name)")
	flags.StringVar(&o.health, "health", ":9904", "host:port or unix:/path of /livez and /readyz; ready is who kubelet has registered; empty: none")
	flags.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&o.logFormat, "log-format", "text", "text or json")
	completeWords(cmd, "log-level", "debug", "info", "warn", "error")
	completeWords(cmd, "log-format", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := o.complete(); err != nil {
			return usageError{err}
		}
		return runCSI(cmd, o)
	}
	return cmd
}

// complete fills in what depends on the place, and checks what csi does not.
func (o *csiOptions) complete() error {
	if hclog.LevelFromString(o.logLevel) == hclog.NoLevel {
		return fmt.Errorf("--log-level %q: want debug, info, warn or error", o.logLevel)
	}
	if o.logFormat != "text" && o.logFormat != "json" {
		return fmt.Errorf("--log-format %q: want text or json", o.logFormat)
	}
	if o.driver.NodeID == "" {
		o.driver.NodeID = os.Getenv("NODE_NAME")
	}
	if o.driver.NodeID == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("no --node-id, and the host's name is not to be had: %w", err)
		}
		o.driver.NodeID = host
	}
	return nil
}

func runCSI(cmd *cobra.Command, o csiOptions) error {
	nameProcess("narthex-csi")
	log := newLogger("narthex.csi", config.Log{Level: o.logLevel, Format: o.logFormat})
	o.driver.Version, o.driver.Log = version, log
	d, err := csi.New(o.driver)
	if err != nil {
		return fmt.Errorf("start the CSI driver: %w", err)
	}
	health, err := expose.Listen(expose.Config{Health: o.health, Process: "csi", Ready: d.Ready, Live: d.Live, Log: log.Named("health")})
	if err != nil {
		return errors.Join(err, d.Close())
	}
	enterMountSandbox(log)
	log.Info("CSI driver starts", "version", version, "driver", o.driver.DriverName, "node", o.driver.NodeID, "mounts", o.driver.SocketDir)
	ctx, _, stop := untilSignal(cmd.Context(), nil)
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.Serve(ctx) })
	g.Go(func() error { return health.Serve(ctx) })
	err = g.Wait()
	log.Info("CSI driver has ended")
	return err
}

// enterMountSandbox leaves the process its mounts, and nothing else of what a
// privileged container has.
func enterMountSandbox(log hclog.Logger) {
	box := sandbox.Enter(sandbox.Config{Mounts: true})
	log.Info("sandboxed", "enforced", strings.Join(box.Enforced(), ", "))
	if missing := box.Missing(); len(missing) > 0 {
		log.Warn("the sandbox is not whole", "missing", strings.Join(missing, "; "))
	}
}
