//go:build integration

package spire_test

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestManyEntries has more entries than the server sends at once (500), so
// that they come page by page, then by difference.
func TestManyEntries(t *testing.T) {
	t.Parallel()
	const (
		many = 1201
		mine = 100 // each hundredth entry is for this process
	)
	server := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "many", proxyUser)
	agent := n.joins(server)
	n.cacheMax = 10 // what nobody asks for need not be signed
	entries := make([]entry, many)
	want := map[string]bool{}
	for i := range entries {
		entries[i] = entry{path: fmt.Sprintf("/many/%d", i), parent: agent, selector: fmt.Sprintf("unix:uid:%d", 100000+i)}
		if i%mine == 0 {
			entries[i].selector = "unix:uid:0"
			want[server.id(entries[i].path)] = true
		}
	}
	for batch := range slices.Chunk(entries, 400) {
		for i, id := range server.add(batch...) {
			batch[i].identifier = id
		}
	}
	n.start("agent")
	n.holds(many, want)

	// Three go, one of them ours; two change, one of them to be ours; one
	// comes, and is ours.
	server.remove(entries[1].identifier, entries[700].identifier, entries[1199].identifier)
	delete(want, server.id(entries[700].path))
	entries[2].selector = "unix:uid:0"
	entries[1100].path = "/many/renamed"
	server.change(entries[2], entries[1100])
	want[server.id(entries[2].path)] = true
	delete(want, server.id("/many/1100"))
	want[server.id(entries[1100].path)] = true
	server.add(entry{path: "/many/new", parent: agent, selector: "unix:uid:0"})
	want[server.id("/many/new")] = true
	n.holds(many-3+1, want)

	// The server's cache may have taken in the changes in several steps; all
	// together they are these, and nothing was sent that had not changed.
	var added, changed, removed int
	for _, m := range regexp.MustCompile(`entries changed: added=(\d+) changed=(\d+) removed=(\d+)`).FindAllStringSubmatch(n.Said(), -1) {
		for i, sum := range []*int{&added, &changed, &removed} {
			count, err := strconv.Atoi(m[i+1])
			if err != nil {
				t.Fatal(err)
			}
			*sum += count
		}
	}
	if added != many+1 || changed != 2 || removed != 3 {
		t.Errorf("the agent saw %d entries added, %d changed, %d removed; want %d, 2, 3", added, changed, removed, many+1)
	}
}

// holds waits until the agent knows so many entries and gives this process
// the wanted identities and no others.
func (n *node) holds(entries int, want map[string]bool) {
	n.t.Helper()
	n.Becomes(stage.Soon, fmt.Sprintf("%d entries", entries), func(s telemetry.Status) bool { return s.Agent.Entries == entries })
	stage.Eventually(n.t, stage.Soon, "root is given its identities", func() error {
		ctx, cancel := context.WithTimeout(n.t.Context(), stage.Soon)
		defer cancel()
		svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr("unix://"+n.api))
		if err != nil {
			return err
		}
		got := map[string]bool{}
		for _, svid := range svids {
			got[svid.ID.String()] = true
		}
		var wrong []string
		for id := range got {
			if !want[id] {
				wrong = append(wrong, "extra "+id)
			}
		}
		for id := range want {
			if !got[id] {
				wrong = append(wrong, "missing "+id)
			}
		}
		if len(wrong) > 0 {
			return fmt.Errorf("%s", strings.Join(wrong, ", "))
		}
		return nil
	})
}

// TestFirstCallers asks as soon as a node has attested. The server, with its
// caches as stock, has read neither the entry of a moment ago nor which selectors
// the node has: who asks once is answered all the same, by and by.
func TestFirstCallers(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"by its own ID", "by its selectors"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			s, n := newServer(t, serverOptions{}), newNode(t, "first", proxyUser)
			parent := n.proves(s)
			if way == "by its selectors" {
				parent = s.id("/nodes")
				s.add(entry{path: "/nodes", parent: s.id("/spire/server"), selector: "x509pop:subject:cn:first"})
			}
			s.add(entry{path: "/first", parent: parent, selector: "unix:uid:0"})
			n.start("agent")
			n.Says(stage.Soon, "attested: ")
			if out, complaint, code := fetched(t, n.api, nil, "fetch", "x509"); code != 0 || !strings.Contains(out, s.id("/first")) {
				t.Errorf("exit code %d: %s%s", code, out, complaint)
			}
			if n.Count("no identity issued") > 0 {
				t.Errorf("the first caller was denied:\n%s", n.Said())
			}
		})
	}
}
