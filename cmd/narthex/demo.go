package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"text/template"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/devserver"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// The demo's trust domain and how long its SVIDs live: short, so that a
// visitor sees them rotate.
const (
	demoDomain  = "demo.example"
	demoTTL     = time.Minute
	demoPatient = 20 * time.Second // for the first allowed call
	demoPage    = "127.0.0.1:9901" // where the status page is, if that is free
)

func newDemo() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See it work: two services behind mutual TLS, no root, no server, no configuration",
		Long: `Starts a development trust domain, an agent and three proxies, each a process
of its own, on loopback and in a temporary directory. The service "orders" reads
the stock of "inventory" through both their proxies, and may do nothing else
there; the service "reports", whom no rule allows, is refused. Nothing is left
behind when it ends.`,
		Example: `  narthex demo           until Ctrl-C: calls go on, SVIDs rotate
  narthex demo --once    ends after the first calls; exit 0 when both went as they should`,
	}
	once := cmd.Flags().Bool("once", false, "end after the first allowed and the first refused call")
	fips := cmd.Flags().Bool("fips", false, "run every process on Go's FIPS 140-3 module (fips: true)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, _, stop := untilSignal(cmd.Context(), nil)
		defer stop()
		d := &demo{out: cmd.OutOrStdout(), started: time.Now(), page: demoPage, fips: *fips}
		err := d.run(ctx, *once)
		if ctx.Err() != nil && !*once {
			return nil
		}
		return err
	}
	return cmd
}

// demo is one run of it.
type demo struct {
	out     io.Writer
	started time.Time
	dir     string
	page    string // host:port of the status page
	fips    bool

	domain    spiffeid.TrustDomain
	inventory *inventoryService
	records   *recordings

	status  [2]*os.File                 // where the agent shows its figures, and how inventory's proxy reaches them
	sockets map[string]*net.TCPListener // kept open until the children have them
}

func (d *demo) id(service string) spiffeid.ID {
	return spiffeid.RequireFromSegments(d.domain, service)
}

// run sets the stage, starts everything, shows the first calls and, unless
// once, goes on until ctx ends.
func (d *demo) run(parent context.Context, once bool) (err error) {
	if err := d.prepare(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	ctx, cancel := context.WithCancel(parent)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	server, err := d.devServer()
	if err != nil {
		return err
	}
	running.Go(func() {
		if err := server.Serve(ctx); err != nil && ctx.Err() == nil {
			fmt.Fprintln(d.out, "  the development server ended:", err)
		}
	})
	if err := d.writeFiles(server); err != nil {
		return err
	}
	running.Go(func() { d.inventory.serve(ctx) })

	failed := make(chan error, 4)
	for _, c := range d.children() {
		running.Go(func() {
			if err := c.run(ctx, context.WithoutCancel(ctx), nil); ctx.Err() == nil {
				failed <- fmt.Errorf("%s ended before its time: %w\n%s", c.name, err, d.logOf(c.name))
			}
		})
	}
	fmt.Fprintf(d.out, "narthex demo: all of it runs on loopback as you, in %s, and is gone when it ends.\n\n", d.dir)
	return d.show(ctx, failed, once)
}

// prepare makes the directory, the executables and the sockets.
func (d *demo) prepare() error {
	d.domain = spiffeid.RequireTrustDomainFromString(demoDomain)
	d.records = newRecordings()
	dir, err := os.MkdirTemp("", "narthex-demo-")
	if err != nil {
		return fmt.Errorf("make a directory for the demo: %w; set TMPDIR to a directory you can write", err)
	}
	// The agent tells processes apart by the path of their executable, and
	// the kernel shows that without symbolic links.
	if d.dir, err = filepath.EvalSymlinks(dir); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	err = func() error {
		for _, service := range demoServices {
			if err := linkSelf(d.path(service + "-proxy")); err != nil {
				return err
			}
		}
		d.sockets = map[string]*net.TCPListener{}
		for _, name := range []string{"inventory", "orders-to-inventory", "reports-to-inventory", telemetrySocketName} {
			addr := "127.0.0.1:0"
			if name == telemetrySocketName {
				addr = d.page
			}
			l, err := listenLoopback(addr)
			if err != nil {
				return err
			}
			d.sockets[name] = l
		}
		d.page = d.sockets[telemetrySocketName].Addr().String()
		if d.status[0], d.status[1], err = privateSocket("unix", nil); err != nil {
			return err
		}
		d.inventory, err = newInventoryService(d.path("inventory.sock"))
		return err
	}()
	if err != nil {
		return errors.Join(err, os.RemoveAll(d.dir))
	}
	return nil
}

var demoServices = []string{"orders", "inventory", "reports"}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// listenLoopback listens on addr, or on any free port when that is taken.
func listenLoopback(addr string) (*net.TCPListener, error) {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return nil, err
	}
	l, err := net.ListenTCP("tcp", a)
	if err != nil {
		l, err = net.ListenTCP("tcp", &net.TCPAddr{IP: a.IP})
	}
	if err != nil {
		return nil, fmt.Errorf("listen on loopback: %w", err)
	}
	return l, nil
}

