package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"text/template"
	"time"

	"golang.org/x/net/http2"
)

// peers holds the configurations of all sides, as templates.
//
//go:embed peers
var peers embed.FS

// fill writes the template peers/name to dir/name and returns that path.
func fill(dir, name string, values any) (string, error) {
	t, err := template.New(name).Option("missingkey=error").ParseFS(peers, "peers/"+name)
	if err != nil {
		return "", err
	}
	var text bytes.Buffer
	if err := t.Execute(&text, values); err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	return path, os.WriteFile(path, text.Bytes(), 0o600)
}

// proxyKind is one of the proxies that are measured.
type proxyKind struct {
	name  string
	files []string // its templates; the first is the configuration
	// command returns what to run, given the path of the configuration.
	command func(b *bench, config string) ([]string, error)
	greet   func(net.Conn) error // makes sure that the service behind it is there; nil: ping
	h2      bool                 // clients speak HTTP/2 with it
	h2c     bool                 // it speaks HTTP/2 with the service
	behind  string               // the address of the service that is not the backend
}

var (
	kindNarthex = &proxyKind{name: ours, files: []string{"narthex.yaml", "narthex-rules.yaml"}, command: func(b *bench, config string) ([]string, error) {
		return []string{b.narthex, "proxy", "-c", config}, nil
	}}
	kindNginx = &proxyKind{name: nginx, files: []string{"nginx.conf"}, command: func(_ *bench, config string) ([]string, error) {
		return []string{"nginx", "-e", "stderr", "-c", config, "-p", filepath.Dir(config)}, nil
	}}
	kindHAProxy = &proxyKind{name: haproxy, files: []string{"haproxy.cfg"}, command: func(_ *bench, config string) ([]string, error) {
		return []string{"haproxy", "-db", "-f", config}, nil
	}}
	kindGhostunnel = &proxyKind{name: ghostunnel, files: []string{"ghostunnel.args"}, command: func(_ *bench, config string) ([]string, error) {
		program, err := tool("NARTHEX_GHOSTUNNEL", "ghostunnel", "ghostunnel")
		if err != nil {
			return nil, err
		}
		args, err := os.ReadFile(config)
		return append([]string{program}, strings.Fields(string(args))...), err
	}}

	allProxies = []*proxyKind{kindNarthex, kindNginx, kindHAProxy, kindGhostunnel}
)

// tool returns a program in the folder that the environment variable names.
func tool(variable, module, program string) (string, error) {
	dir := os.Getenv(variable)
	if dir == "" {
		return "", fmt.Errorf("%s is not set: run `make bench`, or set it to what `integration/tools/install.sh %s` prints", variable, module)
	}
	path := filepath.Join(dir, program)
	_, err := os.Stat(path)
	return path, err
}

// manner is how the proxies of a row are set up.
type manner int

const (
	plainly  manner = iota // nothing logged, no session tickets
	logged                 // connections are logged
	ticketed               // session tickets as each program has them by default
)

// proxyValues are what the templates of proxies name.
type proxyValues struct {
	Dir, Certs, Listen, Backend     string
	TrustDomain, ClientID, ServerID string
	OtherID                         string // empty where it is refused
	User                            string // and group, for nginx's workers
	NginxModules                    string
	CPUs                            int
	HTTP2                           bool // in front
	H2C                             bool // HTTP/2 behind
	Logged                          bool
	Tickets                         bool // session tickets, as each program has them by default
	Profiled                        bool // which the sandbox does not allow
}

func (v proxyValues) withoutOther() proxyValues {
	v.OtherID = ""
	return v
}

// nginxModules is where Debian has them.
const nginxModules = "/usr/lib/nginx/modules"

// proxy is a running one.
type proxy struct {
	*process
	kind   *proxyKind
	client client
	dir    string
	values proxyValues
}

