package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/hashicorp/go-hclog"
)

// activatedPrefix is before the name of an inherited file that is a socket
// which systemd made: `narthex run` hands them to the proxy.
const activatedPrefix = "@activated:"

// activated is a listening socket that systemd made (sd_listen_fds(3)). The
// file stays open for as long as this process lives: systemd has it too, so
// nobody else could listen there.
type activated struct {
	name string // FileDescriptorName= of the socket unit; empty: it cannot be a listener's
	file *os.File
	addr net.Addr
	used bool
}

// takeActivated returns the sockets that systemd made, by their place, from
// `narthex run` or from the environment.
func takeActivated(files inherited, log hclog.Logger) map[string]*activated {
	found := map[string]*activated{}
	for name, f := range files {
		if rest, ok := strings.CutPrefix(name, activatedPrefix); ok {
			place, label, _ := strings.Cut(rest, ":")
			found[place] = &activated{name: label, file: f}
			delete(files, name)
		}
	}
	for i, f := range activation.Files(true) {
		found[strconv.Itoa(i)] = &activated{name: f.Name(), file: f}
	}
	for place, a := range found {
		l, err := net.FileListener(a.file)
		if err != nil {
			log.Warn("a socket that systemd made is not used: it is no listening stream socket", "name", a.name, "error", err)
			_ = a.file.Close()
			delete(found, place)
			continue
		}
		a.addr = l.Addr()
		_ = l.Close() // only this descriptor
	}
	return found
}

// activatedFor returns the socket that systemd made for a listener: the one of
// its name, else the one of its address, else nil.
func activatedFor(sockets map[string]*activated, name, bind string, log hclog.Logger) net.Listener {
	match := func(ok func(*activated) bool) *activated {
		for _, a := range sockets {
			if ok(a) {
				return a
			}
		}
		return nil
	}
	a := match(func(a *activated) bool { return a.name == name })
	if a == nil {
		a = match(func(a *activated) bool { return sameAddress(a.addr, bind) })
	}
	if a == nil {
		return nil
	}
	l, err := net.FileListener(a.file)
	if err != nil {
		log.Error("cannot use a socket that systemd made", "listener", name, "error", err)
		return nil
	}
	a.used = true
	log.Info("listener uses a socket that systemd made", "listener", name, "address", a.addr.String())
	return l
}

// sameAddress reports whether a socket listens exactly where bind says.
func sameAddress(have net.Addr, bind string) bool {
	if path, ok := strings.CutPrefix(bind, "unix:"); ok {
		u, isUnix := have.(*net.UnixAddr)
		return isUnix && u.Name == path
	}
	tcp, ok := have.(*net.TCPAddr)
	if !ok {
		return false
	}
	host, port, err := net.SplitHostPort(bind)
	if err != nil || port != strconv.Itoa(tcp.Port) {
		return false
	}
	at := tcp.AddrPort().Addr().Unmap()
	if host == "" {
		return at.IsUnspecified()
	}
	want, err := netip.ParseAddr(host)
	return err == nil && want.Unmap() == at
}

// warnUnused says which sockets nobody uses: who connects there waits in vain.
func warnUnused(sockets map[string]*activated, log hclog.Logger) {
	for _, a := range sockets {
		if !a.used {
			log.Warn("a socket that systemd made is not used: no listener has its name or address", "name", a.name, "address", a.addr.String())
		}
	}
}

func closeActivated(sockets map[string]*activated) {
	for _, a := range sockets {
		_ = a.file.Close()
	}
}

// activatedForChild returns what systemd made for us as files for a child.
func activatedForChild() map[string]*os.File {
	out := map[string]*os.File{}
	for i, f := range activation.Files(true) {
		label := f.Name()
		if strings.ContainsAny(label, ",=:") {
			label = "" // no listener can be called so
		}
		out[fmt.Sprintf("%s%d:%s", activatedPrefix, i, label)] = f
	}
	return out
}
