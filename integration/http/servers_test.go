//go:build integration

package http_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/pattern"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// servers are the services that stand behind the proxies. Each gives out
// /bytes/SIZE and keeps what is put to /store/NAME.
var servers = []struct {
	name  string
	start func(t *testing.T) (address string)
}{
	{"go", func(t *testing.T) string { return mesh.NewService(t).Address }},
	{"nginx", nginxServer},
	{"node", nodeServer},
	{"python", func(t *testing.T) string {
		return stage.On(t, func(port string) *stage.Process {
			return stage.PythonScript(t, "python http.server", "server.py", port)
		})
	}},
}

func nodeServer(t *testing.T) string {
	return stage.On(t, func(port string) *stage.Process { return stage.NodeScript(t, "node server", "server.js", port) })
}

func nginxServer(t *testing.T) string {
	t.Helper()
	root := stage.Folder(t, "nginx-root")
	for _, size := range []int{0, 1 << 10, 1 << 20} {
		if err := os.MkdirAll(filepath.Join(root, "bytes"), 0o755); err != nil {
			t.Fatal(err)
		}
		stage.WriteFile(t, filepath.Join(root, "bytes", fmt.Sprint(size)), string(pattern.Bytes(size)), 0o644)
	}
	address := stage.FreeAddress(t)
	p := stage.Nginx(t, fmt.Sprintf("server { listen %s; root %s; location /store { dav_methods PUT; create_full_put_path on; } }", address, root))
	stage.Listens(t, p, address)
	return address
}
