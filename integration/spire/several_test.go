//go:build integration

package spire_test

import (
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// twins are two servers of one trust domain on one database, each at an address of
// its own, and the name that stands for both.
type twins struct {
	t        *testing.T
	servers  [2]*server
	name     string // host:port
	hosts    string // file that has the name
	database string
}

func newTwins(t *testing.T, o serverOptions) *twins {
	t.Helper()
	db := stage.NewPostgres(t)
	db.Start()
	p := &twins{t: t, database: db.Dir, hosts: filepath.Join(stage.Folder(t, "hosts"), "hosts")}
	const host = "spire.servers.test"
	o.address, o.postgres, o.nodes = stage.FreeAddress(t), p.database, newAuthority(t, "nodes")
	_, port, err := net.SplitHostPort(o.address)
	if err != nil {
		t.Fatal(err)
	}
	p.servers[0] = newServer(t, o)
	o.address = net.JoinHostPort("127.0.0.2", port)
	p.servers[1] = newServer(t, o)
	p.name = net.JoinHostPort(host, port)
	stage.WriteFile(t, p.hosts, "127.0.0.1 localhost "+host+"\n127.0.0.2 "+host+"\n", 0o644)
	return p
}

// runs starts an agent that knows the servers by their name.
func (p *twins) runs(n *node) {
	p.t.Helper()
	n.server = p.name
	stage.Eventually(p.t, stage.Soon, "each server has the authorities of both", func() error {
		for _, s := range p.servers {
			if got := len(s.authorities()); got != len(p.servers) {
				return fmt.Errorf("%s has %d", s.address, got)
			}
		}
		return nil
	})
	stage.WriteFile(p.t, n.bundle, p.servers[0].bundlePEM(), 0o644)
	n.start("agent", stage.InNamespaces("mount --bind '"+p.hosts+"' /etc/hosts", "--mount"))
}

// census counts what an agent has of each SPIFFE ID.
func (n *node) census() (map[string]int, error) {
	status, err := n.Status()
	if err != nil {
		return nil, err
	}
	have := map[string]int{}
	for _, id := range status.Agent.Identities {
		have[id.SPIFFEID]++
		if left := time.Until(id.NotAfter); left <= 0 {
			return nil, fmt.Errorf("the SVID of %s ended %s ago", id.SPIFFEID, -left)
		}
	}
	return have, nil
}

// has waits until the agent has exactly these IDs, each once.
func (n *node) has(what string, ids map[string]int) {
	n.t.Helper()
	stage.Eventually(n.t, stage.Soon, n.name+" has "+what, func() error {
		have, err := n.census()
		if err == nil && !maps.Equal(have, ids) {
			err = fmt.Errorf("it has %d identities and not %d: %v", len(have), len(ids), differ(have, ids))
		}
		return err
	})
}

// differ lists the IDs that are not in both, or not as often.
func differ(a, b map[string]int) []string {
	var ids []string
	for _, of := range []map[string]int{a, b} {
		for id := range of {
			if a[id] != b[id] && !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	slices.Sort(ids)
	return ids
}

// TestTwoServers kills one of two servers, then the other, and each comes back:
// entries that were made or removed just before are made and removed, what is kept
// is never away, and SVIDs are renewed by whichever server is left.
func TestTwoServers(t *testing.T) {
	t.Parallel()
	for name, more := range map[string]string{"stock": "", "events": "events_based_cache = true\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			twoServers(t, more)
		})
	}
}

func twoServers(t *testing.T, more string) {
	const kept, ttl = 50, 30 * time.Second
	p := newTwins(t, serverOptions{agentTTL: 30 * time.Second, more: more})
	n := newNode(t, "between", proxyUser)
	agent := n.joins(p.servers[0])
	ids := map[string]int{}
	add := func(s *server, path, selector string, ttl time.Duration) (id string) {
		t.Helper()
		ids[s.id(path)]++
		return s.add(entry{path: path, parent: agent, selector: selector, ttl: ttl})[0]
	}
	for i := range kept {
		add(p.servers[i%2], fmt.Sprintf("/kept-%d", i), proxyUser.selector(), time.Hour)
	}
	add(p.servers[0], "/root", "unix:uid:0", ttl)
	p.runs(n)
	n.has("what was made by either server", ids)
	stop := n.witness(maps.Clone(ids))

	for round, killed := range p.servers {
		left := p.servers[1-round]
		goes := add(killed, fmt.Sprintf("/goes-%d", round), proxyUser.selector(), time.Hour)
		n.has("what was made while both are there", ids)

		// The last that the server does before it is killed.
		add(killed, fmt.Sprintf("/last-%d", round), proxyUser.selector(), time.Hour)
		killed.remove(goes)
		delete(ids, killed.id(fmt.Sprintf("/goes-%d", round)))
		killed.Kill()
		n.has("what the server did last", ids)
		goes = add(left, fmt.Sprintf("/left-%d", round), proxyUser.selector(), time.Hour)
		n.has("what the other one does", ids)
		left.remove(goes)
		delete(ids, left.id(fmt.Sprintf("/left-%d", round)))
		n.has("what the other one leaves", ids)
		n.renews(2)
		left.verify(n.fetches(stage.Soon).Certificates, left.id("/root"))

		killed.start()
		add(killed, fmt.Sprintf("/back-%d", round), proxyUser.selector(), time.Hour)
		n.has("what the server does that came back", ids)
	}
	stop()
	n.attestedOnce()
	n.content(stage.Soon)
	for _, s := range p.servers {
		if got := s.cli("entry", "count"); !strings.HasPrefix(got, fmt.Sprintf("%d registration", len(ids))) {
			t.Errorf("%s counts %q, want %d", s.address, strings.TrimSpace(got), len(ids))
		}
	}
}

// renews waits until the agent's own SVID, and that of root, were renewed so many
// times from now on.
func (n *node) renews(times int) {
	n.t.Helper()
	const own = "renewed the agent's SVID"
	before := n.Count(own)
	serials := map[string]bool{}
	stage.Eventually(n.t, 2*time.Minute, n.name+" renews", func() error {
		svid, err := n.fetch(callTime)
		if err != nil {
			return err
		}
		serials[svid.Certificates[0].SerialNumber.String()] = true
		if got := n.Count(own) - before; got < times || len(serials) <= times {
			return fmt.Errorf("%d renewals of its own, %d SVIDs of root", got, len(serials))
		}
		return nil
	})
}

// witness watches that the agent has these IDs at each moment, and once each, until
// stop is called.
func (n *node) witness(ids map[string]int) (stop func()) {
	over, done := make(chan struct{}), make(chan struct{})
	stop = sync.OnceFunc(func() { close(over); <-done })
	n.t.Cleanup(stop)
	go func() {
		defer close(done)
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-over:
				return
			case <-tick.C:
			}
			if err := n.lacks(ids); err != nil {
				n.t.Errorf("%s at %s: %v", n.name, time.Now().Format(time.TimeOnly), err)
				return
			}
		}
	}()
	return stop
}

func (n *node) lacks(ids map[string]int) error {
	have, err := n.census()
	for id, times := range ids {
		if err == nil && have[id] != times {
			err = fmt.Errorf("it has %d identities %s, want %d", have[id], id, times)
		}
	}
	return err
}
