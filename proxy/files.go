package proxy

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
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/watch"
)

// FilesConfig names the PEM files that something else (cert-manager, Vault
// agent, spiffe-helper, a script) keeps fresh.
type FilesConfig struct {
	Cert    string                          // the SVID, leaf first, then its intermediates
	Key     string                          // its key: PKCS #8, PKCS #1 or SEC 1; may be the same file
	Bundle  string                          // authorities of the SVID's own trust domain
	Bundles map[spiffeid.TrustDomain]string // of other trust domains

	// Poll is how often the files are read whether or not a change was
	// announced: file systems are there that announce none. Default
	// watch.DefaultPoll.
	Poll time.Duration
	Log  hclog.Logger
}

// Files is a source of one identity from files. It reads them again when
// they change, also through the symlink swaps of Kubernetes volumes. Files
// that do not fit together (a certificate without its key yet, a PEM block
// cut short) are never used: the last good ones serve on, with one log line,
// until the rest has been written.
type Files struct {
	*store
	config FilesConfig
	log    hclog.Logger
	cancel context.CancelFunc
	loop   sync.WaitGroup

	// The following belong to load, which never runs twice at once.
	seen   [sha256.Size]byte // of what was last put in force
	warned time.Time         // NotAfter of the SVID whose end was warned of
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

// Close stops watching and waits for that to end.
func (f *Files) Close() error {
	f.cancel()
	f.loop.Wait()
	return nil
}

func (f *Files) paths() []string {
	paths := []string{f.config.Cert, f.config.Key, f.config.Bundle}
	for _, p := range f.config.Bundles {
		paths = append(paths, p)
	}
	return paths
}

// load reads the files and puts them in force when they are good and new.
func (f *Files) load() {
	cert, authorities, sum, err := f.read()
	if err == nil && sum != f.seen {
		if err = f.set([]hinted{{cert: cert}}, authorities); err == nil {
			f.seen = sum
			f.log.Info("files in force", "cert", f.config.Cert, "not_after", cert.Leaf.NotAfter.UTC())
		}
	}
	if err != nil {
		if news, _ := f.trouble(err); news {
			f.log.Warn("files are not good: the last good ones stay in force", "reason", err)
		}
		f.warnExpiry()
		return
	}
	f.settled()
	f.warnExpiry()
}

// warnExpiry warns once of an SVID that should have been renewed by now.
func (f *Files) warnExpiry() {
	f.mu.Lock()
	ids := f.identities
	f.mu.Unlock()
	if len(ids) == 0 {
		return
	}
	leaf := ids[0].Certificate.Leaf
	left := time.Until(leaf.NotAfter)
	if f.warned.Equal(leaf.NotAfter) || left > leaf.NotAfter.Sub(leaf.NotBefore)/lateFactor {
		return
	}
	f.warned = leaf.NotAfter
	f.log.Warn("the certificate file is about to expire and was not renewed", "cert", f.config.Cert, "spiffe_id", ids[0].ID, "not_after", leaf.NotAfter.UTC(), "left", left.Round(time.Second))
}

// read reads all files and checks that they fit together. The sum tells one
// set of contents from another.
func (f *Files) read() (cert tls.Certificate, authorities map[spiffeid.TrustDomain][]*x509.Certificate, sum [sha256.Size]byte, err error) {
	hash := sha256.New()
	take := func(path string) ([]byte, error) {
		data, err := readPEM(path)
		if err == nil {
			one := sha256.Sum256(data) // of each file: where one ends matters
			_, _ = hash.Write(one[:])  // never fails
		}
		return data, err
	}
	certPEM, err := take(f.config.Cert)
	if err != nil {
		return cert, nil, sum, err
	}
	keyPEM, err := take(f.config.Key)
	if err != nil {
		return cert, nil, sum, err
	}
	if cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		return cert, nil, sum, fmt.Errorf("%s and %s: %w", f.config.Cert, f.config.Key, err)
	}
	id, err := checkLeaf(cert.Leaf)
	if err != nil {
		return cert, nil, sum, fmt.Errorf("%s: not an X.509-SVID: %w", f.config.Cert, err)
	}
	authorities = map[spiffeid.TrustDomain][]*x509.Certificate{}
	bundles := map[spiffeid.TrustDomain]string{id.TrustDomain(): f.config.Bundle}
	for td, path := range f.config.Bundles {
		if td == id.TrustDomain() {
			return cert, nil, sum, fmt.Errorf("%s: %s is the SVID's own trust domain: its authorities belong into `bundle`", path, td)
		}
		bundles[td] = path
	}
	for _, td := range slices.SortedFunc(maps.Keys(bundles), spiffeid.TrustDomain.Compare) {
		data, err := take(bundles[td])
		if err != nil {
			return cert, nil, sum, err
		}
		if authorities[td], err = parseAuthorities(data); err != nil {
			return cert, nil, sum, fmt.Errorf("%s: %w", bundles[td], err)
		}
	}
	hash.Sum(sum[:0])
	return cert, authorities, sum, nil
}

// readPEM reads a file of bounded size whose PEM blocks are all whole. The
// parsers skip a block that was cut short, and with it an intermediate or an
// authority.
func readPEM(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	data, err := io.ReadAll(io.LimitReader(file, maxFileSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFileSize {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, maxFileSize)
	}
	whole := 0
	for rest := data; ; whole++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
	}
	if begun := bytes.Count(data, []byte("-----BEGIN ")); whole == 0 || begun != whole {
		return nil, fmt.Errorf("%s: %d of %d PEM blocks are whole: is it still being written?", path, whole, begun)
	}
	return data, nil
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
		certs = append(certs, c)
	}
	return certs, nil
}
