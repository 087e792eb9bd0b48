package proxy

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Trust is the set of bundles a peer is verified against, one for each trust
// domain. Bundles are never pooled: a peer is verified against the bundle of
// its own trust domain alone (SPIFFE X509-SVID §5), so that no domain can
// speak for another. It is immutable.
type Trust struct {
	domains map[spiffeid.TrustDomain]*domain
}

// domain is the bundle of one trust domain.
type domain struct {
	authorities []*x509.Certificate
	pool        *x509.CertPool

	mu       sync.Mutex // guards the following
	verified map[[sha256.Size]byte]validity
}

// validity is when a chain that was verified is good, ends included.
type validity struct {
	from, to time.Time
}

// maxVerified bounds how many chains a domain remembers. Only chains that
// verified are, so strangers cannot push out others.
const maxVerified = 1024

func newTrust(authorities map[spiffeid.TrustDomain][]*x509.Certificate) *Trust {
	return (*Trust)(nil).next(authorities)
}

// next returns the trust that follows t. Domains whose authorities did not
// change keep their pointer, and so does the whole when none changed: live
// connections of such a domain need not be verified again.
func (t *Trust) next(authorities map[spiffeid.TrustDomain][]*x509.Certificate) *Trust {
	n := &Trust{domains: make(map[spiffeid.TrustDomain]*domain, len(authorities))}
	same := t != nil && len(t.domains) == len(authorities)
	for td, certs := range authorities {
		if t != nil {
			if old := t.domains[td]; old != nil && old.holds(certs) && len(old.authorities) == len(certs) {
				n.domains[td] = old
				continue
			}
		}
		same = false
		d := &domain{authorities: certs, pool: x509.NewCertPool(), verified: map[[sha256.Size]byte]validity{}}
		for _, c := range certs {
			d.pool.AddCert(c)
		}
		n.domains[td] = d
	}
	if same {
		return t
	}
	return n
}

// within returns the authorities of t that are among the given ones too.
func (t *Trust) within(authorities map[spiffeid.TrustDomain][]*x509.Certificate) map[spiffeid.TrustDomain][]*x509.Certificate {
	both := map[spiffeid.TrustDomain][]*x509.Certificate{}
	for td, d := range t.domains {
		for _, c := range d.authorities {
			if slices.ContainsFunc(authorities[td], c.Equal) {
				both[td] = append(both[td], c)
			}
		}
	}
	return both
}

// holds reports whether every one of certs is an authority of d.
func (d *domain) holds(certs []*x509.Certificate) bool {
	for _, c := range certs {
		found := false
		for _, a := range d.authorities {
			if a.Equal(c) {
				found = true
				break
			}
		}
		if !found {
			return false
		}
	}
	return true
}

// PeerError is why a peer's certificate was not accepted.
type PeerError struct {
	ID     spiffeid.ID // zero where the certificate does not name one
	Result string      // a short fixed word, for the metrics
	Err    error
}

func (e *PeerError) Error() string {
	if e.ID.IsZero() {
		return "peer certificate: " + e.Err.Error()
	}
	return fmt.Sprintf("peer certificate of %s: %v", e.ID, e.Err)
}

func (e *PeerError) Unwrap() error { return e.Err }

// Bounds on what a peer presents. A SPIFFE ID has at most 2048 bytes
// (SPIFFE-ID §2.3); chains are those of a deep hierarchy with large keys.
const (
	maxSPIFFEID   = 2048
	maxChain      = 10       // certificates
	maxChainBytes = 64 << 10 // of all of them
)

// checkSize refuses chains that are more work than any peer needs us to have.
func checkSize(chain []*x509.Certificate) error {
	if len(chain) > maxChain {
		return fmt.Errorf("%d certificates, at most %d are accepted", len(chain), maxChain)
	}
	size := 0
	for _, c := range chain {
		size += len(c.Raw)
	}
	if size > maxChainBytes {
		return fmt.Errorf("certificates of %d bytes, at most %d are accepted", size, maxChainBytes)
	}
	return nil
}

// checkLeaf applies the rules for the leaf of an X.509-SVID and returns its
// SPIFFE ID: exactly one URI SAN that is a SPIFFE ID (X509-SVID §2), with a
// path (§3.1 of the SPIFFE ID specification reserves the bare trust domain
// for authorities), and not a certificate that can sign others (§5.2).
//
// An ID that is too long is not even returned: who sent it has proved nothing
// when it is read.
func checkLeaf(leaf *x509.Certificate) (spiffeid.ID, error) {
	for _, uri := range leaf.URIs {
		if n := len(uri.String()); n > maxSPIFFEID {
			return spiffeid.ID{}, fmt.Errorf("a URI SAN has %d bytes, a SPIFFE ID has at most %d", n, maxSPIFFEID)
		}
	}
	id, err := x509svid.IDFromCert(leaf)
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case id.Path() == "":
		return id, errors.New("the SPIFFE ID of a leaf must have a path")
	case leaf.IsCA:
		return id, errors.New("a leaf must not be a CA")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return id, errors.New("a leaf must not be allowed to sign certificates or CRLs")
	}
	return id, nil
}

