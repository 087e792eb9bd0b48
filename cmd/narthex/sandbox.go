package main

import (
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/sandbox"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// enterSandbox gives up what the proxy does not need from here on, unless the
// file says otherwise, and says what is in force.
func (r *proxyRunner) enterSandbox() {
	if r.boxed {
		return // by a stint before this one, for as long as the process lives
	}
	r.boxed = true
	c := r.config
	if c.Proxy.Sandbox == "off" {
		r.log.Warn("proxy.sandbox is off: whoever takes over the proxy has all the files and rights of its user; remove the key to have the sandbox back")
		return
	}
	// libc's resolver loads libraries when it is first asked, which takes
	// memory that can be executed. Only builds with cgo have it.
	net.DefaultResolver.PreferGo = true
	needs := sandboxConfig(c, r.path)
	if r.good.dir != "" {
		needs.Keep = []string{r.good.base}
	}
	r.box = sandbox.Enter(needs)
	r.log.Info("sandboxed", "enforced", strings.Join(r.box.Enforced(), ", "))
	if missing := r.box.Missing(); len(missing) > 0 {
		r.log.Warn("the sandbox is not whole", "missing", strings.Join(missing, "; "))
	}
	for _, dir := range r.box.Wide() {
		r.log.Warn("the sandbox leaves a whole directory open, as a file that the proxy uses is right in it: give such files a directory of their own", "directory", dir)
	}
	for _, err := range r.box.Check(needs) {
		r.log.Warn("not to be opened again from inside the sandbox, as the proxy has no privileges there: give its user access", "error", err)
	}
}

// sandboxConfig is what the proxy opens again while it runs.
func sandboxConfig(c *config.Config, path string) sandbox.Config {
	out := sandbox.Config{
		Read:     []string{path},
		Watched:  agentIsUs(c),
		LowPorts: needsLowPort(c),
	}
	out.Read = append(out.Read, filesIn(reflect.ValueOf(c.Proxy))...)
	if p := c.AccessLog.Path; p != "stdout" && p != "stderr" {
		out.Append = append(out.Append, p)
	}
	if h := c.Proxy.Handover; h != nil {
		out.Sockets = append(out.Sockets, string(h.Socket))
	}
	binds := []config.Address{c.Telemetry.Listen, c.Telemetry.Health}
	for i := range c.Proxy.Listeners {
		l := &c.Proxy.Listeners[i]
		binds = append(binds, l.Bind)
		for target := range l.Targets() {
			if target.Network() == "unix" {
				out.Connect = append(out.Connect, target.Addr())
			}
		}
	}
	for i := range c.Proxy.ExtAuthz {
		binds = append(binds, c.Proxy.ExtAuthz[i].Bind)
	}
	for _, bind := range binds {
		if bind.Network() == "unix" {
			out.Sockets = append(out.Sockets, bind.Addr())
		}
	}
	return out
}

// filesIn returns every file that a part of the configuration names: a key that
// is added later cannot be forgotten.
func filesIn(v reflect.Value) (files []string) {
	if v.Type() == reflect.TypeFor[config.File]() {
		if name := v.String(); name != "" {
			files = append(files, name)
		}
		return files
	}
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			files = filesIn(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			files = append(files, filesIn(v.Field(i))...)
		}
	case reflect.Slice:
		for i := range v.Len() {
			files = append(files, filesIn(v.Index(i))...)
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			files = append(files, filesIn(v.MapIndex(key))...)
		}
	}
	return files
}

// agentIsUs reports whether the agent that has to attest this process is
// another process of the same user, without root's right to look into all: the
// Workload API's socket, or where it will be, tells. Such an agent could not
// open /proc/PID/exe of a process that is not dumpable.
func agentIsUs(c *config.Config) bool {
	if c.Proxy.WorkloadAPI == nil || os.Geteuid() == 0 {
		return false
	}
	socket := string(c.Proxy.WorkloadAPI.Socket)
	for _, path := range []string{socket, filepath.Dir(socket), filepath.Dir(filepath.Dir(socket))} {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			return int(st.Uid) == os.Geteuid()
		}
	}
	return false
}

// sandboxStatus is what is in force, for people.
func (r *proxyRunner) sandboxStatus() *telemetry.SandboxStatus {
	return &telemetry.SandboxStatus{On: r.box != nil, Enforced: r.box.Enforced(), Missing: r.box.Missing()}
}
