package stage

import (
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// python is Debian's: its modules are Debian's packages.
const python = "/usr/bin/python3"

// modules is where Debian's packages put those for Node.
const modules = "/usr/share/nodejs"

// NodeScript runs a script of testdata, which finds the modules that are
// Debian's packages.
func NodeScript(t testing.TB, name, script string, args ...string) *Process {
	t.Helper()
	return Start(t, name, "env", append([]string{"NODE_PATH=" + modules, "node", Testdata(t, script)}, args...))
}

// PythonScript runs a script of testdata.
func PythonScript(t testing.TB, name, script string, args ...string) *Process {
	t.Helper()
	return Start(t, name, python, append([]string{Testdata(t, script)}, args...))
}

// Testdata returns the path of a file of the package's testdata.
func Testdata(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// On starts a server on a port of its own and waits until it listens.
func On(t testing.TB, start func(port string) *Process) (address string) {
	t.Helper()
	address = FreeAddress(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	Listens(t, start(port), address)
	return address
}

// Listens waits until a process accepts at address.
func Listens(t testing.TB, p *Process, address string) {
	t.Helper()
	Eventually(t, Soon, p.Name+" listens", func() error {
		if err := p.Alive(); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", address)
		if err == nil {
			_ = c.Close()
		}
		return err
	})
}

// Nginx starts one with this in its http block.
func Nginx(t testing.TB, text string) *Process {
	t.Helper()
	dir := Folder(t, "nginx")
	conf := filepath.Join(dir, "nginx.conf")
	WriteFile(t, conf, fmt.Sprintf(`daemon off; user root; worker_processes 1; pid %[1]s/pid; error_log stderr warn;
events { worker_connections 1000; }
http { access_log off; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; client_max_body_size 0;
%[2]s }
`, dir, text), 0o644)
	return Start(t, "nginx", "nginx", []string{"-c", conf, "-p", dir, "-e", "stderr"})
}

// HAProxy starts one with this behind its global section.
func HAProxy(t testing.TB, text string) *Process {
	t.Helper()
	conf := filepath.Join(Folder(t, "haproxy"), "haproxy.cfg")
	WriteFile(t, conf, "global\n  maxconn 1000\n"+text, 0o644)
	return Start(t, "haproxy", "haproxy", []string{"-db", "-f", conf})
}

// Serve answers each connection with handle, which need not close it, and
// returns the address.
func Serve(t testing.TB, handle func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var g sync.WaitGroup
	var mu sync.Mutex
	live := map[net.Conn]bool{}
	g.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			live[c] = true
			mu.Unlock()
			g.Go(func() {
				defer c.Close()
				handle(c)
				mu.Lock()
				delete(live, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range live {
			_ = c.Close()
		}
		mu.Unlock()
		g.Wait()
	})
	return l.Addr().String()
}
