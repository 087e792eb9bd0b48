//go:build integration

// Package spire_test runs the narthex binary against a real SPIRE Server and
// beside a real spire-agent.
//
//	NARTHEX_TOOLS=$(integration/tools/install.sh spire) go test -tags integration ./integration/spire/
//
// Each test has servers, nodes and folders of its own. Read one as a story: a
// server (server_test.go), nodes that run narthex (node_test.go), the service
// behind them and those who call it (traffic_test.go); every process is a
// stage.Process, ended by its pid. What the parts of the product do
// by themselves is tested in their own packages.
package spire_test

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// tools is the folder of spire-server and spire-agent, grpcjs that of gRPC for
// Node. TestMain sets them.
var tools, grpcjs string

// proxyUser is whom the proxy becomes, and otherProxyUser where a test wants
// two: accounts that every Debian has.
var (
	proxyUser      = user{"daemon", 1}
	otherProxyUser = user{"bin", 2}
)

type user struct {
	name string
	uid  int
}

func (u user) selector() string { return fmt.Sprintf("unix:uid:%d", u.uid) }

// as runs a process as u.
func as(u user) func(*exec.Cmd) { return stage.As(u.uid, u.uid) }

func TestMain(m *testing.M) {
	os.Exit(stage.Main(m, 4, func() (err error) {
		if tools, err = stage.Tools("spire", "NARTHEX_TOOLS", "spire-server", "spire-agent"); err != nil {
			return err
		}
		grpcjs, err = stage.Tools("grpcjs", "NARTHEX_GRPCJS", "node_modules")
		return err
	}))
}
