//go:build integration

package http_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// sockets are programs that speak WebSocket, as servers and as clients. What a
// client says, the server says back; then the client stays until it is closed.
var sockets = []struct {
	name   string
	server func(t *testing.T) (address string)
	client func(t *testing.T, args ...string) *stage.Process
}{
	{
		"python",
		func(t *testing.T) string {
			return stage.On(t, func(port string) *stage.Process {
				return stage.PythonScript(t, "websockets server", "ws.py", "serve", port)
			})
		},
		func(t *testing.T, args ...string) *stage.Process {
			return stage.PythonScript(t, "websockets client", "ws.py", append([]string{"call"}, args...)...)
		},
	},
	{
		"node",
		func(t *testing.T) string {
			return stage.On(t, func(port string) *stage.Process { return stage.NodeScript(t, "ws server", "ws.js", "serve", port) })
		},
		func(t *testing.T, args ...string) *stage.Process {
			return stage.NodeScript(t, "ws client", "ws.js", append([]string{"call"}, args...)...)
		},
	},
}

// TestWebSockets: messages of all sizes and pings go through one proxy and
// through two. The connections stay open, stand in the status, and end at once
// when the rules allow them no more.
func TestWebSockets(t *testing.T) {
	t.Parallel()
	for i, server := range sockets {
		t.Run(server.name, func(t *testing.T) {
			t.Parallel()
			p := mesh.NewPair(t, server.server(t))
			own, other := sockets[i].client, sockets[1-i].client
			secure := own(t, append([]string{"wss://" + p.Secure + "/secure"}, files(p.Client)...)...)
			plain, third := own(t, "ws://"+p.Entry+"/plain"), other(t, "ws://"+p.Entry+"/other")
			all := []*stage.Process{secure, plain, third}
			for _, c := range all {
				c.Says(stage.Soon, "ok\n")
			}
			p.In.Becomes(stage.Soon, "has three connections", func(s telemetry.Status) bool { return s.Proxy.Listeners[0].Active == 3 })
			said := stage.Must(t, stage.Narthex, "status", "--address", "unix:"+p.In.Figures(), "--format", "json")
			var s telemetry.Status
			if err := json.Unmarshal([]byte(said), &s); err != nil || s.Proxy == nil || s.Proxy.Listeners[0].Active != 3 {
				t.Errorf("narthex status: %v\n%s", err, said)
			}

			p.In.ChangeRules(mesh.Allow("client-elsewhere", p.Client.ID, `http: {paths: ["/elsewhere"]}`))
			for _, c := range all {
				c.Says(stage.Soon, "closed 1006")
			}
			for _, path := range []string{"/secure", "/plain", "/other"} {
				a := p.In.Request(0, path)
				if a.HTTP.Status != http.StatusSwitchingProtocols || a.Outcome != "success" || a.From != p.Client.ID {
					t.Errorf("the record of %s: %+v %+v", path, a, a.HTTP)
				}
				c := p.In.Record(0, "of its connection", func(c telemetry.Access) bool { return c.Action == "connection" && c.Source == a.Source })
				if c.Closed != "policy" || c.BytesIn < 4<<20 || c.BytesOut < 4<<20 {
					t.Errorf("the record of the connection of %s: %+v", path, c)
				}
			}
			late := other(t, "ws://"+p.Entry+"/late")
			<-late.Done
			if said := late.Said(); !strings.Contains(said, "403") {
				t.Errorf("a client that may not: %s", said)
			}
		})
	}
}

// TestUpgradeRefused: a service that does not take the offer answers as it
// would otherwise, and the connection goes on.
func TestUpgradeRefused(t *testing.T) {
	t.Parallel()
	service := mesh.NewService(t)
	p := mesh.NewPair(t, service.Address)
	client := clientOf(t, p.Client)
	for i := range 3 {
		a, err := mesh.Fetch(client, http.MethodGet, fmt.Sprintf("https://%s/other/%d", p.Secure, i), nil,
			"Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
		if err != nil || a.Status != http.StatusOK || a.Body != "ok\n" {
			t.Errorf("%+v, %v", a, err)
		}
	}
	if live := p.In.Live(); live != 1 {
		t.Errorf("%d connections, want the one", live)
	}
}
