package identity

import (
	"crypto/sha256"
	"sync"
	"unsafe"
)

// Bounds on what is remembered of tokens: some 30 MiB where all are as long
// as can be.
const (
	maxVerdicts      = 10_000
	verdictShards    = 16
	maxVerdictWords  = 1 << 10 // bytes of a token's audiences
	verdictsPerShard = maxVerdicts / verdictShards
)

// verdicts are the tokens that were good, by the SHA-256 of each. Nothing is
// remembered of others, so strangers can neither fill them nor push out what
// is there: it takes an authority's signature. The oldest makes room.
//
// Each shard has a lock of its own: connections on all CPUs look up at once.
type verdicts struct {
	shards [verdictShards]verdictShard
}

type verdictShard struct {
	mu    sync.RWMutex // guards the following
	known map[[sha256.Size]byte]verdict
	order [][sha256.Size]byte // oldest first from next on, once it is full
	next  int
}

// sumOfToken hashes a token where it is.
func sumOfToken(token string) [sha256.Size]byte {
	return sha256.Sum256(unsafe.Slice(unsafe.StringData(token), len(token))) //nolint:gosec // it is only read; a copy would be the one allocation of a validation
}

func (v *verdicts) shard(sum *[sha256.Size]byte) *verdictShard {
	return &v.shards[sum[0]%verdictShards]
}

func (v *verdicts) find(sum [sha256.Size]byte) (verdict, bool) {
	s := v.shard(&sum)
	s.mu.RLock()
	defer s.mu.RUnlock()
	found, ok := s.known[sum]
	return found, ok
}

func (v *verdicts) remember(sum [sha256.Size]byte, found verdict) {
	words := 0
	for _, a := range found.audience {
		words += len(a)
	}
	if words > maxVerdictWords || len(found.audience) > maxVerdictWords/16 {
		return
	}
	s := v.shard(&sum)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = map[[sha256.Size]byte]verdict{}
	}
	if _, again := s.known[sum]; !again { // else its authority was gone meanwhile
		if len(s.order) < verdictsPerShard {
			s.order = append(s.order, sum)
		} else {
			delete(s.known, s.order[s.next])
			s.order[s.next] = sum
			s.next = (s.next + 1) % verdictsPerShard
		}
	}
	s.known[sum] = found
}
