//go:build integration

package http2_test

import (
	"net/http"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestWebSockets: WebSockets over HTTP/2 (RFC 8441) and over HTTP/1.1 come to
// services of both versions. They end when the rules allow them no more.
func TestWebSockets(t *testing.T) {
	t.Parallel()
	for _, s := range []struct {
		name  string
		start func(t *testing.T) far
		old   bool // it speaks HTTP/1.1 alone
	}{
		{name: "over HTTP/2", start: nodeService},
		{name: "over HTTP/1.1", old: true, start: func(t *testing.T) far {
			return far{speaks: []string{"http/1.1"}, address: stage.On(t, func(port string) *stage.Process {
				return stage.NodeScript(t, "ws server", "../../http/testdata/ws.js", "serve", port)
			})}
		}},
	} {
		through(t, s.name+", ", s.start, func(t *testing.T, r *route) {
			nodes := r.nodes()
			open := map[string]*stage.Process{} // by path
			if len(nodes) > 0 || !s.old {
				open["/new"] = newSocket(t, r, "/new")
			}
			if len(nodes) > 0 || s.old {
				open["/old"] = oldSocket(t, r, "/old")
			}
			for _, c := range open {
				c.Says(stage.Soon, "ok\n")
			}
			if len(nodes) == 0 {
				return
			}
			last := nodes[len(nodes)-1]
			last.ChangeRules(mesh.Allow("client-elsewhere", r.caller.ID, `http: {paths: ["/elsewhere"]}`))
			for path, c := range open {
				c.Says(stage.Soon, "closed")
				a := last.Request(0, path)
				if a.Decision != "allow" || a.HTTP.Status != http.StatusOK && a.HTTP.Status != http.StatusSwitchingProtocols {
					t.Errorf("the record of %s: %+v %+v", path, a, a.HTTP)
				}
			}
			last.Record(0, "of what the rules have ended", func(a telemetry.Access) bool { return a.Closed == "policy" })
			newSocket(t, r, "/late").Says(stage.Soon, "status 403")
		})
	}
}

// newSocket is a client of a WebSocket over HTTP/2.
func newSocket(t *testing.T, r *route, path string) *stage.Process {
	t.Helper()
	return stage.NodeScript(t, "client over HTTP/2", "ws.js", append([]string{r.url(""), path}, r.files()...)...)
}

// oldSocket is one over HTTP/1.1.
func oldSocket(t *testing.T, r *route, path string) *stage.Process {
	t.Helper()
	scheme := map[bool]string{false: "ws://", true: "wss://"}[r.own != nil]
	return stage.NodeScript(t, "client over HTTP/1.1", "../../http/testdata/ws.js", append([]string{"call", scheme + r.address + path}, r.files()...)...)
}
