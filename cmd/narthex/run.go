package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/config"
)

func newRun() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run -c narthex.yaml",
		Short: "Run agent and proxy of one host, as two processes",
		Long: `Runs both halves of a host as two processes under one small supervisor: the
agent with the privileges it was started with, the proxy as the user that
proxy.user names. Neither ends when the other does; one that ends is started
again. SIGHUP reloads, SIGTERM drains, a second SIGTERM ends at once.`,
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
		return runHalves(cmd.Context(), c, *path)
	}
	return cmd
}

// runHalves supervises the two processes until a signal ends them: the proxy
// first, which may need the agent while it drains, then the agent.
func runHalves(parent context.Context, c *config.Config, path string) error {
	log := newLogger("narthex", c.Log)
	u, err := proxyAccount(c)
	if err != nil {
		return err
	}
	private, status, err := statusSocket(u)
	if err != nil {
		return err
	}
	defer os.RemoveAll(filepath.Dir(private))
	defer status.Close()

	agent := &child{name: "agent", args: []string{"agent", "-c", path, "--half"}, sockets: map[string]*os.File{statusSocketName: status}}
	proxy := &child{name: "proxy", args: []string{"proxy", "-c", path, "--other", private}, user: u, low: needsLowPort(c)}

	ctx, hangups, stop := untilSignal(parent)
	defer stop()
	return superviseHalves(ctx, parent, agent, proxy, hangups, log)
}

func superviseHalves(ctx, kill context.Context, agent, proxy *child, hangups <-chan os.Signal, log hclog.Logger) error {
	ctx, fail := context.WithCancel(ctx)
	defer fail()
	// The agent's context ends only when the proxy is gone.
	agentCtx, proxyGone := context.WithCancel(context.WithoutCancel(ctx))
	defer proxyGone()

	tellAgent, tellProxy := make(chan struct{}), make(chan struct{})
	var halves, relay sync.WaitGroup
	over := make(chan struct{})
	relay.Go(func() {
		for {
			select {
			case <-over:
				return
			case <-hangups:
				for _, tell := range []chan struct{}{tellAgent, tellProxy} {
					select {
					case tell <- struct{}{}:
					case <-over:
						return
					case <-ctx.Done():
					}
				}
			}
		}
	})
	var agentErr, proxyErr error
	halves.Go(func() {
		agentErr = agent.keepRunning(agentCtx, kill, tellAgent, log)
		fail()
	})
	halves.Go(func() {
		proxyErr = proxy.keepRunning(ctx, kill, tellProxy, log)
		proxyGone()
		fail()
	})
	halves.Wait()
	close(over)
	relay.Wait()
	return errors.Join(agentErr, proxyErr)
}

// proxyAccount decides whom the proxy becomes. A proxy that parses what
// strangers send does not run as root.
func proxyAccount(c *config.Config) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	if c.Proxy.User == "" {
		return nil, errors.New("proxy.user is not set: started as root, `narthex run` needs a user without privileges for the proxy; " +
			"make one with `useradd --system --no-create-home narthex` and set proxy.user: narthex")
	}
	u, err := lookupAccount(c.Proxy.User)
	if err != nil {
		return nil, fmt.Errorf("proxy.user: %w", err)
	}
	if u.uid == 0 {
		return nil, errors.New("proxy.user: the proxy must not run as root: name a user without privileges")
	}
	return u, nil
}

// Names of inherited sockets that are no listener's: no listener can have
// them. On the status socket the agent shows its figures to the proxy, which
// shows both.
const (
	statusSocketName    = "@status"
	telemetrySocketName = "@telemetry"
)

// statusSocket makes that socket, in a directory that only the proxy's user
// can enter. It returns the socket's path and its listening descriptor.
func statusSocket(u *account) (string, *os.File, error) {
	dir, err := os.MkdirTemp("", "narthex-run-")
	if err != nil {
		return "", nil, fmt.Errorf("make a private directory: %w", err)
	}
	path := filepath.Join(dir, "agent.sock")
	f, err := listenPrivate(path)
	if err == nil && u != nil {
		err = errors.Join(os.Chown(path, int(u.uid), int(u.gid)), os.Chown(dir, int(u.uid), int(u.gid)))
	}
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("make the private status socket: %w", err), os.RemoveAll(dir))
	}
	return path, f, nil
}

// listenPrivate listens on a Unix socket for a child to accept on.
func listenPrivate(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}

// needsLowPort reports whether a listener binds a port below 1024.
func needsLowPort(c *config.Config) bool {
	for i := range c.Proxy.Listeners {
		if port := c.Proxy.Listeners[i].Bind.Port(); port > 0 && port < 1024 {
			return true
		}
	}
	return false
}
