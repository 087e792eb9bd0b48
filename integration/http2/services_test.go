//go:build integration

package http2_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/pattern"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// services stand at the ends of the ways. Each gives out /bytes/SIZE and keeps
// what is put to /store/NAME.
var services = []struct {
	name  string
	start func(t *testing.T) far
	old   bool // it speaks HTTP/1.1 alone
}{
	{name: "go", start: func(t *testing.T) far { return far{address: mesh.NewService(t).Address} }},
	{name: "go by HTTP/2", start: func(t *testing.T) far { return far{address: mesh.NewService(t).Address, all: true} }},
	{name: "node", start: nodeService},
	{name: "nginx", start: nginxService},
	{name: "python by HTTP/1.1", start: pythonService, old: true},
}

func nodeService(t *testing.T) far {
	t.Helper()
	start := func(t *testing.T, files ...string) string {
		return stage.On(t, func(port string) *stage.Process {
			return stage.NodeScript(t, "node server", "server.js", append([]string{port}, files...)...)
		})
	}
	return far{all: true, address: start(t), secure: func(t *testing.T, own *mesh.SVID) string {
		return start(t, own.CertFile, own.KeyFile, own.CA.Bundle)
	}}
}

func nginxService(t *testing.T) far {
	t.Helper()
	root := stage.Folder(t, "nginx-root")
	for _, size := range []int{0, 1 << 10, 1 << 20} {
		if err := os.MkdirAll(filepath.Join(root, "bytes"), 0o755); err != nil {
			t.Fatal(err)
		}
		stage.WriteFile(t, filepath.Join(root, "bytes", fmt.Sprint(size)), string(pattern.Bytes(size)), 0o644)
	}
	start := func(t *testing.T, listen string) string {
		address := stage.FreeAddress(t)
		p := stage.Nginx(t, fmt.Sprintf("server { listen %s http2 %s; root %s; location /store { dav_methods PUT; create_full_put_path on; } }", address, listen, root))
		stage.Listens(t, p, address)
		return address
	}
	return far{all: true, address: start(t, ""), secure: func(t *testing.T, own *mesh.SVID) string {
		return start(t, fmt.Sprintf("ssl; ssl_certificate %s; ssl_certificate_key %s; ssl_client_certificate %s; ssl_verify_client on", own.CertFile, own.KeyFile, own.CA.Bundle))
	}}
}

func pythonService(t *testing.T) far {
	t.Helper()
	return far{speaks: []string{"http/1.1"}, address: stage.On(t, func(port string) *stage.Process {
		return stage.PythonScript(t, "python http.server", "../../http/testdata/server.py", port)
	})}
}
