package sigstore

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	issuerA  = "https://accounts.example.org"
	subjectA = "release@example.org"
)

// fakeSigstore stands for Fulcio, its CT log and Rekor, whose keys nobody but
// their operators has. Its certificates, SCTs and promises have the form of
// the real ones; testdata has some of those.
type fakeSigstore struct {
	t                   testing.TB
	root, middle        *x509.Certificate
	rootKey, middleKey  *ecdsa.PrivateKey
	rekorKey, ctKey     *ecdsa.PrivateKey
	rekorSince, rekorTo time.Time
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newFakeSigstore(t testing.TB) *fakeSigstore {
	t.Helper()
	f := &fakeSigstore{t: t, rootKey: newKey(t), middleKey: newKey(t), rekorKey: newKey(t), ctKey: newKey(t)}
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-10000 * time.Hour), NotAfter: time.Now().Add(10000 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	f.root = f.certify(ca("root"), ca("root"), f.rootKey.Public(), f.rootKey)
	f.middle = f.certify(ca("middle"), f.root, f.middleKey.Public(), f.rootKey)
	f.rekorSince = time.Now().Add(-9000 * time.Hour)
	return f
}

func (f *fakeSigstore) certify(template, parent *x509.Certificate, key crypto.PublicKey, by crypto.Signer) *x509.Certificate {
	f.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, by)
	if err != nil {
		f.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		f.t.Fatal(err)
	}
	return cert
}

// trustedRoot is the file that says what to believe.
func (f *fakeSigstore) trustedRoot() []byte {
	f.t.Helper()
	log := func(key *ecdsa.PrivateKey, from, to time.Time) map[string]any {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			f.t.Fatal(err)
		}
		valid := map[string]any{"start": from}
		if !to.IsZero() {
			valid["end"] = to
		}
		return map[string]any{"publicKey": map[string]any{"rawBytes": der, "validFor": valid}}
	}
	text, err := json.Marshal(map[string]any{
		"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
		"tlogs":     []any{log(f.rekorKey, f.rekorSince, f.rekorTo)},
		"ctlogs":    []any{log(f.ctKey, f.rekorSince, time.Time{})},
		"certificateAuthorities": []any{map[string]any{
			"certChain": map[string]any{"certificates": []any{
				map[string]any{"rawBytes": f.middle.Raw}, map[string]any{"rawBytes": f.root.Raw},
			}},
			"validFor": map[string]any{"start": f.rekorSince},
		}},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return text
}

// signing is one signature as it should be; tests change it.
type signing struct {
	fake    *fakeSigstore
	digest  string // of the image, in hexadecimal
	subject string // a mail address, or a URI
	issuer  string
	at      time.Time // when the certificate begins
	life    time.Duration
	logged  time.Duration // after at
	noSCT   bool
	noTlog  bool
	ctKey   *ecdsa.PrivateKey
	rekor   *ecdsa.PrivateKey

	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func (f *fakeSigstore) signing(digest string, change func(*signing)) *signing {
	s := &signing{
		fake: f, digest: digest, subject: subjectA, issuer: issuerA,
		at: time.Now().Add(-1000 * time.Hour).Truncate(time.Second), life: 10 * time.Minute, logged: time.Minute,
		ctKey: f.ctKey, rekor: f.rekorKey, key: newKey(f.t),
	}
	if change != nil {
		change(s)
	}
	s.issue()
	return s
}

// issue makes the certificate: first without SCT, which the CT log signs,
// then with it.
func (s *signing) issue() {
	t := s.fake.t
	der, err := asn1.MarshalWithParams(s.issuer, "utf8")
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: s.at, NotAfter: s.at.Add(s.life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		ExtraExtensions: []pkix.Extension{{Id: oidIssuer, Value: []byte(s.issuer)}, {Id: oidIssuerDER, Value: der}},
	}
	if u, err := url.Parse(s.subject); err == nil && u.Scheme != "" {
		template.URIs = []*url.URL{u}
	} else {
		template.EmailAddresses = []string{s.subject}
	}
	pre := s.fake.certify(template, s.fake.middle, s.key.Public(), s.fake.middleKey)
	if s.noSCT {
		s.cert = pre
		return
	}
	one := sct{log: keyID(t, s.ctKey), timestamp: uint64(s.at.UnixMilli())}
	message := one.message(sha256.Sum256(s.fake.middle.RawSubjectPublicKeyInfo), pre.RawTBSCertificate)
	list := one.log[:]
	list = append([]byte{0}, list...)
	list = binary.BigEndian.AppendUint64(list, one.timestamp)
	list = append(list, 0, 0, 4, 3)
	list = appendVector(list, signASN1(t, s.ctKey, message))
	value, err := asn1.Marshal(appendVector(nil, appendVector(nil, list)))
	if err != nil {
		t.Fatal(err)
	}
	template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: oidSCTs, Value: value})
	s.cert = s.fake.certify(template, s.fake.middle, s.key.Public(), s.fake.middleKey)
}

