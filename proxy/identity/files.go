package identity

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/watch"
)

// FilePaths names the PEM files that something else (cert-manager, Vault
// agent, spiffe-helper, a script) keeps fresh.
type FilePaths struct {
	Cert    string                          // the SVID, leaf first, then its intermediates
	Key     string                          // its key: PKCS #8, PKCS #1 or SEC 1; may be the same file
	Bundle  string                          // authorities of the SVID's own trust domain
	Bundles map[spiffeid.TrustDomain]string // of other trust domains
}

// FilesConfig says where an identity is kept.
type FilesConfig struct {
	FilePaths

	// TrustDomain is the trust domain the SVID must be of. Zero: any.
	TrustDomain spiffeid.TrustDomain

	// Poll is how often the files are read whether or not a change was
	// announced: file systems are there that announce none. Default
	// watch.DefaultPoll.
	Poll time.Duration
	Log  hclog.Logger
}

// Files is a source of one identity from files. It reads them again when
// they change, also through the symlink swaps of Kubernetes volumes. Files
// that do not fit together (a certificate without its key yet, a PEM block
// cut short, an SVID of another authority than the bundle's, or one that has
// expired) are never used: the last good ones serve on, with one log line,
// until the rest has been written.
type Files struct {
	*store
	config FilesConfig
	log    hclog.Logger
	cancel context.CancelFunc
	loop   sync.WaitGroup

	loading sync.Mutex        // guards the following, and config.FilePaths; held while files are read
	seen    [sha256.Size]byte // of what was last put in force
	warned  time.Time         // NotAfter of the SVID whose end was warned of
	ended   time.Time         // NotAfter of the SVID that was said to have ended
}

const (
	maxFileSize = 4 << 20
	lateFactor  = 5 // an SVID is late when less than a fifth of its life is left
)

// NewFiles reads the files and watches them until Close. Files that are not
// there yet, or not good, are no error: the reason stands in the leases and
// in the report, and they are used once they are good.
func NewFiles(c FilesConfig) (*Files, error) {
	if c.Cert == "" || c.Key == "" || c.Bundle == "" {
		return nil, errors.New("source files: cert, key and bundle must be named")
	}
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &Files{store: newStore("files", errors.New("no files read yet")), config: c, log: c.Log, cancel: cancel}
	f.load()
	f.loop.Go(func() {
		watch.Files(ctx, watch.Config{Paths: f.paths, Changed: f.load, Poll: c.Poll, Log: c.Log})
	})
	return f, nil
}

// CheckFiles reads the files once, as NewFiles does, and returns whose identity
// they hold, or why they would not be used.
func CheckFiles(c FilesConfig) (spiffeid.ID, error) {
	f := &Files{store: newStore("files", nil), config: c, log: hclog.NewNullLogger()}
	m, err := f.read()
	if err == nil {
		err = f.checkTime(m)
	}
	if err != nil {
		return spiffeid.ID{}, err
	}
	return m.id, nil
}

// Configure names other files. Those of before stay in force until the new
// ones are good; they are read before it returns.
func (f *Files) Configure(paths FilePaths) {
	f.loading.Lock()
	f.config.FilePaths = paths
	f.loading.Unlock()
	f.load()
}

// Close stops watching and waits for that to end.
func (f *Files) Close() error {
	f.cancel()
	f.loop.Wait()
	return nil
}

func (f *Files) paths() []string {
	f.loading.Lock()
	defer f.loading.Unlock()
	paths := []string{f.config.Cert, f.config.Key, f.config.Bundle}
	for _, p := range f.config.Bundles {
		paths = append(paths, p)
	}
	return paths
}

// material is what the files hold.
type material struct {
	cert        tls.Certificate
	id          spiffeid.ID
	authorities map[spiffeid.TrustDomain][]*x509.Certificate
	sum         [sha256.Size]byte // tells one set of contents from another
}

// load reads the files and puts them in force when they are good and new.
func (f *Files) load() {
	f.loading.Lock()
	defer f.loading.Unlock()
	m, err := f.read()
	known := err == nil && m.sum == f.seen
	if err == nil {
		err = f.checkTime(m)
	}
	if err != nil {
		if m != nil {
			f.narrow(m.authorities)
		} else {
			f.narrow(f.remaining())
		}
		f.seen = [sha256.Size]byte{} // what was in force is so no more, also if its files come back
	}
	if err == nil && !known {
		if err = f.set([]SVID{{Certificate: m.cert}}, m.authorities); err == nil {
			f.seen = m.sum
			f.log.Info("files in force", "cert", f.config.Cert, "spiffe_id", m.id, "not_after", m.cert.Leaf.NotAfter.UTC())
		}
	}
	if err == nil {
		f.settled()
	} else if news, waiting := f.trouble(err); news && !known { // the end of what is in force is warnExpiry's to say
		what := "files are not good: what was read before stays in force"
		if waiting {
			what = "files are not good: there is no identity, and connections are refused until they are"
		}
		f.log.Warn(what, "reason", err)
	}
	f.warnExpiry()
}