// linkSelf gives this executable a second name. Where a hard link cannot be
// made (another file system), it is copied.
func linkSelf(path string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this executable: %w", err)
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return fmt.Errorf("find this executable: %w", err)
	}
	if os.Link(self, path) == nil {
		return nil
	}
	from, err := os.Open(self)
	if err != nil {
		return fmt.Errorf("copy this executable: %w", err)
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return fmt.Errorf("copy this executable: %w", err)
	}
	_, err = io.Copy(to, from)
	if err = errors.Join(err, to.Close()); err != nil {
		return fmt.Errorf("copy this executable: %w", err)
	}
	return nil
}

// devServer starts the development server with an entry for each proxy: this
// user, and the path of its executable.
func (d *demo) devServer() (*devserver.Server, error) {
	var entries []devserver.Entry
	for _, service := range demoServices {
		entries = append(entries, devserver.Entry{
			SPIFFEID: d.id(service),
			Selectors: []attestor.Selector{
				{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Geteuid())},
				{Type: "unix", Value: "path:" + d.path(service+"-proxy")},
			},
			TTL: demoTTL,
		})
	}
	return devserver.New(devserver.Config{
		TrustDomain: d.domain,
		Listen:      "127.0.0.1:0",
		SVIDTTL:     demoTTL,
		AgentTTL:    10 * time.Minute,
		Entries:     entries,
		Log:         hclog.NewNullLogger(), // the demo says itself that it is not for production
	})
}

// demoFiles are what an operator would write. Their names end as the files
// do; the rules are one file for both ends, and the one that reports' proxy
// reads shows why the far end decides for itself.
var demoFiles = map[string]string{
	"rules.yaml": `version: 1
rules:
  - id: orders-reads-inventory
    effect: allow
    from: ["spiffe://demo.example/orders"]
    to: ["spiffe://demo.example/inventory"]
    http: {methods: [GET], paths: ["/stock/{item}"]}
`,
	"reports-rules.yaml": `version: 1
rules:
  - id: anything-goes
    effect: allow
    from: ["spiffe://demo.example/**"]
    to: ["spiffe://demo.example/**"]
`,
	"agent.yaml": `trust_domain: demo.example
fips: {{.FIPS}}
data_dir: {{.Dir}}/agent
agent:
  server:
    address: {{.Server}}
    bundle: {file: {{.Dir}}/bundle.pem}
  node_attestor: {join_token: {token_file: {{.Dir}}/join-token}}
  workload_attestors: {unix: {discover_workload_path: true, workload_size_limit: -1}}
  workload_api: {socket: {{.Dir}}/public/api.sock}
  sync: {interval: 1s}
log: {level: warn}
`,
	"inventory.yaml": `trust_domain: demo.example
fips: {{.FIPS}}
data_dir: {{.Dir}}/inventory
proxy:
  workload_api: {socket: {{.Dir}}/public/api.sock}
  policies: [{{.Dir}}/rules.yaml]
  listeners:
    - name: inventory
      direction: inbound
      bind: {{.Inventory}}
      target: unix:{{.Dir}}/inventory.sock
      protocol: http
      identity_header: {name: x-spiffe-id}
telemetry: {listen: {{.Page}}}
log: {level: warn}
`,
	"orders.yaml": `trust_domain: demo.example
fips: {{.FIPS}}
data_dir: {{.Dir}}/orders
proxy:
  workload_api: {socket: {{.Dir}}/public/api.sock}
  policies: [{{.Dir}}/rules.yaml]
  listeners:
    - name: orders-to-inventory
      direction: outbound
      bind: {{.Orders}}
      target: {{.Inventory}}
      expect: ["spiffe://demo.example/inventory"]
      protocol: http
log: {level: warn}
`,
	"reports.yaml": `trust_domain: demo.example
fips: {{.FIPS}}
data_dir: {{.Dir}}/reports
proxy:
  workload_api: {socket: {{.Dir}}/public/api.sock}
  policies: [{{.Dir}}/reports-rules.yaml]
  listeners:
    - name: reports-to-inventory
      direction: outbound
      bind: {{.Reports}}
      target: {{.Inventory}}
      expect: ["spiffe://demo.example/inventory"]
log: {level: warn}
`,
}

