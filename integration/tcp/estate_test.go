//go:build integration

package tcp_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// estate is a trust domain with a server and an agent, and a proxy on either
// side of a service. Everything in it changes while it is in use.
type estate struct {
	t       *testing.T
	dir     string
	agent   *stage.Process
	face    *stage.Face // the agent's
	api     string      // its Workload API
	out, in *node
	spare   *listener // comes and goes
}

// svidTTL is the life of the estate's SVIDs, which are renewed at half of it.
const svidTTL = 20 * time.Second

const estateID = "spiffe://example.org/"

// newEstate starts the server, the agent and both proxies. There is a way for
// each of services, which maps a name to a target.
func newEstate(t *testing.T, services map[string]string) (e *estate, addresses map[string]string) {
	t.Helper()
	e = &estate{t: t, dir: stage.Folder(t, "estate")}
	e.face = stage.NewFace(t, "agent", e.dir)
	e.api = e.file("api.sock")
	server := stage.FreeAddress(t)
	stage.WriteFile(t, e.file("entries.yaml"), fmt.Sprintf(`trust_domain: example.org
listen: %s
svid_ttl: %s
entries:
  - {spiffe_id: "%[3]sserver", selectors: ["unix:uid:0"]}
  - {spiffe_id: "%[3]sclient", selectors: ["unix:uid:0"]}
`, server, svidTTL, estateID), 0o644)
	dev := stage.Start(t, "narthex dev-server", stage.Narthex, []string{"dev-server", "-f", e.file("entries.yaml"), "--out", e.file("dev"), "--dir", e.file("ca")})
	listens(t, dev, server)
	stage.WriteFile(t, e.file("agent.yaml"), fmt.Sprintf(`trust_domain: example.org
data_dir: %[2]s/data
agent:
  server: {address: %[1]s, bundle: {file: %[2]s/dev/bundle.pem}}
  node_attestor: {join_token: {token_file: %[2]s/dev/join-token}}
  workload_api: {socket: %[3]s}
  sync: {interval: 1s}
`, server, e.dir, e.api)+e.face.YAML(), 0o644)
	stage.Eventually(t, stage.Soon, "the server has written its join token", func() error { _, err := os.Stat(e.file("dev/join-token")); return err })
	e.startAgent()

	e.out, e.in = newNodeAt(t, "out", e.api), newNodeAt(t, "in", e.api)
	addresses = map[string]string{}
	for name, target := range services {
		door := stage.FreeAddress(t)
		// Connections that a process had when its heir came stay with it.
		const drain = "timeouts: {drain: 5m}"
		e.in.listen(&listener{name: name, bind: door, target: target, more: []string{`identity: {spiffe_id: "` + estateID + `server"}`, drain}})
		addresses[name] = e.out.outbound("to-"+name, door, estateID+"server", `identity: {spiffe_id: "`+estateID+`client"}`, drain)
	}
	for _, n := range []*node{e.in, e.out} {
		n.proxy = append(n.proxy, fmt.Sprintf("handover: {socket: %s}", n.file("handover.sock")))
		n.rules(allow("client-may", estateID+"client"))
		n.start()
	}
	return e, addresses
}

func (e *estate) file(name string) string { return filepath.Join(e.dir, name) }

func (e *estate) startAgent() {
	e.t.Helper()
	e.agent = stage.Start(e.t, "narthex agent", stage.Narthex, []string{"agent", "-c", e.file("agent.yaml")})
	stage.Eventually(e.t, stage.Soon, "the agent is ready", func() error {
		if err := e.agent.Alive(); err != nil {
			e.t.Fatal(err)
		}
		return e.face.Ready()
	})
}

// disturb does everything that may happen to an estate, again and again, until
// ended is closed.
func (e *estate) disturb(ended <-chan struct{}) (times map[string]int) {
	e.t.Helper()
	times = map[string]int{}
	expiries := map[time.Time]bool{}
	steps := []struct {
		name string
		do   func()
	}{
		{"rules changed", func() { e.changeRules(times["rules changed"]) }},
		{"listener added or removed", e.changeListeners},
		{"agent restarted", func() { e.agent.Stop(); e.startAgent() }},
		{"inbound proxy upgraded", func() { e.upgrade(e.in) }},
		{"rules changed", func() { e.changeRules(times["rules changed"]) }},
		{"agent killed", func() { e.agent.Kill(); e.startAgent() }},
		{"outbound proxy upgraded", func() { e.upgrade(e.out) }},
	}
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ended:
			times["SVIDs rotated"] = len(expiries) - 1
			return times
		case <-tick.C:
		}
		step := steps[n%len(steps)]
		step.do()
		times[step.name]++
		if s, err := e.in.Status(); err == nil {
			expiries[s.Proxy.Listeners[0].ExpiresAt] = true
		}
	}
}

func (e *estate) changeRules(n int) {
	e.t.Helper()
	for _, p := range []*node{e.in, e.out} {
		p.changeRules(allow(fmt.Sprintf("client-may-%d", n), estateID+"client"), allow("others-may", fmt.Sprintf("%sother-%d", estateID, n)))
	}
}

func (e *estate) changeListeners() {
	e.t.Helper()
	if e.spare == nil {
		e.spare = &listener{name: "spare", target: "127.0.0.1:9", more: []string{`identity: {spiffe_id: "` + estateID + `server"}`}}
		e.in.listen(e.spare)
	} else {
		e.in.listeners, e.spare = e.in.listeners[:len(e.in.listeners)-1], nil
	}
	e.in.configure()
	e.in.Becomes(stage.Soon, "has the listeners of its file", func(s telemetry.Status) bool { return len(s.Proxy.Listeners) == len(e.in.listeners) })
}

func (e *estate) upgrade(n *node) {
	e.t.Helper()
	n.Process = stage.Start(e.t, n.name+": the next narthex proxy", stage.Narthex, []string{"proxy", "-c", n.file("narthex.yaml")})
	n.Says(stage.Soon, "took over")
	n.ready()
}

// wasDisturbed wants everything to have happened.
func wasDisturbed(t *testing.T, times map[string]int) {
	t.Helper()
	var all []string
	for what, n := range times {
		all = append(all, fmt.Sprintf("%s %d times", what, n))
	}
	t.Log(strings.Join(all, ", "))
	for what, want := range map[string]int{
		"SVIDs rotated": 3, "rules changed": 4, "listener added or removed": 2, "agent restarted": 2, "agent killed": 1,
		"inbound proxy upgraded": 2, "outbound proxy upgraded": 1,
	} {
		if times[what] < want {
			t.Errorf("%s %d times, want %d at least", what, times[what], want)
		}
	}
}