// peerKeyUsages: any one of them will do, and so does a leaf that names none
// (X509-SVID §4.4 makes the extension optional, but both usages go together).
var peerKeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}

// verify verifies a peer's chain, leaf first, as of at. Errors are
// *PeerError.
func (t *Trust) verify(chain []*x509.Certificate, at time.Time) (spiffeid.ID, error) {
	if len(chain) == 0 {
		return spiffeid.ID{}, &PeerError{Result: "no_certificate", Err: errors.New("the peer sent none")}
	}
	if err := checkSize(chain); err != nil {
		return spiffeid.ID{}, &PeerError{Result: "not_svid", Err: err}
	}
	leaf := chain[0]
	id, err := checkLeaf(leaf)
	if err != nil {
		return id, &PeerError{ID: id, Result: "not_svid", Err: err}
	}
	d := t.domains[id.TrustDomain()]
	if d == nil {
		return id, &PeerError{ID: id, Result: "untrusted", Err: fmt.Errorf("no bundle for trust domain %s: it is neither ours nor federated with us", id.TrustDomain())}
	}
	if err := d.verify(chain, at); err != nil {
		return id, &PeerError{ID: id, Result: verifyResult(err), Err: explainVerify(err, leaf, id)}
	}
	return id, nil
}

// verify verifies chain as of at. What verified before under these same
// authorities is not computed again while all its certificates are valid;
// everything else that speaks for or against a peer is no part of this.
func (d *domain) verify(chain []*x509.Certificate, at time.Time) error {
	key := sumOf(chain)
	d.mu.Lock()
	v, known := d.verified[key]
	d.mu.Unlock()
	if known && !at.Before(v.from) && !at.After(v.to) {
		return nil
	}
	chains, err := d.chains(chain, at)
	if err != nil {
		return err
	}
	d.remember(key, chains[0])
	return nil
}

func (d *domain) remember(key [sha256.Size]byte, chain []*x509.Certificate) {
	v := validity{chain[0].NotBefore, chain[0].NotAfter}
	for _, c := range chain[1:] {
		if c.NotBefore.After(v.from) {
			v.from = c.NotBefore
		}
		if c.NotAfter.Before(v.to) {
			v.to = c.NotAfter
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for old := range d.verified { // any one
		if len(d.verified) < maxVerified {
			break
		}
		delete(d.verified, old)
	}
	d.verified[key] = v
}

// sumOf is the same for the same certificates in the same order only: each is
// DER, which says how long it is.
func sumOf(chain []*x509.Certificate) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, c := range chain {
		h.Write(c.Raw)
	}
	h.Sum(sum[:0])
	return sum
}

func (d *domain) chains(chain []*x509.Certificate, at time.Time) ([][]*x509.Certificate, error) {
	opts := x509.VerifyOptions{Roots: d.pool, CurrentTime: at, KeyUsages: peerKeyUsages}
	if len(chain) > 1 {
		opts.Intermediates = x509.NewCertPool()
		for _, c := range chain[1:] {
			opts.Intermediates.AddCert(c)
		}
	}
	return chain[0].Verify(opts)
}

// prunedAfterExpiry reports whether d, the bundle that once verified chain,
// did so only by authorities that have expired since: they left the bundle
// in the ordinary course of things, not because they were withdrawn.
func (d *domain) prunedAfterExpiry(chain []*x509.Certificate, at, now time.Time) bool {
	chains, err := d.chains(chain, at)
	if err != nil {
		return false
	}
	for _, c := range chains {
		if root := c[len(c)-1]; !now.After(root.NotAfter) {
			return false
		}
	}
	return true
}

func verifyResult(err error) string {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return "expired"
	}
	return "untrusted"
}

func explainVerify(err error, leaf *x509.Certificate, id spiffeid.ID) error {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && time.Now().Before(leaf.NotBefore):
		return fmt.Errorf("not valid before %s; are the clocks right? (%w)", leaf.NotBefore.UTC().Format(time.RFC3339), err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && invalid.Cert.Equal(leaf):
		return fmt.Errorf("expired at %s (%w)", leaf.NotAfter.UTC().Format(time.RFC3339), err)
	case errors.As(err, &unknown):
		return fmt.Errorf("not signed by an authority in the bundle of %s (%w)", id.TrustDomain(), err)
	}
	return err
}
