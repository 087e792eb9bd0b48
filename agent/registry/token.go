package registry

import (
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Token is a JWT-SVID, or a WIT-SVID with its private key. It is never
// modified, and shared by all who are given it.
type Token struct {
	ID        spiffeid.ID
	Audience  []string // sorted, without duplicates; none in a WIT-SVID
	Compact   string   // JWS Compact Serialization (RFC 7515 §7.1); printing a Token leaves it out
	KeyID     string   // of the authority that signed it (RFC 7515 §4.1.4); empty if it does not say
	ExpiresAt time.Time
	// PrivateKey is the key a WIT-SVID is bound to, as a JWK (RFC 7517); empty
	// in a JWT-SVID. Printing a Token leaves it out.
	PrivateKey string
}

// Format writes what may be seen of the token: whose it is and which authority
// signed it, whatever the verb. A JWT-SVID is a bearer token: whoever reads it
// in a log is who it names.
func (t Token) Format(f fmt.State, _ rune) {
	_, _ = fmt.Fprintf(f, "Token(%s, kid %s)", t.ID, t.KeyID)
}
