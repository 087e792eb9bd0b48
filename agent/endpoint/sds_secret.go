package endpoint

import (
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/narthex-id/narthex/agent/registry"
)

// version is what a secret, or several, are told apart by: a hash of what is in
// them, so that it is the same on each stream and from each agent.
type version [16]byte

func (v version) String() string { return hex.EncodeToString(v[:]) }

// parseVersion returns the zero version for what is none of ours.
func parseVersion(s string) (v version) {
	if len(s) != hex.EncodedLen(len(v)) {
		return version{}
	}
	if _, err := hex.Decode(v[:], []byte(s)); err != nil {
		return version{}
	}
	return v
}

// versionOf returns that of these parts in this order.
func versionOf(parts ...[]byte) (v version) {
	h := sha256.New()
	var size [8]byte
	for _, part := range parts {
		binary.BigEndian.PutUint64(size[:], uint64(len(part)))
		h.Write(size[:])
		h.Write(part)
	}
	copy(v[:], h.Sum(nil))
	return v
}

// versionOfAll returns that of secrets in the order of their names.
func versionOfAll(secrets []*secret) version {
	parts := make([][]byte, len(secrets))
	for i, x := range secrets {
		parts[i] = x.version[:]
	}
	return versionOf(parts...)
}

// secret is one resource of SDS: an SVID (tls_certificate) or bundles to verify
// peers with (validation_context).
type secret struct {
	name    string
	wild    bool // one of those that a wildcard asks for
	version version

	svid    *registry.SVID
	bundles []*registry.Bundle // nil for an SVID

	once sync.Once // makes the following
	body mem.BufferSlice
}

// secretSet is what the callers of one view may have. It is immutable.
type secretSet struct {
	key     secretKey
	secrets []*secret // sorted by name, no name twice
	partial bool      // an SVID is missing that is to be there

	mu    sync.Mutex // guards the following
	texts []any      // keys of what it uses of secrets.texts
}

type secretKey struct {
	view *registry.View
	// rootsOnly: bundles are a trusted_ca, not the configuration of Envoy's
	// SPIFFE validator.
	rootsOnly bool
}

func (s *secretSet) find(name string) *secret {
	at, found := slices.BinarySearchFunc(s.secrets, name, func(x *secret, name string) int {
		return strings.Compare(x.name, name)
	})
	if !found {
		return nil
	}
	return s.secrets[at]
}

// secrets holds what is sent to Envoys for as long as a stream's newest answer
// is of it. A bundle's PEM is in memory once, in however many sets it is.
type secrets struct {
	sds       SDS
	anonymous bool // callers without an entry have the own bundle
	sets      shared[secretKey, *secretSet]
	texts     shared[any, pemText] // by *registry.SVID or *registry.Bundle
}

func newSecrets(sds SDS, anonymous bool) secrets {
	return secrets{sds: sds, anonymous: anonymous, sets: newShared[secretKey, *secretSet](), texts: newShared[any, pemText]()}
}

// acquire returns what a view gives. It is followed by one release.
func (s *secrets) acquire(key secretKey) *secretSet {
	return s.sets.acquire(key, func() *secretSet { return s.of(key) })
}

// release gives a set back; nil is none.
func (s *secrets) release(set *secretSet) {
	if set == nil || !s.sets.release(set.key) {
		return
	}
	for _, key := range set.texts { // nobody else has the set any more
		s.texts.release(key)
	}
}

// of lists the secrets of a view by their names.
func (s *secrets) of(key secretKey) *secretSet {
	view := key.view
	set := &secretSet{key: key, partial: view.Pending > 0}
	if stands := standingOf(view); stands == unsynced || stands == denied && !s.anonymous {
		return set
	}
	for i, id := range view.Identities {
		if i == 0 {
			set.addSVID(s.sds.DefaultSVIDName, id.SVID, false)
		}
		set.addSVID(id.SVID.ID.String(), id.SVID, true)
	}
	var all []*registry.Bundle
	if hasBundle(view) {
		all = append(all, view.Bundle)
		set.addBundles(s.sds.DefaultBundleName, []*registry.Bundle{view.Bundle}, false)
	}
	for _, b := range view.Federated {
		if len(b.DER) > 0 { // one without authorities is no bundle to clients
			all = append(all, b)
		}
	}
	slices.SortFunc(all, func(a, b *registry.Bundle) int {
		return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name())
	})
	for _, b := range all {
		set.addBundles(b.TrustDomain.IDString(), []*registry.Bundle{b}, true)
	}
	if len(all) > 0 && !key.rootsOnly {
		// Roots alone do not say which trust domain each is good for: all
		// could vouch for the identities of all.
		set.addBundles(s.sds.DefaultAllBundlesName, all, false)
	}
	slices.SortStableFunc(set.secrets, func(a, b *secret) int { return strings.Compare(a.name, b.name) })
	// Of two entries with one SPIFFE ID the first in their order counts.
	set.secrets = slices.CompactFunc(set.secrets, func(a, b *secret) bool { return a.name == b.name })
	return set
}

func (s *secretSet) addSVID(name string, svid *registry.SVID, wild bool) {
	// The chain has the public key: no need to let anything follow from the
	// private one.
	s.secrets = append(s.secrets, &secret{
		name: name, wild: wild, svid: svid,
		version: versionOf([]byte("tls_certificate"), []byte(name), svid.Chain),
	})
}

