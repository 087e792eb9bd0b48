//go:build integration

package http_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// python is Debian's: its modules are Debian's packages.
const python = "/usr/bin/python3"

// nodeScript lets scripts find the modules that are Debian's packages.
func nodeScript(t *testing.T, name, script string, args ...string) *stage.Process {
	t.Helper()
	return stage.Start(t, name, "env", append([]string{"NODE_PATH=/usr/share/nodejs", "node", testdata(t, script)}, args...))
}

func pythonScript(t *testing.T, name, script string, args ...string) *stage.Process {
	t.Helper()
	return stage.Start(t, name, python, append([]string{testdata(t, script)}, args...))
}

// testdata returns the path of a file there.
func testdata(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// servers are the services that stand behind the proxies. Each gives out
// /bytes/SIZE and keeps what is put to /store/NAME.
var servers = []struct {
	name  string
	start func(t *testing.T) (address string)
}{
	{"go", func(t *testing.T) string { return newService(t).address }},
	{"nginx", nginxServer},
	{"node", nodeServer},
	{"python", func(t *testing.T) string {
		return on(t, func(port string) *stage.Process { return pythonScript(t, "python http.server", "server.py", port) })
	}},
}

func nodeServer(t *testing.T) string {
	return on(t, func(port string) *stage.Process { return nodeScript(t, "node server", "server.js", port) })
}

func nginxServer(t *testing.T) string {
	t.Helper()
	root := stage.Folder(t, "nginx-root")
	for _, size := range []int{0, 1 << 10, 1 << 20} {
		if err := os.MkdirAll(filepath.Join(root, "bytes"), 0o755); err != nil {
			t.Fatal(err)
		}
		stage.WriteFile(t, filepath.Join(root, "bytes", fmt.Sprint(size)), string(pattern(size)), 0o644)
	}
	address := stage.FreeAddress(t)
	p := nginx(t, fmt.Sprintf("server { listen %s; root %s; location /store { dav_methods PUT; create_full_put_path on; } }", address, root))
	listens(t, p, address)
	return address
}

// on starts a server on a port of its own and waits until it listens.
func on(t *testing.T, start func(port string) *stage.Process) (address string) {
	t.Helper()
	address = stage.FreeAddress(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	listens(t, start(port), address)
	return address
}
