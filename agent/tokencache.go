package agent

import (
	"container/list"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/agent/registry"
)

// tokenKey says what a token is: of which entry and for which audience. Of the
// audience, which may be long, it has a hash.
type tokenKey struct {
	entry    string
	audience [sha256.Size]byte // zero: it is a WIT-SVID
	serial   uint64            // of a token that is given out once, else 0
}

// keyOf is the key of what an entry's holder asks for: a JWT-SVID for an
// audience or, without one, a WIT-SVID.
func keyOf(entry *registry.Entry, audience []string) tokenKey {
	key := tokenKey{entry: entry.ID}
	if len(audience) == 0 {
		return key
	}
	h := sha256.New()
	for _, a := range audience {
		// With their lengths: {"ab", "c"} is not {"a", "bc"}.
		_, _ = h.Write(binary.AppendUvarint(nil, uint64(len(a))))
		_, _ = h.Write([]byte(a))
	}
	h.Sum(key.audience[:0])
	return key
}

// cachedToken is a token that is kept for the next who asks.
type cachedToken struct {
	key     tokenKey
	entry   *registry.Entry // for which it was signed
	token   *registry.Token
	refresh time.Time // when to have another one signed
	until   time.Time // it is good until then
}

// tokenCache keeps the tokens that were asked for last.
type tokenCache struct {
	size   int
	all    map[tokenKey]*list.Element // of *cachedToken
	recent *list.List                 // those in all, the last asked for first
	held   map[string]int             // how many of all each entry has
}

func newTokenCache(size int) tokenCache {
	return tokenCache{size: size, all: map[tokenKey]*list.Element{}, recent: list.New(), held: map[string]int{}}
}

// get returns a token that is good at this moment for the entry as it is now,
// nil if there is none.
func (c *tokenCache) get(key tokenKey, entry *registry.Entry, now time.Time) *cachedToken {
	e := c.all[key]
	if e == nil {
		return nil
	}
	found := e.Value.(*cachedToken)
	if !found.entry.SameIssue(entry) || registry.Reached(found.until, now) {
		return nil // whoever replaces it, put will drop it
	}
	c.recent.MoveToFront(e)
	return found
}

// put keeps a token, for which the one that was not asked for longest has to go
// where there are too many. The holders of one entry, who can ask for as many
// audiences as they like, push out their own once they have a quarter.
func (c *tokenCache) put(t *cachedToken) {
	if old := c.all[t.key]; old != nil {
		c.drop(old)
	}
	if len(c.all) >= c.size {
		greedy := c.held[t.key.entry] >= max(1, c.size/4)
		c.dropOldest(func(o *cachedToken) bool { return !greedy || o.key.entry == t.key.entry })
	}
	c.all[t.key] = c.recent.PushFront(t)
	c.held[t.key.entry]++
}

func (c *tokenCache) dropOldest(of func(*cachedToken) bool) {
	for e := c.recent.Back(); e != nil; e = e.Prev() {
		if of(e.Value.(*cachedToken)) {
			c.drop(e)
			return
		}
	}
}

// dropFunc drops those for which gone is true.
func (c *tokenCache) dropFunc(gone func(*cachedToken) bool) {
	for e := c.recent.Front(); e != nil; {
		next := e.Next()
		if gone(e.Value.(*cachedToken)) {
			c.drop(e)
		}
		e = next
	}
}

func (c *tokenCache) drop(e *list.Element) {
	key := c.recent.Remove(e).(*cachedToken).key
	delete(c.all, key)
	if c.held[key.entry]--; c.held[key.entry] == 0 {
		delete(c.held, key.entry)
	}
}

// tokenQueue is who waits for a token to be signed, entry after entry in turn:
// one whose holders ask for a thousand audiences holds up no other.
type tokenQueue struct {
	entries []string // that have something to sign, the next first
	of      map[string][]*signing
}

func (q *tokenQueue) push(s *signing) {
	if len(q.of[s.key.entry]) == 0 {
		q.entries = append(q.entries, s.key.entry)
	}
	q.of[s.key.entry] = append(q.of[s.key.entry], s)
}

// pop returns what is next, nil if there is nothing.
func (q *tokenQueue) pop() *signing {
	if len(q.entries) == 0 {
		return nil
	}
	entry := q.entries[0]
	s := q.of[entry][0]
	q.remove(s)
	if len(q.of[entry]) > 0 { // to the end of the line
		q.entries = append(q.entries[1:], entry)
	}
	return s
}

// remove takes out what nobody waits for any more.
func (q *tokenQueue) remove(s *signing) {
	entry := s.key.entry
	rest := slices.DeleteFunc(q.of[entry], func(o *signing) bool { return o == s })
	if len(rest) > 0 {
		q.of[entry] = rest
		return
	}
	delete(q.of, entry)
	q.entries = slices.DeleteFunc(q.entries, func(e string) bool { return e == entry })
}

// holds tells whether entries, which are in the order of their IDs, have e as
// it is.
func holds(entries []registry.Entry, e *registry.Entry) bool {
	i, found := slices.BinarySearchFunc(entries, e.ID, func(o registry.Entry, id string) int { return strings.Compare(o.ID, id) })
	return found && entries[i].SameIssue(e)
}
