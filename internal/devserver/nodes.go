package devserver

import (
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

const nodesFile = "agents.json"

// A node is an attested agent. Its fields are the document in Config.Dir.
type node struct {
	// Serial is of the SVID the agent must use, in decimal; empty means
	// banned, as in the real server.
	Serial string `json:"serial"`
	// NewSerial is of the SVID it was last renewed to: it becomes Serial,
	// and the old one void, at first use.
	NewSerial string `json:"new_serial,omitempty"`
	// Version is what the agent said of itself in PostStatus.
	Version string `json:"version,omitempty"`
}

func (n node) banned() bool { return n.Serial == "" }

// nodes are the attested agents and the join tokens not used yet.
type nodes struct {
	td    spiffeid.TrustDomain
	now   func() time.Time
	store *store

	mu     sync.Mutex          // guards the following
	known  map[string]node     // by SPIFFE ID
	tokens map[string]struct{} // good for one attestation each
}

func newNodes(cfg Config, st *store) (*nodes, error) {
	n := &nodes{td: cfg.TrustDomain, now: cfg.Now, store: st, known: make(map[string]node), tokens: make(map[string]struct{})}
	if _, err := st.read(nodesFile, &n.known); err != nil {
		return nil, err
	}
	for i, token := range cfg.JoinTokens {
		id, err := n.tokenID(token)
		if err != nil {
			return nil, fmt.Errorf("join token %d of %d cannot be part of a SPIFFE ID; use letters, digits, dots, dashes and underscores", i+1, len(cfg.JoinTokens))
		}
		// A token given again to a server that was started again is still
		// used up.
		if _, used := n.known[id.String()]; !used {
			n.tokens[token] = struct{}{}
		}
	}
	return n, nil
}

// tokenID is the SPIFFE ID of the agent that attests with token.
func (n *nodes) tokenID(token string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(n.td, "spire", "agent", "join_token", token)
}

func (n *nodes) newToken() string {
	token := rand.Text()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tokens[token] = struct{}{}
	return token
}

// redeem uses token up and reports whether it was good.
func (n *nodes) redeem(token string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.tokens[token]
	delete(n.tokens, token)
	return ok
}

// isBanned reports whether id is an agent that was banned.
func (n *nodes) isBanned(id string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	known, ok := n.known[id]
	return ok && known.banned()
}

// attested records that id holds the SVID with this serial from now on; any
// older one is void at once.
func (n *nodes) attested(id, serial string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.put(id, node{Serial: serial})
}

// update changes what is known of id and reports whether id is an agent.
func (n *nodes) update(id string, change func(*node)) (found bool, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	known, ok := n.known[id]
	if !ok {
		return false, nil
	}
	change(&known)
	return true, n.put(id, known)
}

// put records a node, in the store first. The caller holds mu.
func (n *nodes) put(id string, v node) error {
	before, had := n.known[id]
	n.known[id] = v
	if before == v {
		return nil
	}
	if err := n.store.write(nodesFile, n.known); err != nil {
		delete(n.known, id)
		if had {
			n.known[id] = before
		}
		return err
	}
	return nil
}

func (n *nodes) ban(id string) error {
	found, err := n.update(id, func(v *node) { v.Serial, v.NewSerial = "", "" })
	if err == nil && !found {
		err = errors.New("no such agent is attested")
	}
	if err != nil {
		return fmt.Errorf("ban agent %s: %w", id, err)
	}
	return nil
}

func (n *nodes) evict(id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	before, ok := n.known[id]
	if !ok {
		return fmt.Errorf("evict agent %s: no such agent is attested", id)
	}
	delete(n.known, id)
	if err := n.store.write(nodesFile, n.known); err != nil {
		n.known[id] = before
		return fmt.Errorf("evict agent %s: %w", id, err)
	}
	return nil
}

// A refusedError is why an agent may not call.
type refusedError struct {
	reason types.PermissionDeniedDetails_Reason
	why    string
}

func (e *refusedError) Error() string { return e.why }

// authorize answers whether the holder of cert may call as the agent id; the
// error is a *refusedError where that is the answer. It makes a renewed SVID the
// active one.
func (n *nodes) authorize(id string, cert *x509.Certificate) error {
	// The handshake has checked this too, but a connection can outlive the
	// certificate it was opened with.
	if n.now().After(cert.NotAfter) {
		return &refusedError{types.PermissionDeniedDetails_AGENT_EXPIRED, "agent SVID is expired"}
	}
	serial := cert.SerialNumber.String()
	n.mu.Lock()
	defer n.mu.Unlock()
	known, ok := n.known[id]
	switch {
	case !ok:
		return &refusedError{types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent is not attested"}
	case known.banned():
		return &refusedError{types.PermissionDeniedDetails_AGENT_BANNED, "agent is banned"}
	case known.Serial == serial:
		return nil
	case known.NewSerial == serial:
		known.Serial, known.NewSerial = serial, ""
		return n.put(id, known)
	default:
		return &refusedError{types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "agent SVID is not active: a newer one is in use"}
	}
}