func appendVector(b, value []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(value))), value...)
}

func signASN1(t testing.TB, key *ecdsa.PrivateKey, message []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(message)
	signature, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

func keyID(t testing.TB, key *ecdsa.PrivateKey) logID {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(der)
}

func (s *signing) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.cert.Raw})
}

func payloadOf(digest string) []byte {
	return fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":"app"},"image":{"docker-manifest-digest":"sha256:%s"},"type":"cosign container image signature"},"optional":null}`, digest)
}

// layer is a layer as the registry stores it, and its content.
type layer struct {
	media       string
	content     []byte
	annotations map[string]string
	digest      string // when not that of the content
	size        int    // when not that of the content
}

// signature signs the payload of the image.
func (s *signing) signature() layer {
	payload := payloadOf(s.digest)
	signature := signASN1(s.fake.t, s.key, payload)
	body, err := json.Marshal(map[string]any{"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": map[string]any{
		"data":      map[string]any{"hash": map[string]any{"algorithm": "sha256", "value": digestOf(payload)}},
		"signature": map[string]any{"content": signature, "publicKey": map[string]any{"content": s.pem()}},
	}})
	if err != nil {
		s.fake.t.Fatal(err)
	}
	return s.layer(mediaSimpleSigning, payload, base64.StdEncoding.EncodeToString(signature), body)
}

// attestation signs a statement about the image.
func (s *signing) attestation() layer {
	statement := fmt.Appendf(nil, `{"_type":"https://in-toto.io/Statement/v0.1","subject":[{"name":"app","digest":{"sha256":"%s"}}],"predicateType":"x","predicate":{}}`, s.digest)
	pae := fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(inTotoType), inTotoType, len(statement), statement)
	envelope, err := json.Marshal(map[string]any{
		"payloadType": inTotoType, "payload": statement,
		"signatures": []any{map[string]any{"keyid": "", "sig": signASN1(s.fake.t, s.key, pae)}},
	})
	if err != nil {
		s.fake.t.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{"apiVersion": "0.0.1", "kind": "dsse", "spec": map[string]any{
		"envelopeHash": map[string]any{"algorithm": "sha256", "value": digestOf(envelope)},
		"signatures":   []any{map[string]any{"signature": "x", "verifier": s.pem()}},
	}})
	if err != nil {
		s.fake.t.Fatal(err)
	}
	return s.layer(mediaDSSE, envelope, "", body)
}

func (s *signing) layer(media string, content []byte, signature string, body []byte) layer {
	l := layer{media: media, content: content, annotations: map[string]string{
		"dev.cosignproject.cosign/signature": signature,
		"dev.sigstore.cosign/certificate":    string(s.pem()),
	}}
	if !s.noTlog {
		l.annotations["dev.sigstore.cosign/bundle"] = s.promise(body)
	}
	return l
}