func (s *secretSet) addBundles(name string, bundles []*registry.Bundle, wild bool) {
	kind := spiffeValidator
	if s.key.rootsOnly {
		kind = "trusted_ca"
	}
	parts := [][]byte{[]byte(kind), []byte(name)}
	for _, b := range bundles {
		parts = append(parts, []byte(b.TrustDomain.Name()), b.DER)
	}
	s.secrets = append(s.secrets, &secret{name: name, wild: wild, bundles: bundles, version: versionOf(parts...)})
}

// message returns the secret as SDS sends it, which is made once.
func (s *secrets) message(set *secretSet, x *secret) mem.BufferSlice {
	x.once.Do(func() {
		var w wire
		w.text(secretName, x.name)
		if x.svid != nil {
			text := s.text(set, x.svid, func() pemText { return pemOfSVID(x.svid) })
			w.tlsCertificate(text)
		} else {
			texts := make([][]byte, len(x.bundles))
			for i, b := range x.bundles {
				texts[i] = s.text(set, b, func() pemText { return pemText{certificates: pemOfChain(b.DER)} }).certificates
			}
			if set.key.rootsOnly {
				w.trustedCA(texts[0])
			} else {
				w.spiffeValidator(x.bundles, texts)
			}
		}
		x.body = w.done()
	})
	return x.body
}

// text returns the PEM of an SVID or a bundle, which the set uses from now on.
func (s *secrets) text(set *secretSet, of any, make func() pemText) pemText {
	set.mu.Lock()
	defer set.mu.Unlock()
	set.texts = append(set.texts, of)
	return s.texts.acquire(of, make)
}

// pemText is an SVID or a bundle as Envoy reads it.
type pemText struct{ certificates, key []byte }

func pemOfSVID(svid *registry.SVID) pemText {
	return pemText{pemOfChain(svid.Chain), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: svid.Key})}
}

// pemOfChain makes PEM of concatenated DER certificates, which were parsed
// before.
func pemOfChain(der []byte) (text []byte) {
	for len(der) > 0 {
		var one asn1.RawValue
		rest, err := asn1.Unmarshal(der, &one)
		if err != nil {
			return nil // Envoy refuses a secret without certificates
		}
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: one.FullBytes})...)
		der = rest
	}
	return slices.Clip(text)
}

// Field numbers and names of Envoy's API, version 3: core/v3/base.proto,
// core/v3/extension.proto and extensions/transport_sockets/tls/v3.
const (
	secretName           protowire.Number = 1 // Secret
	secretTLSCertificate protowire.Number = 2
	secretValidation     protowire.Number = 4

	certificateChain protowire.Number = 1 // TlsCertificate
	certificateKey   protowire.Number = 2

	validationTrustedCA protowire.Number = 1 // CertificateValidationContext
	validationCustom    protowire.Number = 12

	extensionName   protowire.Number = 1 // TypedExtensionConfig
	extensionConfig protowire.Number = 2

	validatorTrustDomain protowire.Number = 1 // SPIFFECertValidatorConfig
	trustDomainName      protowire.Number = 1 // its TrustDomain
	trustDomainBundle    protowire.Number = 2

	sourceInlineBytes protowire.Number = 2 // DataSource

	anyType  protowire.Number = 1 // google.protobuf.Any
	anyValue protowire.Number = 2

	spiffeValidator     = "envoy.tls.cert_validator.spiffe"
	spiffeValidatorType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig"
)

func (w *wire) tlsCertificate(text pemText) {
	chain, key := dataSourceSize(text.certificates), dataSourceSize(text.key)
	w.open(secretTLSCertificate, fieldSize(certificateChain, chain)+fieldSize(certificateKey, key))
	w.dataSource(certificateChain, text.certificates)
	w.dataSource(certificateKey, text.key)
}

func (w *wire) trustedCA(text []byte) {
	w.open(secretValidation, fieldSize(validationTrustedCA, dataSourceSize(text)))
	w.dataSource(validationTrustedCA, text)
}

func (w *wire) spiffeValidator(bundles []*registry.Bundle, texts [][]byte) {
	domains := make([]int, len(bundles))
	config := 0
	for i, b := range bundles {
		domains[i] = fieldSize(trustDomainName, len(b.TrustDomain.Name())) + fieldSize(trustDomainBundle, dataSourceSize(texts[i]))
		config += fieldSize(validatorTrustDomain, domains[i])
	}
	typed := fieldSize(anyType, len(spiffeValidatorType)) + fieldSize(anyValue, config)
	extension := fieldSize(extensionName, len(spiffeValidator)) + fieldSize(extensionConfig, typed)
	w.open(secretValidation, fieldSize(validationCustom, extension))
	w.open(validationCustom, extension)
	w.text(extensionName, spiffeValidator)
	w.open(extensionConfig, typed)
	w.text(anyType, spiffeValidatorType)
	w.open(anyValue, config)
	for i, b := range bundles {
		w.open(validatorTrustDomain, domains[i])
		w.text(trustDomainName, b.TrustDomain.Name())
		w.dataSource(trustDomainBundle, texts[i])
	}
}

func dataSourceSize(b []byte) int { return fieldSize(sourceInlineBytes, len(b)) }

func (w *wire) dataSource(field protowire.Number, b []byte) {
	w.open(field, dataSourceSize(b))
	w.shared(sourceInlineBytes, b)
}