// startProxy starts a proxy in front of the backend and waits until it serves
// as all of them have to.
func (b *bench) startProxy(ctx context.Context, kind *proxyKind, how manner, curve tls.CurveID) (*proxy, error) {
	p, err := b.launchProxy(kind, how)
	if err != nil {
		return nil, err
	}
	p.client = newClient(p.values.Listen, b.certificate, curve, p.values.Tickets)
	if kind.greet != nil {
		p.client.greet = kind.greet
	}
	if kind.h2 {
		p.client.config.NextProtos = []string{http2.NextProtoTLS}
	}
	if err := p.ready(ctx); err != nil {
		p.stop()
		return nil, fmt.Errorf("%s: %w", kind.name, err)
	}
	return p, nil
}

// launchProxy starts a proxy in front of the backend, or of what kind has
// behind it.
func (b *bench) launchProxy(kind *proxyKind, how manner) (*proxy, error) {
	dir, err := b.folder()
	if err != nil {
		return nil, err
	}
	port, err := b.freePort()
	if err != nil {
		return nil, err
	}
	account, err := accountAndGroup()
	if err != nil {
		return nil, err
	}
	values := proxyValues{
		Dir: dir, Certs: b.certs(), Listen: "127.0.0.1:" + itoa(port), Backend: cmp.Or(kind.behind, b.backend.address()),
		HTTP2: kind.h2, H2C: kind.h2c,
		TrustDomain: trustDomain, ClientID: clientID, ServerID: serverID, OtherID: otherID,
		User: account, NginxModules: nginxModules, CPUs: runtime.NumCPU(), Logged: how == logged, Tickets: how == ticketed, Profiled: kind.name == ours && b.profiles != "",
	}
	config := ""
	for i, name := range kind.files {
		path, err := fill(dir, name, values)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			config = path
		}
	}
	command, err := kind.command(b, config)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(command[0], command[1:]...)
	if values.Profiled {
		cmd.Env = append(os.Environ(), "NARTHEX_CPU_PROFILE="+filepath.Join(b.profiles, filepath.Base(dir)+".pprof"))
	}
	started, err := b.keeper.start(cmd, filepath.Join(dir, "output"))
	if err != nil {
		return nil, err
	}
	if values.Profiled {
		started.first = syscall.SIGUSR1
	}
	return &proxy{process: started, kind: kind, dir: dir, values: values}, nil
}

// accountAndGroup names the user and group we run as.
func accountAndGroup() (string, error) {
	u, err := user.Current()
	if err != nil {
		return "", err
	}
	g, err := user.LookupGroupId(u.Gid)
	if err != nil {
		return "", err
	}
	return u.Username + " " + g.Name, nil
}

// ready waits until the proxy serves.
func (p *proxy) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		err := p.client.check(ctx)
		if err == nil {
			return nil
		}
		if gone := p.ended(); gone != nil {
			return gone
		}
		if pause(ctx, 20*time.Millisecond) != nil {
			return fmt.Errorf("does not serve: %w\n%s", err, p.said())
		}
	}
}

// proxies returns those of kinds that are to be measured.
func (b *bench) proxies(kinds []*proxyKind) []*proxyKind {
	return slices.DeleteFunc(slices.Clone(kinds), func(k *proxyKind) bool { return !b.measures(k.name) })
}

// startProxies starts one proxy of each kind. The function returned ends
// them.
func (b *bench) startProxies(ctx context.Context, kinds []*proxyKind, how manner, curve func(*proxyKind) tls.CurveID) (list []*proxy, end func(), err error) {
	end = func() {
		for _, p := range list {
			p.stop()
		}
	}
	for _, kind := range kinds {
		p, err := b.startProxy(ctx, kind, how, curve(kind))
		if err != nil {
			end()
			return nil, nil, err
		}
		list = append(list, p)
	}
	return list, end, nil
}

// complain says what the proxy said when it has failed.
func (p *proxy) complain(err error) error {
	if err == nil {
		return nil
	}
	return errors.Join(fmt.Errorf("%s: %w", p.kind.name, err), p.ended())
}
