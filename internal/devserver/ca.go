package devserver

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// backdate is how far notBefore lies in the past, for clocks that are a
	// little behind. The real server uses the same.
	backdate = 10 * time.Second

	// serverTTL is the lifetime of the server's own certificate. It does not
	// follow Config.SVIDTTL: after a rotation agents must have time to learn
	// of the new authority before the server itself speaks with it.
	serverTTL = time.Hour

	authoritiesFile = "authorities.json"
)

// An authority signs X.509-SVIDs and JWT-SVIDs for one lifetime. It is
// immutable.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	jwt  *ecdsa.PrivateKey
	kid  string // of jwt
}

// trust is a state of the bundle. It is immutable.
type trust struct {
	authorities []*authority // oldest first
	tainted     map[*authority]bool
	sequence    uint64
}

func (t trust) roots() []*x509.Certificate {
	certs := make([]*x509.Certificate, len(t.authorities))
	for i, a := range t.authorities {
		certs[i] = a.cert
	}
	return certs
}

// ca is the certificate authority: its authorities, of which one signs, and
// the server's own certificate.
type ca struct {
	td                     spiffeid.TrustDomain
	ttl, svidTTL, agentTTL time.Duration
	now                    func() time.Time
	store                  *store

	mu        sync.Mutex // guards the following
	trust     trust
	active    *authority
	next      *authority // in the bundle, not signing yet; nil: none
	server    *tls.Certificate
	serverDue time.Time // when server is to be replaced
	unsaved   bool      // a write to the store failed; turn tries again
}

func newCA(cfg Config, st *store) (*ca, error) {
	c := &ca{td: cfg.TrustDomain, ttl: cfg.CATTL, svidTTL: cfg.SVIDTTL, agentTTL: cfg.AgentTTL, now: cfg.Now, store: st}
	if err := c.load(); err != nil {
		return nil, err
	}
	if err := c.turn(); err != nil {
		return nil, err
	}
	// Made now, not at the first handshake: who has today's bundle must be
	// able to connect after a rotation too.
	_, err := c.serverCertificate()
	return c, err
}

// newAuthority makes keys and a self-signed certificate. SPIFFE X509-SVID
// section 4.1 asks for CA and keyCertSign, section 2 for the trust domain's ID
// without a path.
func (c *ca) newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	jwt, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := c.now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Narthex development server"}, SerialNumber: serial.String()},
		URIs:                  []*url.URL{c.td.ID().URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(c.ttl),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	if tmpl.SubjectKeyId, err = keyID(&key.PublicKey); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return loadAuthority(der, key, jwt)
}

func loadAuthority(der []byte, key, jwt *ecdsa.PrivateKey) (*authority, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("an authority's key is not the one in its certificate")
	}
	kid, err := keyID(&jwt.PublicKey)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, jwt: jwt, kid: hex.EncodeToString(kid)}, nil
}

// keyID names a public key: the leftmost 160 bits of the SHA-256 of its
// SubjectPublicKeyInfo (RFC 7093 section 2, method 4).
func keyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(der)
	return sum[:20], nil
}

// newSerial returns 128 random bits, never zero (RFC 5280 section 4.1.2.2).
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return nil, err
	}
	return n.Add(n, big.NewInt(1)), nil
}

// bundle is what is trusted now.
func (c *ca) bundle() trust {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.trust
}

// signer is the authority that signs now.
func (c *ca) signer() *authority {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.active
}

// signAgent signs an agent's own SVID.
func (c *ca) signAgent(id spiffeid.ID, pub crypto.PublicKey) (*x509.Certificate, error) {
	return c.sign(c.signer(), id, pub, nil, c.agentTTL)
}

// signWorkload signs a workload's SVID; no ttl means the default.
func (c *ca) signWorkload(id spiffeid.ID, pub crypto.PublicKey, dnsNames []string, ttl time.Duration) (*x509.Certificate, error) {
	if ttl == 0 {
		ttl = c.svidTTL
	}
	return c.sign(c.signer(), id, pub, dnsNames, ttl)
}

// sign issues a leaf as SPIFFE X509-SVID sections 2, 4 and appendix A have it.
// It never outlives the authority.
func (c *ca) sign(by *authority, id spiffeid.ID, pub crypto.PublicKey, dnsNames []string, ttl time.Duration) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	subjectKeyID, err := keyID(pub)
	if err != nil {
		return nil, err
	}
	now := c.now()
	notAfter := now.Add(ttl)
	if notAfter.After(by.cert.NotAfter) {
		notAfter = by.cert.NotAfter
	}
	if !notAfter.After(now) {
		return nil, errors.New("the signing authority has expired")
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Narthex development server"}},
		URIs:                  []*url.URL{id.URL()},
		DNSNames:              dnsNames,
		NotBefore:             now.Add(-backdate),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          subjectKeyID,
	}
	if len(dnsNames) > 0 {
		tmpl.Subject.CommonName = dnsNames[0] // as the real server does
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, pub, by.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// serverCertificate is the server's own SVID, spiffe://<td>/spire/server.
func (c *ca) serverCertificate() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if c.server != nil && now.Before(c.serverDue) {
		return c.server, nil
	}
	id, err := spiffeid.FromPath(c.td, "/spire/server")
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := c.sign(c.active, id, &key.PublicKey, nil, serverTTL)
	if err != nil {
		return nil, fmt.Errorf("sign the server's own certificate: %w", err)
	}
	c.server = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	c.serverDue = now.Add(leaf.NotAfter.Sub(now) / 2)
	return c.server, nil
}

