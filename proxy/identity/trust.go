package identity

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
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
// speak for another. Whom it lists as revoked is part of it. It is immutable.
type Trust struct {
	domains    map[spiffeid.TrustDomain]*domain
	crls       *revocations
	generation uint64 // one more for each change of authorities or CRLs
}

// domain is the bundle of one trust domain. Other authorities are another
// domain, which remembers nothing of this one.
type domain struct {
	authorities []*x509.Certificate
	pool        *x509.CertPool

	mu       sync.Mutex // guards the following
	verified map[[sha256.Size]byte]verified
}

// verified are the paths a chain was verified by, and when the first of them
// is good, ends included.
type verified struct {
	paths    []path
	from, to time.Time
}

// maxVerified bounds how many chains a domain remembers. Only chains that
// verified are, so strangers cannot push out others.
const maxVerified = 1024

// Generation is one more for each change of authorities or CRLs.
func (t *Trust) Generation() uint64 { return t.generation }

// Has reports whether there is a bundle of that trust domain.
func (t *Trust) Has(td spiffeid.TrustDomain) bool { return t.domains[td] != nil }

func newTrust(authorities map[spiffeid.TrustDomain][]*x509.Certificate) *Trust {
	return (*Trust)(nil).next(authorities)
}

// next returns the trust that follows t. Domains whose authorities did not
// change keep their pointer, and so does the whole when none changed: live
// connections of such a domain need not be verified again.
func (t *Trust) next(authorities map[spiffeid.TrustDomain][]*x509.Certificate) *Trust {
	n := &Trust{domains: make(map[spiffeid.TrustDomain]*domain, len(authorities)), generation: 1}
	if t != nil {
		n.crls, n.generation = t.crls, t.generation+1
	}
	same := t != nil && len(t.domains) == len(authorities)
	for td, certs := range authorities {
		if t != nil {
			if old := t.domains[td]; old != nil && old.holds(certs) && len(old.authorities) == len(certs) {
				n.domains[td] = old
				continue
			}
		}
		same = false
		d := &domain{authorities: certs, pool: x509.NewCertPool(), verified: map[[sha256.Size]byte]verified{}}
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

// with returns the same bundles with other CRLs.
func (t *Trust) with(crls *revocations) *Trust {
	return &Trust{domains: t.domains, crls: crls, generation: t.generation + 1}
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
// for authorities), and not a certificate that can sign others (§5.2) but one
// that may sign handshakes (§4.3).
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
	case leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return id, errors.New("a leaf must be allowed to make digital signatures (key usage)")
	}
	return id, nil
}

// minRSA is the least strength of an RSA key, in bits (NIST SP 800-131A).
// crypto/x509 accepts 1024.
const minRSA = 2048

// checkStrength refuses keys of less than 112 bits of security, and the curve
// P-224, which nobody uses.
func checkStrength(c *x509.Certificate) error {
	switch key := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSA {
			return fmt.Errorf("%s has an RSA key of %d bits, at least %d are needed", nameOf(c), bits, minRSA)
		}
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P224() {
			return fmt.Errorf("%s has a key on the curve P-224; P-256 is the least", nameOf(c))
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("%s has a key of a kind that is not used here", nameOf(c))
	}
	return nil
}

// peerKeyUsages: any one of them will do, and so does a leaf that names none
// (X509-SVID §4.4 makes the extension optional, but both usages go together).
var peerKeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}

// Verify decides on the chain of a peer that comes, leaf first, as of at.
// Errors are *PeerError.
func (t *Trust) Verify(chain []*x509.Certificate, at time.Time) (spiffeid.ID, error) {
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
	paths, err := d.verify(chain, at)
	if err != nil {
		return id, &PeerError{ID: id, Result: verifyResult(err), Err: explainVerify(err, leaf, id)}
	}
	if err := t.crls.admit(id.TrustDomain(), paths, at); err != nil {
		return id, &PeerError{ID: id, Result: verifyResult(err), Err: err}
	}
	return id, nil
}

// verify verifies chain as of at, and returns the paths that lead from it to
// an authority. What verified before under these same authorities is not
// computed again while all its certificates are valid; everything else that
// speaks for or against a peer, revocation too, is no part of this.
func (d *domain) verify(chain []*x509.Certificate, at time.Time) ([]path, error) {
	key := sumOf(chain)
	d.mu.Lock()
	v, known := d.verified[key]
	d.mu.Unlock()
	if known && !at.Before(v.from) && !at.After(v.to) {
		return v.paths, nil
	}
	paths, err := d.paths(chain, at)
	if err != nil {
		return nil, err
	}
	d.remember(key, paths)
	return paths, nil
}

func (d *domain) remember(key [sha256.Size]byte, paths []path) {
	leaf := paths[0][0]
	v := verified{paths, leaf.NotBefore, leaf.NotAfter}
	for _, p := range paths {
		for _, c := range p[1:] {
			if c.NotBefore.After(v.from) {
				v.from = c.NotBefore
			}
			if c.NotAfter.Before(v.to) {
				v.to = c.NotAfter
			}
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

// maxPaths bounds the paths of a chain that are kept: an authority that was
// signed by another one too makes two.
const maxPaths = 8

// paths verifies chain by crypto/x509 (RFC 5280 §6), and accepts less: every
// key must be strong, and a leaf does not stand for itself because it is in
// the bundle.
func (d *domain) paths(chain []*x509.Certificate, at time.Time) ([]path, error) {
	opts := x509.VerifyOptions{Roots: d.pool, CurrentTime: at, KeyUsages: peerKeyUsages}
	if len(chain) > 1 {
		opts.Intermediates = x509.NewCertPool()
		for _, c := range chain[1:] {
			opts.Intermediates.AddCert(c)
		}
	}
	found, err := chain[0].Verify(opts)
	if err != nil {
		return nil, err
	}
	var paths []path
	for _, p := range found {
		if weak := checkPath(p); weak != nil {
			err = cmp.Or(err, weak)
		} else if len(paths) < maxPaths {
			paths = append(paths, p)
		}
	}
	if len(paths) == 0 {
		return nil, err
	}
	return paths, nil
}

func checkPath(p path) error {
	if len(p) < 2 {
		return errors.New("it stands in the bundle itself and is signed by no authority")
	}
	for _, c := range p {
		if err := checkStrength(c); err != nil {
			return err
		}
	}
	return nil
}

func verifyResult(err error) string {
	var invalid x509.CertificateInvalidError
	var revoked *RevokedError
	var crl *CRLError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "expired"
	case errors.As(err, &revoked):
		return "revoked"
	case errors.As(err, &crl):
		return "crl"
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
