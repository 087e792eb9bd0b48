package proxy

import (
	"net/netip"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// who is one that has a share of a listener's connections: a SPIFFE ID, or,
// where there is none, the address that plaintext comes from. The zero who is
// whoever speaks plaintext over a unix socket.
type who struct {
	id   spiffeid.ID
	from netip.Prefix
}

// whoIs returns whose share the connection is part of, with c.mu held. The
// addresses of one IPv6 network of 64 bits count as one: whoever has one of
// them has all.
func (q *question) whoIs() who {
	if !q.inPlaintext() {
		return who{id: q.peer().ID}
	}
	addr := q.request.Source.Addr()
	if !addr.IsValid() {
		return who{}
	}
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	prefix, err := addr.WithZone("").Prefix(bits)
	if err != nil {
		return who{} // cannot happen: the bits are those it has
	}
	return who{from: prefix}
}

func (w who) String() string {
	switch {
	case !w.id.IsZero():
		return w.id.String()
	case w.from.IsSingleIP():
		return w.from.Addr().String()
	case w.from.IsValid():
		return w.from.String()
	}
	return "plaintext over a unix socket"
}

// shares counts the live connections of each who of a listener. An entry is
// there only while a connection is, so there are no more of them than
// connections.
type shares struct {
	mu   sync.Mutex // guards the following
	live map[who]int
}

// take counts a connection of w, unless it has most already; 0 is no limit.
func (s *shares) take(w who, most int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live == nil {
		s.live = make(map[who]int)
	}
	if most > 0 && s.live[w] >= most {
		return false
	}
	s.live[w]++
	return true
}

// give takes it back.
func (s *shares) give(w who) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live[w]--; s.live[w] <= 0 {
		delete(s.live, w)
	}
}

// takeShare counts the connection among those of its peer, or refuses it where
// the peer has as many as one may. They are counted also while there is no
// limit, so that one that is set later knows them.
func (c *conn) takeShare() error {
	c.mu.Lock()
	w, most := c.whoIs(), c.under(c.l.proxy.world.Load()).MaxPerIdentity
	c.mu.Unlock()
	if !c.l.shares.take(w, most) {
		return refuse("limited", "%s has as many live connections here as max_connections_per_identity allows, %d", w, most)
	}
	c.counted = true
	return nil
}

// giveShare gives it back, where there is one.
func (c *conn) giveShare() {
	if !c.counted {
		return
	}
	c.mu.Lock()
	w := c.whoIs()
	c.mu.Unlock()
	c.l.shares.give(w)
}
