package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/grpctext"
)

// defaultAdmin is where explain and logger ask when nobody says otherwise, and
// adminEnv names the variable that may.
const (
	defaultAdmin = "/run/narthex/private/admin.sock"
	adminEnv     = "NARTHEX_ADMIN_SOCKET"
)

// adminTime bounds a question to the agent, attestation included.
const adminTime = 20 * time.Second

// admin finds the admin socket of a running agent.
type admin struct{ socket, config *string }

func adminFlags(cmd *cobra.Command) admin {
	return admin{
		socket: cmd.PersistentFlags().String("admin-socket", "", "the agent's admin socket (default $"+adminEnv+", or "+defaultAdmin+")"),
		config: cmd.PersistentFlags().StringP("config", "c", "", "read agent.admin.socket from this narthex.yaml"),
	}
}

func (a admin) path() (string, error) {
	if *a.socket != "" || *a.config == "" {
		path := cmp.Or(*a.socket, os.Getenv(adminEnv), defaultAdmin)
		return strings.TrimPrefix(strings.TrimPrefix(path, "unix:"), "//"), nil
	}
	c, err := config.Load(*a.config)
	if err != nil {
		return "", err
	}
	if err := c.ForAgent(); err != nil {
		return "", err
	}
	if c.Agent.Admin == nil {
		return "", fmt.Errorf("%s: agent.admin is not set, so there is nobody to ask; write for example agent: {admin: {socket: %s}} and restart the agent", *a.config, defaultAdmin)
	}
	return string(c.Agent.Admin.Socket), nil
}

// ask connects to the agent and has f ask it.
func (a admin) ask(ctx context.Context, f func(context.Context, *grpc.ClientConn) error) error {
	path, err := a.path()
	if err != nil {
		return err
	}
	// Not gRPC's own dialer: its errors do not tell a socket that is missing from
	// one that may not be opened.
	info, err := os.Stat(path)
	switch {
	case os.IsNotExist(err):
		return fmt.Errorf("no agent has its admin socket at %s: is it running, and is agent.admin set? (-c narthex.yaml or --admin-socket says where to ask)", path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("ask the agent: %w; ask as root, or as the agent's user", err)
	case err != nil:
		return fmt.Errorf("ask the agent: %w", err)
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("ask the agent: %s is not a socket", path)
	}
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}))
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, adminTime)
	defer cancel()
	err = f(ctx, conn)
	if status.Code(err) == codes.Unimplemented {
		return fmt.Errorf("ask the agent: %s is not an admin socket of Narthex: %s; is it the Workload API's, or another agent's?", path, status.Convert(err).Message())
	}
	if s, ok := status.FromError(err); ok && err != nil {
		return fmt.Errorf("ask the agent at %s: %s", path, grpctext.Message(s.Message()))
	}
	return err
}
