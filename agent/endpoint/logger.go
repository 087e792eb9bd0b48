package endpoint

import (
	"context"

	"github.com/hashicorp/go-hclog"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// levels tells and changes the least level that the agent logs:
// spire.api.agent.logger.v1.
type levels struct {
	loggerv1.UnimplementedLoggerServer
	log    hclog.Logger
	launch hclog.Level
}

func newLevels(log hclog.Logger) *levels { return &levels{log: log, launch: log.GetLevel()} }

// GetLogger returns the level now and the one at launch.
func (l *levels) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return &types.Logger{CurrentLevel: levelOf(l.log.GetLevel()), LaunchLevel: levelOf(l.launch)}, nil
}

// SetLogLevel changes the level until the agent ends. There is nothing above
// ERROR here: FATAL and PANIC are ERROR.
func (l *levels) SetLogLevel(ctx context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	level, ok := map[types.LogLevel]hclog.Level{
		types.LogLevel_TRACE: hclog.Trace, types.LogLevel_DEBUG: hclog.Debug, types.LogLevel_INFO: hclog.Info,
		types.LogLevel_WARN: hclog.Warn, types.LogLevel_ERROR: hclog.Error,
		types.LogLevel_FATAL: hclog.Error, types.LogLevel_PANIC: hclog.Error,
	}[req.GetNewLevel()]
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "log level %d is not known: want one from PANIC (1) to TRACE (7)", req.GetNewLevel())
	}
	l.set(ctx, level)
	return l.GetLogger(ctx, nil)
}

// ResetLogLevel goes back to the level at launch.
func (l *levels) ResetLogLevel(ctx context.Context, _ *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	l.set(ctx, l.launch)
	return l.GetLogger(ctx, nil)
}

// set says so in the log, whatever its level: who reads it later should know why
// lines are missing.
func (l *levels) set(ctx context.Context, level hclog.Level) {
	l.log.SetLevel(level)
	c := connOf(ctx)
	l.log.Log(max(level, hclog.Info), "the log's level was changed", "level", level.String(), "at_launch", l.launch.String(), "pid", c.process.PID, "uid", c.process.UID)
}

func levelOf(level hclog.Level) types.LogLevel {
	switch level {
	case hclog.Trace:
		return types.LogLevel_TRACE
	case hclog.Debug:
		return types.LogLevel_DEBUG
	case hclog.Warn:
		return types.LogLevel_WARN
	case hclog.Error, hclog.Off:
		return types.LogLevel_ERROR
	case hclog.Info, hclog.NoLevel:
	}
	return types.LogLevel_INFO
}