// remaining returns, of each domain that is trusted, what its file holds by
// now, whatever is wrong with the others: what of it is gone was withdrawn. A
// file that is not good itself says nothing.
func (f *Files) remaining() map[spiffeid.TrustDomain][]*x509.Certificate {
	f.mu.Lock()
	ids, trust := f.identities, f.trust
	f.mu.Unlock()
	left := map[spiffeid.TrustDomain][]*x509.Certificate{}
	for td, d := range trust.domains {
		path, named := f.config.Bundles[td]
		if !named && len(ids) > 0 && td == ids[0].ID.TrustDomain() {
			path, named = f.config.Bundle, true
		}
		if !named {
			continue
		}
		left[td] = d.authorities
		if data, err := readPEM(path); err == nil {
			if now, err := parseAuthorities(data); err == nil {
				left[td] = now
			}
		}
	}
	return left
}

// checkTime refuses a certificate that has ended: it would prove nothing to
// anybody, and an older one may have longer to live. One whose time has not
// come waits while that older one is good; where there is none it is used, as
// it may be our clock that is wrong.
func (f *Files) checkTime(m *material) error {
	now, begin, end := time.Now(), m.cert.Leaf.NotBefore, m.cert.Leaf.NotAfter
	if now.After(end) {
		return fmt.Errorf("proxy.files.cert %s: %w at %s; have it renewed", f.config.Cert, ErrExpired, end.UTC().Format(time.RFC3339))
	}
	f.mu.Lock()
	serving := len(f.identities) > 0 && now.Before(f.identities[0].NotAfter())
	f.mu.Unlock()
	if now.Before(begin) && serving {
		return fmt.Errorf("proxy.files.cert %s: the certificate begins at %s only; are the clocks right?", f.config.Cert, begin.UTC().Format(time.RFC3339))
	}
	return nil
}

// warnExpiry warns once of an SVID that should have been renewed by now, and
// once of one that has ended.
func (f *Files) warnExpiry() {
	f.mu.Lock()
	ids := f.identities
	f.mu.Unlock()
	if len(ids) == 0 {
		return
	}
	leaf := ids[0].Certificate.Leaf
	left := time.Until(leaf.NotAfter)
	pairs := []any{"cert", f.config.Cert, "spiffe_id", ids[0].ID, "not_after", leaf.NotAfter.UTC()}
	switch {
	case left <= 0 && !f.ended.Equal(leaf.NotAfter):
		f.ended = leaf.NotAfter
		f.log.Warn("the certificate has expired and was not renewed: new connections are refused", pairs...)
	case left > 0 && left <= leaf.NotAfter.Sub(leaf.NotBefore)/lateFactor && !f.warned.Equal(leaf.NotAfter):
		f.warned = leaf.NotAfter
		f.log.Warn("the certificate file is about to expire and was not renewed", append(pairs, "left", left.Round(time.Second))...)
	}
}

// read reads all files and checks that they fit together. With an error, the
// material is that of bundles which are good in themselves, or nil.
func (f *Files) read() (*material, error) {
	hash := sha256.New()
	take := func(key, path string) ([]byte, error) {
		data, err := readPEM(path)
		if err != nil {
			return nil, fmt.Errorf("%s %w", key, err)
		}
		one := sha256.Sum256(data) // of each file: where one ends matters
		_, _ = hash.Write(one[:])  // never fails
		return data, nil
	}
	m := &material{authorities: map[spiffeid.TrustDomain][]*x509.Certificate{}}
	certPEM, err := take("proxy.files.cert", f.config.Cert)
	if err != nil {
		return nil, err
	}
	keyPEM, err := take("proxy.files.key", f.config.Key)
	if err != nil {
		return nil, err
	}
	if err := f.pair(m, certPEM, keyPEM); err != nil {
		return nil, err
	}
	bundles := map[spiffeid.TrustDomain]string{m.id.TrustDomain(): f.config.Bundle}
	for td, path := range f.config.Bundles {
		if td == m.id.TrustDomain() {
			return nil, fmt.Errorf("proxy.files.bundles %s: %s is the SVID's own trust domain: its authorities belong into `bundle`", path, td)
		}
		bundles[td] = path
	}
	for _, td := range slices.SortedFunc(maps.Keys(bundles), spiffeid.TrustDomain.Compare) {
		key := "proxy.files.bundle"
		if td != m.id.TrustDomain() {
			key = fmt.Sprintf("proxy.files.bundles[%s]", td)
		}
		data, err := take(key, bundles[td])
		if err != nil {
			return nil, err
		}
		if m.authorities[td], err = parseAuthorities(data); err != nil {
			return nil, fmt.Errorf("%s %s: %w", key, bundles[td], err)
		}
	}
	hash.Sum(m.sum[:0])
	return m, f.checkChain(m)
}

