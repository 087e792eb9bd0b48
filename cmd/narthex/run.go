package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/sandbox"
)

func newRun() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run -c narthex.yaml",
		Short: "Run agent and proxy of one host, as two processes",
		Long: `Runs both halves of a host as two processes under one small supervisor: the
agent with the privileges it was started with, the proxy as the user that
proxy.user names. Neither ends when the other does; one that ends is started
again. SIGHUP reloads, SIGTERM drains, a second SIGTERM ends at once. SIGUSR2 goes
on with the program that is at this one's path by then, without losing a
connection.`,
		Example: `  narthex check -c /etc/narthex/narthex.yaml && narthex run -c /etc/narthex/narthex.yaml`,
	}
	path := configFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(*path)
		if err != nil {
			return err
		}
		if err := c.ForRun(); err != nil {
			return err
		}
		if err := requireFIPS(c); err != nil {
			return err
		}
		return runHalves(cmd.Context(), c, *path)
	}
	return cmd
}

// runHalves supervises the two processes until a signal ends them: the proxy
// first, which may need the agent while it drains, then the agent.
func runHalves(parent context.Context, c *config.Config, path string) error {
	log := newLogger("narthex", c.Log)
	if err := keepFilesToOurselves(); err != nil {
		return err
	}
	u, err := proxyAccount(c)
	if err != nil {
		return fmt.Errorf("proxy.user: %w", err)
	}
	if u != nil {
		// Not where another user started it: file capabilities of the
		// executable may be what gives the agent its rights.
		if err := sandbox.NoNewPrivs(); err != nil {
			return err
		}
	} else {
		log.Warn("not started by root: the proxy runs as the agent's user, so whoever takes over the proxy can read the agent's keys; proxy.user is not used")
	}
	status, peer, err := privateSocket("unix", u)
	if err != nil {
		return err
	}
	defer status.Close()
	defer peer.Close()

	kill, killNow := context.WithCancel(context.WithoutCancel(parent))
	defer killNow()
	ctx, hangups, stop := untilSignal(parent, func() {
		log.Warn("second signal: ending at once")
		killNow()
	})
	defer stop()
	v, err := newSupervisor(c, path, u, log)
	if err != nil {
		return err
	}
	defer v.close()
	if dir, err := lendProxyDir(c, u); err != nil {
		log.Warn("the proxy does not keep the rules in force, so a restart with rule files that cannot be used fails", "error", err)
	} else {
		defer dir.Close()
		v.proxy.files[proxyDirName] = dir
	}
	v.agent.files[statusSocketName] = status
	v.proxy.files[statusPeerName] = peer
	return v.run(ctx, kill, hangups)
}

var (
	errNoProxyUser = errors.New("not set: started as root, `narthex run` needs a user without privileges for the proxy; " +
		"make one with `useradd --system --no-create-home narthex` and set proxy.user: narthex")
	errProxyIsRoot = errors.New("the proxy must not run as root: name a user without privileges")
)

// proxyAccount decides whom the proxy becomes. A proxy that parses what
// strangers send does not run as root.
func proxyAccount(c *config.Config) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	if c.Proxy.User == "" {
		return nil, errNoProxyUser
	}
	u, err := lookupAccount(c.Proxy.User)
	if err != nil {
		return nil, err
	}
	if u.uid == 0 {
		return nil, errProxyIsRoot
	}
	return u, nil
}

// privateSocket makes a Unix socket that nobody can reach but a process that
// is handed peer: its name is gone when this returns. The first file listens;
// the second is what the user connects through.
func privateSocket(network string, u *account) (listen, peer *os.File, err error) {
	dir, err := os.MkdirTemp("", "narthex-")
	if err != nil {
		return nil, nil, fmt.Errorf("make a private directory: %w; set TMPDIR to a directory you can write", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path := filepath.Join(dir, "s")
	if len(path) > 107 {
		return nil, nil, fmt.Errorf("make a private socket: %s is longer than the 107 bytes a socket's path can have; set TMPDIR to a shorter one", path)
	}
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		return nil, nil, fmt.Errorf("make a private socket: %w", err)
	}
	defer func() { _ = l.Close() }()
	l.SetUnlinkOnClose(false)
	if u != nil {
		if err := os.Chown(path, int(u.uid), int(u.gid)); err != nil {
			return nil, nil, fmt.Errorf("make a private socket: %w", err)
		}
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a private socket: %w", err)
	}
	peer = os.NewFile(uintptr(fd), path)
	if listen, err = l.File(); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make a private socket: %w", err), peer.Close())
	}
	return listen, peer, nil
}

// needsLowPort reports whether the proxy binds a port below 1024.
func needsLowPort(c *config.Config) bool {
	low := func(bind config.Address) bool { return bind.Port() > 0 && bind.Port() < 1024 }
	return slices.ContainsFunc(c.Proxy.Listeners, func(l config.Listener) bool { return low(l.Bind) }) ||
		slices.ContainsFunc(c.Proxy.ExtAuthz, func(e config.ExtAuthz) bool { return low(e.Bind) })
}