// turn does what is due: it forgets expired authorities, prepares a successor
// at the half of the active one's life, and lets it sign from five sixths on.
func (c *ca) turn() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if c.next != nil && c.expired(c.next) { // the machine slept for long
		c.next = nil
	}
	switch {
	case c.active == nil || !now.Before(c.active.cert.NotAfter):
		if c.next == nil {
			if err := c.prepare(); err != nil {
				return err
			}
		}
		return c.activate()
	case !now.Before(c.active.cert.NotAfter.Add(-c.ttl / 6)):
		if c.next != nil {
			return c.activate()
		}
		return c.prepare()
	case c.next == nil && !now.Before(c.active.cert.NotAfter.Add(-c.ttl/2)):
		return c.prepare()
	case slices.ContainsFunc(c.trust.authorities, c.expired):
		c.publish(c.trust.authorities, c.trust.tainted)
		return c.save()
	case c.unsaved:
		return c.save()
	}
	return nil
}

// rotate prepares a successor, if there is none yet, and lets it sign.
func (c *ca) rotate() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.next == nil {
		if err := c.prepare(); err != nil {
			return fmt.Errorf("prepare a new authority: %w", err)
		}
	}
	return c.activate()
}

// taint marks all but the active authority. A tainted server certificate is
// replaced at once.
func (c *ca) taint() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	tainted := make(map[*authority]bool)
	for _, a := range c.trust.authorities {
		if a != c.active && a != c.next {
			tainted[a] = true
		}
	}
	c.publish(c.trust.authorities, tainted)
	c.serverDue = time.Time{}
	return c.save()
}

// prepare puts a new authority in the bundle. The caller holds mu.
func (c *ca) prepare() error {
	a, err := c.newAuthority()
	if err != nil {
		return err
	}
	c.next = a
	c.publish(append(slices.Clone(c.trust.authorities), a), c.trust.tainted)
	return c.save()
}

// activate lets the prepared authority sign. The caller holds mu.
func (c *ca) activate() error {
	c.active, c.next = c.next, nil
	c.publish(c.trust.authorities, c.trust.tainted)
	return c.save()
}

// publish makes a new bundle of those that have not expired. The caller holds
// mu.
func (c *ca) publish(authorities []*authority, tainted map[*authority]bool) {
	c.trust = trust{
		authorities: slices.DeleteFunc(slices.Clone(authorities), c.expired),
		tainted:     tainted,
		sequence:    c.trust.sequence + 1,
	}
}

func (c *ca) expired(a *authority) bool { return !c.now().Before(a.cert.NotAfter) }

// keptAuthorities is the document in Config.Dir.
type keptAuthorities struct {
	Sequence    uint64          `json:"sequence"`
	Authorities []keptAuthority `json:"authorities"`
}

type keptAuthority struct {
	Certificate []byte `json:"certificate"` // DER
	Key         []byte `json:"key"`         // PKCS #8
	JWTKey      []byte `json:"jwt_key"`     // PKCS #8
	Tainted     bool   `json:"tainted,omitempty"`
	Active      bool   `json:"active,omitempty"`
	Next        bool   `json:"next,omitempty"`
}

// save writes the authorities down. The caller holds mu.
func (c *ca) save() error {
	if c.store == nil {
		return nil
	}
	c.unsaved = true
	kept := keptAuthorities{Sequence: c.trust.sequence}
	for _, a := range c.trust.authorities {
		key, err := x509.MarshalPKCS8PrivateKey(a.key)
		if err != nil {
			return err
		}
		jwt, err := x509.MarshalPKCS8PrivateKey(a.jwt)
		if err != nil {
			return err
		}
		kept.Authorities = append(kept.Authorities, keptAuthority{
			Certificate: a.cert.Raw, Key: key, JWTKey: jwt,
			Tainted: c.trust.tainted[a], Active: a == c.active, Next: a == c.next,
		})
	}
	if err := c.store.write(authoritiesFile, kept); err != nil {
		return err
	}
	c.unsaved = false
	return nil
}

// load reads the authorities back, if there are any.
func (c *ca) load() error {
	var kept keptAuthorities
	found, err := c.store.read(authoritiesFile, &kept)
	if err != nil || !found {
		return err
	}
	c.trust = trust{tainted: make(map[*authority]bool), sequence: kept.Sequence}
	for _, k := range kept.Authorities {
		a, err := k.authority()
		if err != nil {
			return c.store.corrupt(authoritiesFile, err)
		}
		if len(a.cert.URIs) != 1 || a.cert.URIs[0].String() != c.td.IDString() {
			return fmt.Errorf("%s holds the authority of another trust domain (%v), not of %s; choose another directory", c.store.dir, a.cert.URIs, c.td.IDString())
		}
		c.trust.authorities = append(c.trust.authorities, a)
		c.trust.tainted[a] = k.Tainted
		if k.Active {
			c.active = a
		}
		if k.Next {
			c.next = a
		}
	}
	return nil
}

func (k keptAuthority) authority() (*authority, error) {
	key, err := parseKey(k.Key)
	if err != nil {
		return nil, err
	}
	jwt, err := parseKey(k.JWTKey)
	if err != nil {
		return nil, err
	}
	return loadAuthority(k.Certificate, key, jwt)
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fmt.Errorf("want an EC P-256 key, found %T", key)
	}
	return ec, nil
}
