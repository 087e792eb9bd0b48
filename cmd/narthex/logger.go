package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
)

// logLevels are the levels that log.level knows.
var logLevels = []string{"trace", "debug", "info", "warn", "error"}

func newLevel() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "logger",
		Short: "Show or change the log level of a running agent",
		Long: `Shows or changes the least level that a running agent logs, until it ends or
its place is taken; log.level in its configuration stays what it is. It asks at the
admin socket (agent.admin).`,
		Example: `  narthex logger get
  narthex logger set debug -c /etc/narthex/narthex.yaml
  narthex logger reset`,
		RunE: whichCommand,
	}
	where := adminFlags(cmd)
	add := func(sub *cobra.Command, ask func(context.Context, loggerv1.LoggerClient, []string) (*types.Logger, error)) {
		sub.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && !slices.Contains(logLevels, args[0]) {
				return usageError{fmt.Errorf("level %q: want one of %s", args[0], strings.Join(logLevels, ", "))}
			}
			return where.ask(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				now, err := ask(ctx, loggerv1.NewLoggerClient(conn), args)
				if err != nil {
					return err
				}
				return printLevels(cmd.OutOrStdout(), now)
			})
		}
		cmd.AddCommand(sub)
	}
	add(&cobra.Command{Use: "get", Short: "Show the level", Example: "  narthex logger get"},
		func(ctx context.Context, c loggerv1.LoggerClient, _ []string) (*types.Logger, error) {
			return c.GetLogger(ctx, &loggerv1.GetLoggerRequest{})
		})
	add(&cobra.Command{
		Use: "set LEVEL", Short: "Change the level: " + strings.Join(logLevels, ", "), Example: "  narthex logger set debug",
		Args: oneArg("no level: want one of " + strings.Join(logLevels, ", ")), ValidArgs: logLevels,
	}, func(ctx context.Context, c loggerv1.LoggerClient, args []string) (*types.Logger, error) {
		level := types.LogLevel(types.LogLevel_value[strings.ToUpper(args[0])])
		return c.SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: level})
	})
	add(&cobra.Command{Use: "reset", Short: "Go back to the level the agent started with", Example: "  narthex logger reset"},
		func(ctx context.Context, c loggerv1.LoggerClient, _ []string) (*types.Logger, error) {
			return c.ResetLogLevel(ctx, &loggerv1.ResetLogLevelRequest{})
		})
	return cmd
}

func printLevels(w io.Writer, l *types.Logger) error {
	_, err := fmt.Fprintf(w, "level %s, at start %s\n", strings.ToLower(l.GetCurrentLevel().String()), strings.ToLower(l.GetLaunchLevel().String()))
	return err
}
