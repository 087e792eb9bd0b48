package expose

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// guard keeps out what has no business here, before any route is looked at:
// methods that change things, and hosts that a DNS rebinding page would name.
// address is what the operator wrote.
func guard(address string, next http.Handler) http.Handler {
	own, _, err := net.SplitHostPort(address)
	if err != nil {
		own = ""
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Cache-Control", "no-store")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD are answered here", http.StatusMethodNotAllowed)
			return
		}
		if cameByLoopback(r) && !localHost(r.Host, own) {
			// RFC 9110 §15.5.20: this server does not answer for that host.
			http.Error(w, fmt.Sprintf("this address answers as localhost, not as %q; ask for http://localhost or http://127.0.0.1", r.Host), http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// cameByLoopback reports whether the request was sent to a loopback address,
// where a browser of this host can be led by a name under foreign control.
// Elsewhere monitoring uses names that nobody told us; a Unix socket is out
// of a browser's reach.
func cameByLoopback(r *http.Request) bool {
	addr, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return ok && addr.IP.IsLoopback()
}

// localHost reports whether a Host header names this host: localhost, a
// loopback IP address, or the host that the operator listens on.
func localHost(host, own string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	if strings.EqualFold(strings.TrimSuffix(name, "."), "localhost") || own != "" && strings.EqualFold(name, own) {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.Unmap().IsLoopback()
}
