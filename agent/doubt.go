package agent

import (
	"time"

	"github.com/narthex-id/narthex/agent/registry"
)

// Behind one name there may be several servers, each with a cache of the
// database that it reads again every five seconds. Asked in turn, one shows an
// entry and the next does not know it yet, or not any more. What an agent has
// is taken back only when that cannot be it: see
// docs/design/0024-life-with-the-server.md.
const (
	// serverCache is how long a server may be behind the database, by SPIRE
	// Server's default of cache_reload_interval.
	serverCache = 5 * time.Second
	// severalFor is for how long a server counts that has answered.
	severalFor = 2 * time.Minute
	// maxServers bounds those that are told apart.
	maxServers = 64
)

// doubt holds on to entries that one of several servers does not list, or lists
// in an older version, until that is confirmed. It is the loop's.
type doubt struct {
	servers map[string]time.Time // by their certificate's serial number: when they answered last
	since   map[string]time.Time // by entry ID: when it was first not listed as it is known
}

// wait is how much later than the first answer without an entry the confirming
// one has to be: not quite an interval, so that it is the next but for jitter.
func (d *doubt) wait(interval time.Duration) time.Duration {
	return max(interval, serverCache) * 9 / 10
}

// settle returns the set of entries to apply when a server has answered with
// listed, and known was applied last. With one server it is what was listed.
// Else what is known stays for now where listed lacks it or has an older
// version, and goes with the first answer at least wait later that says so
// still; an answer that has it ends the doubt when it is that late too. So a
// removal takes two intervals (or 10 s) at most, and no server that is behind
// by less than that takes anything back.
func (d *doubt) settle(known, listed []registry.Entry, server string, interval time.Duration, now time.Time) []registry.Entry {
	if !d.several(server, now) {
		clear(d.since)
		return listed
	}
	index := make(map[string]int, len(listed))
	for i := range listed {
		index[listed[i].ID] = i
	}
	doubted := map[string]time.Time{}
	out := listed
	for i := range known {
		e := &known[i]
		at, there := index[e.ID]
		first, before := d.since[e.ID]
		if there && !older(&listed[at], e) {
			if before && now.Sub(first) < d.wait(interval) {
				doubted[e.ID] = first
			}
			continue
		}
		if !before {
			first = now
		} else if now.Sub(first) >= d.wait(interval) {
			continue // confirmed
		}
		doubted[e.ID] = first
		if there {
			out[at] = *e
		} else {
			out = append(out, *e)
		}
	}
	d.since = doubted
	return out
}

// older reports whether an entry is an earlier version of the other: its
// revision is, or, where it was made anew under its ID, its time.
func older(e, than *registry.Entry) bool {
	if !e.CreatedAt.Equal(than.CreatedAt) {
		return e.CreatedAt.Before(than.CreatedAt)
	}
	return e.Revision < than.Revision
}

// several notes that a server has answered and reports whether another one has
// lately. A server that cannot be told from others is one of them.
func (d *doubt) several(server string, now time.Time) bool {
	for s, last := range d.servers {
		if now.Sub(last) >= severalFor {
			delete(d.servers, s)
		}
	}
	if d.servers == nil {
		d.servers = map[string]time.Time{}
	}
	if _, there := d.servers[server]; there || len(d.servers) < maxServers {
		d.servers[server] = now
	}
	return len(d.servers) > 1
}
