// Package fetch asks a SPIFFE Workload API, of any agent, what it gives this
// process, once or for as long as it changes, and makes files of it.
//
//	c, err := fetch.Dial("unix:/run/narthex/public/api.sock")
//	given, err := c.Fetch(ctx, fetch.Request{Kind: fetch.X509})
//	files, err := names.Files(given)
//
// Where the files go is the business of package fileset, who is told of them
// that of package reload; Follow ties the three together.
package fetch

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Kind is what is asked for.
type Kind string

// The profiles of the SPIFFE Workload API (§5, §6, §7), and the bundles of all.
const (
	X509    Kind = "x509"
	JWT     Kind = "jwt"
	WIT     Kind = "wit"
	Bundles Kind = "bundles"
)

// Request is what is asked of the Workload API.
type Request struct {
	Kind     Kind
	Audience []string    // of a JWT-SVID, one or more
	ID       spiffeid.ID // this identity alone; zero: any
	Hint     string      // the identity with this hint alone; empty: any
}

// Given is what the Workload API gives: all of it, each time.
type Given struct {
	Kind       Kind
	Identities []Identity // in the API's order: the first is the default one
	Bundles    []Bundle   // by trust domain
}

// Identity is one SVID.
type Identity struct {
	ID        spiffeid.ID
	Hint      string
	Audience  []string  // of a JWT-SVID
	Serial    string    // of an X.509-SVID, hexadecimal, as big.Int.Text has it
	NotBefore time.Time // of an X.509-SVID
	NotAfter  time.Time
	Chain     []byte // of an X.509-SVID: PEM, leaf first
	Token     string // a JWT-SVID, which is a secret, or a WIT-SVID, which is none without its key

	key []byte // PKCS#8 PEM; it goes into a file of its own and nowhere else
}

// Bundle is what a trust domain is verified by. What was not given is empty.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	X509        []byte // PEM
	JWT         []byte // JWK Set, RFC 7517 §5, keys sorted by their IDs
	WIT         []byte // likewise

	Certificates, JWTKeys, WITKeys int // how many are in them
}

// ErrUnavailable is what the error of Fetch is, for errors.Is, where nobody has
// answered in time, or with nothing but that it cannot now: another attempt may
// succeed.
var ErrUnavailable = errors.New("the Workload API is unavailable")

// pick keeps the identities that were asked for. It fails where there is none.
func (g *Given) pick(r *Request) error {
	if r.Kind == Bundles || r.ID.IsZero() && r.Hint == "" {
		return nil
	}
	var all []string
	for i := range g.Identities {
		name := g.Identities[i].ID.String()
		if hint := g.Identities[i].Hint; hint != "" {
			name += fmt.Sprintf(" (hint %q)", hint)
		}
		all = append(all, name)
	}
	g.Identities = slices.DeleteFunc(g.Identities, func(i Identity) bool {
		return !r.ID.IsZero() && i.ID != r.ID || r.Hint != "" && i.Hint != r.Hint
	})
	if len(g.Identities) > 0 {
		return nil
	}
	var wanted []string
	if !r.ID.IsZero() {
		wanted = append(wanted, r.ID.String())
	}
	if r.Hint != "" {
		wanted = append(wanted, fmt.Sprintf("hint %q", r.Hint))
	}
	const most = 10
	if len(all) > most {
		all = append(all[:most], "…")
	}
	return fmt.Errorf("this process is not given %s, but %s", strings.Join(wanted, " with "), strings.Join(all, ", "))
}

// Ends is when the first of the identities ends; zero where there is none.
func (g *Given) Ends() time.Time {
	var first time.Time
	for i := range g.Identities {
		if end := g.Identities[i].NotAfter; first.IsZero() || end.Before(first) {
			first = end
		}
	}
	return first
}

// equal tells whether nothing has changed.
func (g *Given) equal(other *Given) bool { return other != nil && reflect.DeepEqual(*g, *other) }