func (d *demo) writeFiles(server *devserver.Server) error {
	values := map[string]string{
		"Dir": d.dir, "Server": server.Addr().String(), "Page": d.page, "FIPS": strconv.FormatBool(d.fips),
		"Inventory": d.addr("inventory"), "Orders": d.addr("orders-to-inventory"), "Reports": d.addr("reports-to-inventory"),
	}
	files := map[string]string{"join-token": server.JoinToken(), "bundle.pem": string(server.BundlePEM())}
	for name, text := range demoFiles {
		var b strings.Builder
		if err := template.Must(template.New(name).Parse(text)).Execute(&b, values); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		files[name] = b.String()
	}
	for name, text := range files {
		if err := os.WriteFile(d.path(name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

func (d *demo) addr(socket string) string { return d.sockets[socket].Addr().String() }

// children are the agent and a proxy for each service. Each proxy runs under
// the name the agent knows it by, and hands its access log to the demo.
func (d *demo) children() []*child {
	list := []*child{{
		name: "agent", args: []string{"agent", "-c", d.path("agent.yaml"), "--half"},
		files:  map[string]*os.File{statusSocketName: d.status[0]},
		stderr: d.logFile("agent"),
	}}
	for _, service := range demoServices {
		listener := service + "-to-inventory"
		if service == "inventory" {
			listener = service
		}
		c := &child{
			name: service + "-proxy", binary: d.path(service + "-proxy"),
			args:   []string{"proxy", "-c", d.path(service + ".yaml")},
			files:  map[string]*os.File{listener: d.file(listener)},
			stdout: &recorder{to: d.records},
			stderr: d.logFile(service + "-proxy"),
		}
		if service == "inventory" {
			c.files[statusPeerName] = d.status[1]
			c.files[telemetrySocketName] = d.file(telemetrySocketName)
		}
		list = append(list, c)
	}
	return list
}

// file returns the descriptor of a socket, for a child. The listener itself
// is closed: from here on the child alone accepts.
func (d *demo) file(socket string) *os.File {
	l := d.sockets[socket]
	f, err := l.File()
	if err != nil { // cannot happen for an open listener
		panic(err)
	}
	_ = l.Close()
	return f
}

func (d *demo) logFile(name string) io.Writer {
	f, err := os.OpenFile(d.path(name+".log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return io.Discard
	}
	return f
}

func (d *demo) logOf(name string) string {
	text, err := os.ReadFile(d.path(name + ".log"))
	if err != nil {
		return ""
	}
	return string(text)
}

// recordings collects the access records that the proxies write.
type recordings struct {
	mu   sync.Mutex // guards the following
	list []telemetry.Access
	more chan struct{} // closed when list grows
}

func newRecordings() *recordings { return &recordings{more: make(chan struct{})} }

// recorder is the standard output of one proxy.
type recorder struct {
	to   *recordings
	line []byte
}

// Write implements io.Writer. What is no access record is passed over.
func (r *recorder) Write(p []byte) (int, error) {
	for _, b := range p {
		if r.line = append(r.line, b); b == '\n' {
			var a telemetry.Access
			if a.UnmarshalJSON(r.line) == nil {
				r.to.add(a)
			}
			r.line = r.line[:0]
		}
	}
	return len(p), nil
}

// kept bounds the records in memory: nobody asks for those of long ago.
const kept = 1000

func (r *recordings) add(a telemetry.Access) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, a)
	if len(r.list) > kept {
		r.list = append(r.list[:0], r.list[kept/2:]...)
	}
	close(r.more)
	r.more = make(chan struct{})
}

// take waits for the first record that fits, and forgets all up to it.
func (r *recordings) take(ctx context.Context, fits func(*telemetry.Access) bool) (telemetry.Access, bool) {
	for {
		r.mu.Lock()
		for i := range r.list {
			if fits(&r.list[i]) {
				found := r.list[i]
				r.list = append(r.list[:0:0], r.list[i+1:]...)
				r.mu.Unlock()
				return found, true
			}
		}
		more := r.more
		r.mu.Unlock()
		select {
		case <-ctx.Done():
			return telemetry.Access{}, false
		case <-more:
		}
	}
}

// inventoryService is a plain HTTP service that knows nothing of TLS.
type inventoryService struct {
	listener net.Listener
	server   *http.Server
}

func newInventoryService(socket string) (*inventoryService, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("start the inventory service: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /stock/{item}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"item": r.PathValue("item"), "stock": 12, "for": r.Header.Get("x-spiffe-id")})
	})
	return &inventoryService{listener: l, server: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}}, nil
}

func (s *inventoryService) serve(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = s.server.Close() })
	defer stop()
	_ = s.server.Serve(s.listener)
}
