package proxy

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// maxSources bounds how many sources of plaintext a listener counts, and
// shownSources how many of them the status names.
const (
	maxSources   = 128
	shownSources = 20
)

// sources counts the addresses that plaintext comes from in bounded space,
// however many there are. It is the space-saving algorithm (Metwally, Agrawal,
// El Abbadi 2005): a new address takes the place of the one seen least and goes
// on from its count, which is how much it may be counted too high. Whoever made
// more than one of every maxSources connections is among those kept.
type sources struct {
	mu    sync.Mutex // guards the following
	total uint64
	count map[netip.Addr]*sourceCount
}

type sourceCount struct {
	seen, over uint64
	last       time.Time
}

// add counts one connection. The zero address stands for a unix socket.
func (s *sources) add(from netip.Addr, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count == nil {
		s.count = make(map[netip.Addr]*sourceCount)
	}
	s.total++
	c := s.count[from]
	if c == nil {
		c = &sourceCount{}
		if len(s.count) == maxSources {
			var least netip.Addr
			var fewest *sourceCount
			for addr, other := range s.count {
				if fewest == nil || other.seen < fewest.seen {
					least, fewest = addr, other
				}
			}
			delete(s.count, least)
			c.seen, c.over = fewest.seen, fewest.seen
		}
		s.count[from] = c
	}
	c.seen++
	c.last = now
}

// top returns how many connections were counted, and the sources of most of
// them.
func (s *sources) top() (total uint64, most []telemetry.SourceStatus) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for addr, c := range s.count {
		name := "unix"
		if addr.IsValid() {
			name = addr.String()
		}
		most = append(most, telemetry.SourceStatus{Source: name, Connections: c.seen, AtMostOver: c.over, Last: c.last})
	}
	slices.SortFunc(most, func(a, b telemetry.SourceStatus) int {
		return cmp.Or(cmp.Compare(b.Connections, a.Connections), cmp.Compare(a.Source, b.Source))
	})
	return s.total, most[:min(len(most), shownSources)]
}
