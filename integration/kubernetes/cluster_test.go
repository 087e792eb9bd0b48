//go:build integration

package kubernetes_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// ready bounds what kubelet takes seconds for on an idle machine: to start
// pods, to end them, to bring a changed ConfigMap into its volume.
const ready = 2 * time.Minute

// cluster is the Kubernetes that the tests run on.
type cluster struct {
	own    bool   // a node on this machine, not a cluster of the user's
	state  string // folder of our own node
	images images

	wanted   context.Context // until down: what still boots the node ends then
	unwanted context.CancelFunc
	booting  sync.Mutex // held while the node boots

	mu    sync.Mutex // guards the following
	proxy *exec.Cmd  // kubectl proxy, the way to the API server
	api   *http.Client
}

// newCluster returns our own node, which is to be booted. A cluster of the
// user's is taken only where images are named too: many have KUBECONFIG set
// and mean nothing by it.
func newCluster() *cluster {
	c := &cluster{own: os.Getenv("KUBECONFIG") == "" || os.Getenv("NARTHEX_IMAGE") == ""}
	c.wanted, c.unwanted = context.WithCancel(context.Background())
	return c
}

// up boots the node, or looks whether the user's cluster answers, and brings
// the images there.
func (c *cluster) up() error {
	stage.WhenInterrupted(c.down)
	if c.own {
		var err error // not in Scratch, which is gone before the node is
		if c.state, err = os.MkdirTemp("", "nx-node-"); err != nil {
			return err
		}
		if err := c.boot(); err != nil {
			return err
		}
	}
	if err := c.connect(); err != nil {
		return err
	}
	return c.images.prepare(c)
}

// down ends our node. What the tests made in a cluster of the user's goes
// with their namespaces.
func (c *cluster) down() {
	c.unwanted()
	c.booting.Lock()
	defer c.booting.Unlock()
	c.disconnect()
	if c.state != "" {
		if err := script("down.sh", c.state); err != nil {
			fmt.Fprintln(os.Stderr, "end the node:", err)
		}
	}
}

// reboot ends every process of our node and boots it again, with what is on
// its disk.
func (c *cluster) reboot(t *testing.T) {
	t.Helper()
	c.disconnect()
	if err := script("down.sh", "--keep", c.state); err != nil {
		t.Fatal(err)
	}
	if err := c.boot(); err != nil {
		t.Fatal(err)
	}
	if err := c.connect(); err != nil {
		t.Fatal(err)
	}
}

// script runs one of the scripts of cluster/.
func script(args ...string) error {
	return scriptUntil(context.Background(), args...)
}

// scriptUntil ends the script when ctx is done.
func scriptUntil(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join("cluster", args[0]), args[1:]...)
	// A group of its own: what the terminal sends is for us to answer.
	cmd.SysProcAttr = ownGroup
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("cluster/%s: %w\n%s", args[0], err, out)
	}
	return nil
}

// boot boots our node. It goes down with our process, even if that is killed.
func (c *cluster) boot() error {
	c.booting.Lock()
	defer c.booting.Unlock()
	return scriptUntil(c.wanted, "up.sh", "--with", strconv.Itoa(os.Getpid()), c.state)
}

// command returns a command that runs on our node, or here for a cluster of
// the user's.
func (c *cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	if c.own {
		args = append([]string{filepath.Join("cluster", "node-exec"), c.state}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.SysProcAttr = ownGroup
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// connect starts kubectl proxy, through which most questions go: a process
// for each would take most of the time of the tests.
func (c *cluster) connect() error {
	socket := filepath.Join(stage.Scratch, "api.sock")
	_ = os.Remove(socket)
	c.mu.Lock()
	defer c.mu.Unlock()
	said, err := os.Create(filepath.Join(stage.Scratch, "kubectl-proxy.log"))
	if err != nil {
		return err
	}
	defer said.Close()
	c.proxy = c.command(context.Background(), "kubectl", "proxy", "--unix-socket="+socket, "--reject-methods=^$", "--reject-paths=^$")
	c.proxy.Stdout, c.proxy.Stderr = said, said
	if err := c.proxy.Start(); err != nil {
		return err
	}
	var dialer net.Dialer
	c.api = &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
	}}
	for deadline := time.Now().Add(stage.Soon); ; time.Sleep(20 * time.Millisecond) {
		resp, err := c.api.Get("http://localhost/readyz")
		if err == nil {
			_ = resp.Body.Close()
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("kubectl proxy, which writes to %s: %w", said.Name(), err)
		}
	}
}

func (c *cluster) disconnect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.proxy != nil {
		_ = syscall.Kill(-c.proxy.Process.Pid, syscall.SIGKILL) // the group: what node-exec runs is a child of it
		_ = c.proxy.Wait()
		c.proxy = nil
	}
}

// errNotFound is what get returns for objects that are not there.
var errNotFound = errors.New("not found")

// ask sends a request to the API server and returns its answer.
func (c *cluster) ask(ctx context.Context, method, path string, body any) ([]byte, error) {
	var sent io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		sent = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, sent)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	}
	c.mu.Lock()
	client := c.api
	c.mu.Unlock()
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return nil, err
	case resp.StatusCode == http.StatusNotFound:
		return nil, fmt.Errorf("%s: %w", path, errNotFound)
	case resp.StatusCode >= 300:
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text)
	}
	return text, nil
}

// get reads one object or a list.
func (c *cluster) get(path string, into any) error {
	text, err := c.ask(context.Background(), http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

// tryKubectl runs kubectl, with stdin for its input.
func (c *cluster) tryKubectl(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), ready+10*time.Second)
	defer cancel()
	cmd := c.command(ctx, append([]string{"kubectl"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out), err
}

// kubectl runs kubectl, which has to succeed.
func (c *cluster) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.tryKubectl("", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// apply applies manifests.
func (c *cluster) apply(t *testing.T, manifests string) {
	t.Helper()
	if out, err := c.tryKubectl(manifests, "apply", "--server-side", "--force-conflicts", "-f", "-"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// rolledOut waits until all pods of a workload are ready, as kubectl rollout
// status says.
func (c *cluster) rolledOut(t *testing.T, namespace string, objects ...string) {
	t.Helper()
	for _, o := range objects {
		c.kubectl(t, "-n", namespace, "rollout", "status", o, "--timeout="+ready.String())
	}
}
