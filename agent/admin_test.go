package agent_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/agent/endpoint"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// dialAdmin connects to the stage's admin socket.
func (s *stage) dialAdmin() *grpc.ClientConn {
	s.t.Helper()
	conn, err := grpc.NewClient("unix:"+s.cfg.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestAdminSocket(t *testing.T) {
	s := newStage(t, entry("/web", time.Hour))
	s.cfg.Socket, s.cfg.AdminSocket = filepath.Join(s.dir, "public", "api.sock"), filepath.Join(s.dir, "private", "admin.sock")
	a := s.mustNew()
	stop := s.runs(a)
	s.mustFetch()
	info, err := debugv1.NewDebugClient(s.dialAdmin()).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(info.SvidChain) < 2 || !strings.HasPrefix(info.SvidChain[0].GetId().GetPath(), "/spire/agent/join_token/") ||
		info.CachedX509SvidsCount != 1 || info.LastSyncSuccess == 0 {
		t.Errorf("got %v", info)
	}
	e, err := endpoint.Explain(t.Context(), s.dialAdmin(), int32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	if e.MatchedCount != 1 || !strings.HasSuffix(e.Matched[0].SPIFFEID, "/web") || !e.Server.Synced {
		t.Errorf("got %+v", e)
	}
	stop()
	if _, err := os.Lstat(s.cfg.AdminSocket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestAdminSocketIsRefused(t *testing.T) {
	s := newStage(t)
	s.cfg.Socket = filepath.Join(s.dir, "public", "api.sock")
	s.cfg.AdminSocket = filepath.Join(s.dir, "public", "private", "admin.sock")
	if _, err := agent.New(s.cfg); err == nil || !strings.Contains(err.Error(), "shown to workloads") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(s.cfg.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the Workload API's socket is left behind: %v", err)
	}
}

// TestAdminSuccession hands the admin socket over: nobody who asks is refused.
func TestAdminSuccession(t *testing.T) {
	s := newStage(t, entry("/web", time.Hour))
	s.cfg.Socket, s.cfg.AdminSocket = filepath.Join(s.dir, "public", "api.sock"), filepath.Join(s.dir, "private", "admin.sock")
	a := s.mustNew()
	stopOld := s.runs(a)
	s.mustFetch()
	l, owned := a.AdminSocket()
	if !owned {
		t.Error("the admin socket's file is not the agent's own")
	}
	s.cfg.Inherit, s.cfg.AdminInherit, s.cfg.Metrics = handed(t, a), copied(t, l), telemetry.NewMetrics()
	next, err := agent.Successor(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := next.CouldBegin(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.LetGo(t.Context(), agent.Given{WorkloadAPI: true, Admin: true}); err != nil {
		t.Fatal(err)
	}
	asked := make(chan error, 1)
	client := loggerv1.NewLoggerClient(s.dialAdmin())
	go func() { // in the listen queue, as nobody accepts
		_, err := client.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
		asked <- err
	}()
	if err := next.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	stopNext := s.runs(next)
	next.WaitReady(t.Context())
	if err := next.OwnSockets(); err != nil {
		t.Fatal(err)
	}
	if err := <-asked; err != nil {
		t.Errorf("who asked meanwhile: %v", err)
	}
	stopOld()
	if _, err := client.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{}); err != nil {
		t.Errorf("who asks the next agent: %v", err)
	}
	stopNext()
	if _, err := os.Lstat(s.cfg.AdminSocket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

// copied is a listener as another process would get it.
func copied(t *testing.T, l net.Listener) net.Listener {
	t.Helper()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	other, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	return other
}