func (s *signing) promise(body []byte) string {
	id := keyID(s.fake.t, s.rekor)
	p := map[string]any{
		"body": base64.StdEncoding.EncodeToString(body), "integratedTime": s.at.Add(s.logged).Unix(),
		"logIndex": 42, "logID": hex.EncodeToString(id[:]),
	}
	canonical, err := json.Marshal(p) // sorts keys
	if err != nil {
		s.fake.t.Fatal(err)
	}
	text, err := json.Marshal(map[string]any{"SignedEntryTimestamp": signASN1(s.fake.t, s.rekor, canonical), "Payload": p})
	if err != nil {
		s.fake.t.Fatal(err)
	}
	return string(text)
}

// fakeRegistry answers from memory. The end-to-end test has a real one.
type fakeRegistry struct {
	*httptest.Server
	mu        sync.Mutex // guards the following
	paths     map[string][]byte
	requests  []*http.Request
	intercept http.HandlerFunc // instead of what is stored, unless nil
}

func newFakeRegistry(t testing.TB) *fakeRegistry {
	t.Helper()
	r := &fakeRegistry{paths: map[string][]byte{}}
	r.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.requests = append(r.requests, req.Clone(req.Context()))
		body, ok := r.paths[req.URL.Path]
		intercept := r.intercept
		r.mu.Unlock()
		switch {
		case intercept != nil:
			intercept(w, req)
		case ok:
			w.Write(body)
		default:
			http.NotFound(w, req)
		}
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *fakeRegistry) host() string { return strings.TrimPrefix(r.URL, "https://") }

func (r *fakeRegistry) image(digest string) string { return r.host() + "/team/app@sha256:" + digest }

func (r *fakeRegistry) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.requests)
}

func (r *fakeRegistry) handle(h http.HandlerFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.intercept = h
}

// store puts layers beside an image.
func (r *fakeRegistry) store(t testing.TB, digest, suffix string, layers ...layer) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range layers {
		r.paths["/v2/team/app/blobs/sha256:"+digestOf(l.content)] = l.content
		if l.digest != "" {
			r.paths["/v2/team/app/blobs/sha256:"+l.digest] = l.content
		}
	}
	r.paths["/v2/team/app/manifests/sha256-"+digest+suffix] = manifestOf(t, layers...)
}

func manifestOf(t testing.TB, layers ...layer) []byte {
	t.Helper()
	list := []any{}
	for _, l := range layers {
		digest, size := l.digest, l.size
		if digest == "" {
			digest = digestOf(l.content)
		}
		if size == 0 {
			size = len(l.content)
		}
		list = append(list, map[string]any{"mediaType": l.media, "digest": "sha256:" + digest, "size": size, "annotations": l.annotations})
	}
	text, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": mediaOCIManifest, "layers": list})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// house is a verifier with all that it asks.
type house struct {
	fake     *fakeSigstore
	registry *fakeRegistry
	root     string // path
	digest   string // of an image
	verifier *Verifier
}

func newHouse(t testing.TB, change func(*Config)) *house {
	t.Helper()
	h := &house{fake: newFakeSigstore(t), registry: newFakeRegistry(t), digest: digestOf([]byte("image"))}
	dir := t.TempDir()
	h.root = filepath.Join(dir, "trusted_root.json")
	write(t, h.root, h.fake.trustedRoot())
	ca := filepath.Join(dir, "ca.pem")
	write(t, ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.registry.Certificate().Raw}))
	c := Config{
		TrustedRoot:       h.root,
		AllowedIdentities: map[string][]string{issuerA: {subjectA}},
		Registries:        map[string]Registry{h.registry.host(): {CA: ca}},
	}
	if change != nil {
		change(&c)
	}
	var err error
	if h.verifier, err = New(c); err != nil {
		t.Fatal(err)
	}
	return h
}

func write(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (h *house) image() string { return h.registry.image(h.digest) }