// pair reads the certificate with its key, and whose it is.
func (f *Files) pair(m *material, certPEM, keyPEM []byte) error {
	if encryptedKey(keyPEM) {
		return fmt.Errorf("proxy.files.key %s: the key is encrypted, and nobody is here to type its passphrase; write it without one (openssl pkey -in … -out …), mode 0600", f.config.Key)
	}
	var err error
	if m.cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		return fmt.Errorf("proxy.files.cert %s, proxy.files.key %s: %s", f.config.Cert, f.config.Key, strings.TrimPrefix(err.Error(), "tls: "))
	}
	if m.id, err = checkLeaf(m.cert.Leaf); err != nil {
		return fmt.Errorf("proxy.files.cert %s: not an X.509-SVID: %w", f.config.Cert, err)
	}
	if want := f.config.TrustDomain; !want.IsZero() && m.id.TrustDomain() != want {
		return fmt.Errorf("proxy.files.cert %s: %s is not of the trust domain %s that trust_domain names", f.config.Cert, m.id, want)
	}
	return nil
}

// encryptedKey reports whether a key is kept under a passphrase: PKCS #8
// (RFC 5958 §3), or the older PEM header (RFC 1421 §4.6.1.1).
func encryptedKey(data []byte) bool {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return false
		}
		if block.Type == "ENCRYPTED PRIVATE KEY" || strings.HasSuffix(block.Headers["Proc-Type"], "ENCRYPTED") {
			return true
		}
	}
}

// checkChain refuses a certificate that nobody who has this bundle would
// believe. Its end is not asked for here: see checkTime.
func (f *Files) checkChain(m *material) error {
	chain := []*x509.Certificate{m.cert.Leaf}
	for _, der := range m.cert.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("proxy.files.cert %s: parse an intermediate certificate: %w", f.config.Cert, err)
		}
		chain = append(chain, c)
	}
	at := time.Now()
	if leaf := m.cert.Leaf; at.After(leaf.NotAfter) {
		at = leaf.NotAfter
	} else if at.Before(leaf.NotBefore) {
		at = leaf.NotBefore
	}
	_, err := newTrust(m.authorities).domains[m.id.TrustDomain()].verify(chain, at)
	var unknown x509.UnknownAuthorityError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &unknown):
		return fmt.Errorf("proxy.files.cert %s: the certificate does not chain to proxy.files.bundle %s: is it another CA's, or is an intermediate certificate missing after the leaf? (%w)", f.config.Cert, f.config.Bundle, err)
	}
	return fmt.Errorf("proxy.files.cert %s: the certificate does not stand under proxy.files.bundle %s: %w", f.config.Cert, f.config.Bundle, err)
}

// readPEM reads a file of bounded size whose PEM blocks are all whole. The
// parsers skip a block that was cut short, and with it an intermediate or an
// authority.
func readPEM(path string) ([]byte, error) {
	data, err := readPlain(path, maxFileSize)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := wholePEM(data); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return data, nil
}

// wholePEM refuses what holds no PEM block or one that was cut short.
func wholePEM(data []byte) error {
	whole := 0
	for rest := data; ; whole++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
	}
	begun := bytes.Count(data, []byte("-----BEGIN "))
	switch {
	case len(bytes.TrimSpace(data)) == 0:
		return errors.New("is empty")
	case begun == 0:
		return errors.New("holds no PEM block; is it DER? (openssl x509 -inform der, or openssl pkey -inform der, writes PEM)")
	case begun != whole:
		return fmt.Errorf("%d of %d PEM blocks are whole: is it still being written?", whole, begun)
	}
	return nil
}

// readPlain reads a plain file of at most limit bytes.
func readPlain(path string, limit int) ([]byte, error) {
	file, err := openPlain(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	data, err := io.ReadAll(io.LimitReader(file, int64(limit)+1))
	if err == nil && len(data) > limit {
		err = fmt.Errorf("larger than %d bytes", limit)
	}
	return data, err
}

// openPlain opens a plain file: what is none may never end, or be read once
// only.
func openPlain(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO would block
	if err != nil {
		var at *fs.PathError
		if errors.As(err, &at) {
			err = at.Err // the caller names the path
		}
		return nil, err
	}
	if info, err := file.Stat(); err != nil {
		return nil, errors.Join(err, file.Close())
	} else if !info.Mode().IsRegular() {
		return nil, errors.Join(errors.New("not a plain file"), file.Close())
	}
	return file, nil
}

func parseAuthorities(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a bundle holds certificates, not %q", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse authority: %w", err)
		}
		if !c.IsCA {
			return nil, fmt.Errorf("certificate %d (%s) is no CA; a bundle holds the authorities that sign SVIDs, not the SVIDs", len(certs)+1, nameOf(c))
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// nameOf names a certificate for a person: by its URI, or its subject.
func nameOf(c *x509.Certificate) string {
	if len(c.URIs) > 0 {
		return c.URIs[0].String()
	}
	return c.Subject.String()
}
