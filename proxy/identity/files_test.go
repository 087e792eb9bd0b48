package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// fileSource is a source of files in a directory of the test.
type fileSource struct {
	*Files
	t   *testing.T
	dir string
	log *lines
}

func openFiles(t *testing.T, dir string, poll time.Duration, others map[spiffeid.TrustDomain]string) *fileSource {
	t.Helper()
	s := &fileSource{t: t, dir: dir, log: &lines{}}
	f, err := NewFiles(FilesConfig{
		FilePaths: FilePaths{dir + "/svid.pem", dir + "/svid.key", dir + "/bundle.pem", others}, Poll: poll,
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		Log:         hclog.New(&hclog.LoggerOptions{Output: s.log}),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Files = f
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// current returns the identity, or nil with the reason.
func (s *fileSource) current() (*Identity, error) {
	lease, err := s.Own(context.Background(), Pick{})
	if err != nil {
		s.t.Fatal(err)
	}
	return lease.Current()
}

// await waits until the source presents the given certificate.
func (s *fileSource) await(want *x509.Certificate) {
	s.t.Helper()
	lease, err := s.Own(context.Background(), Pick{})
	if err != nil {
		s.t.Fatal(err)
	}
	late := time.After(patience)
	for {
		changed := lease.Changed()
		if id, err := lease.Current(); err == nil && id.Certificate.Leaf.Equal(want) {
			return
		}
		select {
		case <-changed:
		case <-late:
			s.t.Fatalf("the new certificate is not in force: %+v", s.Report())
		}
	}
}

func TestFilesAreReadAgain(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	first, second := ca.SVID("/orders"), ca.SVID("/orders")
	write(t, dir+"/svid.pem", testca.CertPEM(first.Certificate[0]))
	write(t, dir+"/svid.key", testca.KeyPEM(t, first))
	write(t, dir+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
	s := openFiles(t, dir, time.Hour, nil) // what comes is announced
	s.await(first.Leaf)

	write(t, dir+"/svid.pem", testca.CertPEM(second.Certificate[0]))
	write(t, dir+"/svid.key", testca.KeyPEM(t, second))
	s.await(second.Leaf)

	// Replaced by rename, as a careful writer does.
	third := ca.SVID("/orders")
	write(t, dir+"/new.key", testca.KeyPEM(t, third))
	write(t, dir+"/new.pem", testca.CertPEM(third.Certificate[0]))
	for from, to := range map[string]string{"new.key": "svid.key", "new.pem": "svid.pem"} {
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	s.await(third.Leaf)
}

func TestFilesThatDoNotFitYet(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	first, second := ca.SVID("/orders"), ca.SVID("/orders")
	write(t, dir+"/svid.pem", testca.CertPEM(first.Certificate[0]))
	write(t, dir+"/svid.key", testca.KeyPEM(t, first))
	write(t, dir+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
	s := unwatched(t, dir)
	s.load()

	// A new certificate without its key yet: the last good pair serves on.
	write(t, dir+"/svid.pem", testca.CertPEM(second.Certificate[0]))
	s.load()
	s.load()
	if id, err := s.current(); err != nil || !id.Certificate.Leaf.Equal(first.Leaf) {
		t.Errorf("a mismatched pair was used: %v, %v", id, err)
	}
	if got := s.Report().Problem; !strings.Contains(got, "private key does not match public key") {
		t.Errorf("problem %q", got)
	}
	if n := s.log.count("files are not good"); n != 1 {
		t.Errorf("%d log lines, want one", n)
	}
	write(t, dir+"/svid.key", testca.KeyPEM(t, second))
	s.load()
	s.await(second.Leaf)
	if got := s.Report(); got.Problem != "" || got.Source != "files" || len(got.Identities) != 1 {
		t.Errorf("report %+v", got)
	}
}

// TestFilesKubernetesSwap writes as the kubelet does: files are links into
// ..data, which is a link that is renamed over.
func TestFilesKubernetesSwap(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	publish := func(version string) *x509.Certificate {
		cert := ca.SVID("/orders")
		real := filepath.Join(dir, "..2026_"+version)
		if err := os.Mkdir(real, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, real+"/svid.pem", testca.CertPEM(cert.Certificate[0]))
		write(t, real+"/svid.key", testca.KeyPEM(t, cert))
		write(t, real+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
		if err := os.Symlink(filepath.Base(real), dir+"/..data_tmp"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(dir+"/..data_tmp", dir+"/..data"); err != nil {
			t.Fatal(err)
		}
		return cert.Leaf
	}
	first := publish("1")
	for _, name := range []string{"svid.pem", "svid.key", "bundle.pem"} {
		if err := os.Symlink("..data/"+name, dir+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	s := openFiles(t, dir, time.Hour, nil)
	s.await(first)
	for _, version := range []string{"2", "3"} {
		s.await(publish(version))
	}
}

func TestFilesThatComeLater(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := filepath.Join(t.TempDir(), "not", "yet")
	s := openFiles(t, dir, 10*time.Millisecond, nil) // no directory to watch: the poll finds it
	if id, err := s.current(); err == nil || !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("without files: %v, %v", id, err)
	}
	cert := ca.SVID("/orders")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/svid.pem", testca.CertPEM(cert.Certificate[0]))
	write(t, dir+"/svid.key", testca.KeyPEM(t, cert))
	write(t, dir+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
	s.await(cert.Leaf)
}

func TestFilesThatAreNotGood(t *testing.T) {
	ca, partner := testca.New(t, "example.org"), testca.New(t, "partner.example")
	good := ca.SVID("/orders")
	whole := append(testca.CertPEM(ca.Cert.Raw), testca.CertPEM(testca.New(t, "example.org").Cert.Raw)...)
	imposter, foreign := testca.New(t, "example.org").SVID("/orders"), partner.SVID("/orders")
	middle := ca.Intermediate()
	low := middle.SVID("/orders")
	noID := ca.SVID("/x", func(c *x509.Certificate) { c.URIs = nil })
	expired := ca.SVID("/orders", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	for _, test := range []struct {
		name             string
		cert, key, other []byte
		bundle           []byte
		want             string
	}{
		{"good", testca.CertPEM(good.Certificate[0]), testca.KeyPEM(t, good), testca.CertPEM(partner.Cert.Raw), whole, ""},
		{"bundle cut short", testca.CertPEM(good.Certificate[0]), testca.KeyPEM(t, good), nil, whole[:len(whole)-40], "1 of 2 PEM blocks are whole: is it still being written?"},
		{"chain cut short", append(testca.CertPEM(good.Certificate[0]), whole[:100]...), testca.KeyPEM(t, good), nil, whole, "1 of 2 PEM blocks are whole"},
		{"empty key", testca.CertPEM(good.Certificate[0]), nil, nil, whole, "svid.key: is empty"},
		{"bundle of keys", testca.CertPEM(good.Certificate[0]), testca.KeyPEM(t, good), nil, testca.KeyPEM(t, good), "a bundle holds certificates, not \"PRIVATE KEY\""},
		{"no SPIFFE ID", testca.CertPEM(noID.Certificate[0]), testca.KeyPEM(t, noID), nil, whole, "not an X.509-SVID"},
		{"expired", testca.CertPEM(expired.Certificate[0]), testca.KeyPEM(t, expired), nil, whole, "svid.pem: SVID expired at"},
		{"federated bundle missing", testca.CertPEM(good.Certificate[0]), testca.KeyPEM(t, good), []byte("x"), whole, "proxy.files.bundles[partner.example] "},
		{"DER", good.Certificate[0], testca.KeyPEM(t, good), nil, whole, "svid.pem: holds no PEM block; is it DER?"},
		{"key under a passphrase", testca.CertPEM(good.Certificate[0]), pemBlock("ENCRYPTED PRIVATE KEY", nil), nil, whole, "proxy.files.key"},
		{"key under a passphrase, as of old", testca.CertPEM(good.Certificate[0]), pemBlock("EC PRIVATE KEY", map[string]string{"Proc-Type": "4,ENCRYPTED"}), nil, whole, "the key is encrypted"},
		{"another CA's", testca.CertPEM(imposter.Certificate[0]), testca.KeyPEM(t, imposter), nil, whole, "is it another CA's, or is an intermediate"},
		{"intermediate missing", testca.CertPEM(low.Certificate[0]), testca.KeyPEM(t, low), nil, whole, "the certificate does not chain to proxy.files.bundle"},
		{"intermediate there", testca.CertPEM(low.Certificate[0], middle.Cert.Raw), testca.KeyPEM(t, low), testca.CertPEM(partner.Cert.Raw), whole, ""},
		{"bundle of SVIDs", testca.CertPEM(good.Certificate[0]), testca.KeyPEM(t, good), nil, append(testca.CertPEM(ca.Cert.Raw), testca.CertPEM(good.Certificate[0])...), "bundle.pem: certificate 2 (spiffe://example.org/orders) is no CA"},
		{"federated bundle of SVIDs", testca.CertPEM(good.Certificate[0]), testca.KeyPEM(t, good), testca.CertPEM(good.Certificate[0]), whole, "partner.pem: certificate 1 "},
		{"other trust domain", testca.CertPEM(foreign.Certificate[0]), testca.KeyPEM(t, foreign), nil, testca.CertPEM(partner.Cert.Raw), "spiffe://partner.example/orders is not of the trust domain example.org that trust_domain names"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir+"/svid.pem", test.cert)
			write(t, dir+"/svid.key", test.key)
			write(t, dir+"/bundle.pem", test.bundle)
			var others map[spiffeid.TrustDomain]string
			if test.other != nil {
				write(t, dir+"/partner.pem", test.other)
				others = map[spiffeid.TrustDomain]string{partner.TrustDomain: dir + "/partner.pem"}
			}
			s := openFiles(t, dir, time.Hour, others)
			_, err := s.current()
			trust := (&storeLease{store: s.store}).Trust()
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want == "" && (len(trust.domains) != 2 || len(trust.domains[ca.TrustDomain].authorities) != 2):
				t.Errorf("trust %+v", trust)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("got %v\nwant %s", err, test.want)
			}
			id, err := CheckFiles(s.config)
			if test.want == "" && (err != nil || id.String() != "spiffe://example.org/orders") || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("a look at them alone: %s, %v\nwant %s", id, err, test.want)
			}
		})
	}
	if n := openFiles(t, t.TempDir(), time.Hour, nil).log.count("there is no identity, and connections are refused"); n != 1 {
		t.Errorf("%d log lines of files that were never good, want one", n)
	}
	if _, err := NewFiles(FilesConfig{FilePaths: FilePaths{Cert: "a"}}); err == nil {
		t.Error("a source without key and bundle was taken")
	}
}

func pemBlock(kind string, headers map[string]string) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Headers: headers, Bytes: []byte("opaque")})
}

// TestFilesThatWouldBlock reads what is no plain file: a FIFO nobody writes
// to would hold the source for ever.
func TestFilesThatWouldBlock(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(dir+"/svid.pem", 0o600); err != nil {
		t.Fatal(err)
	}
	s := openFiles(t, dir, time.Hour, nil)
	if _, err := s.current(); err == nil || !strings.Contains(err.Error(), "proxy.files.cert "+dir+"/svid.pem: not a plain file") {
		t.Errorf("a FIFO: %v", err)
	}
}

// TestFilesKeepWhatLivesLonger: an expired certificate does not take the
// place of one that is still good, and the end of that one is said once.
func TestFilesKeepWhatLivesLonger(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	put := func(cert tls.Certificate) {
		write(t, dir+"/svid.pem", testca.CertPEM(cert.Certificate[0]))
		write(t, dir+"/svid.key", testca.KeyPEM(t, cert))
	}
	good := ca.SVID("/orders")
	put(good)
	write(t, dir+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
	s := unwatched(t, dir)
	s.load()
	put(ca.SVID("/orders", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }))
	s.load()
	if id, err := s.current(); err != nil || !id.Certificate.Leaf.Equal(good.Leaf) {
		t.Errorf("an expired certificate was put in force: %v, %v", id, err)
	}
	if s.log.count("what was read before stays in force") != 1 || s.log.count("about to expire") != 0 {
		t.Errorf("log:\n%s", s.log.text.String())
	}
}

// unwatched is a source whose files are read when the test says so.
func unwatched(t *testing.T, dir string) *fileSource {
	s := &fileSource{t: t, dir: dir, log: &lines{}}
	s.Files = &Files{
		store:  newStore("files", nil),
		config: FilesConfig{FilePaths: FilePaths{Cert: dir + "/svid.pem", Key: dir + "/svid.key", Bundle: dir + "/bundle.pem"}},
		log:    hclog.New(&hclog.LoggerOptions{Output: s.log}),
	}
	return s
}

func TestFilesSayThatTheyHaveExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := testca.New(t, "example.org")
		dir := t.TempDir()
		cert := ca.SVID("/orders")
		write(t, dir+"/svid.pem", testca.CertPEM(cert.Certificate[0]))
		write(t, dir+"/svid.key", testca.KeyPEM(t, cert))
		write(t, dir+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
		s := unwatched(t, dir)
		s.load()
		time.Sleep(55 * time.Minute)
		s.load()
		time.Sleep(time.Hour)
		s.load()
		s.load()
		for what, want := range map[string]int{"about to expire and was not renewed": 1, "has expired and was not renewed": 1, "not good": 0} {
			if n := s.log.count(what); n != want {
				t.Errorf("%q %d times, want %d", what, n, want)
			}
		}
		if _, err := s.current(); !errors.Is(err, ErrExpired) {
			t.Errorf("an expired identity: %v", err)
		}
		if got := s.Report().Problem; !strings.Contains(got, "svid.pem: SVID expired at") {
			t.Errorf("problem %q", got)
		}
	})
}

func TestFilesWarnOfExpiry(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	cert := ca.SVID("/orders", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(5 * time.Minute) }) // of an hour and five
	write(t, dir+"/svid.pem", testca.CertPEM(cert.Certificate[0]))
	write(t, dir+"/svid.key", testca.KeyPEM(t, cert))
	write(t, dir+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
	s := openFiles(t, dir, time.Hour, nil)
	s.load()
	if n := s.log.count("about to expire and was not renewed"); n != 1 {
		t.Errorf("warned %d times, want once", n)
	}
}

// TestWithdrawnAuthorityIsNotTrustedOn replaces the bundle by one that our own
// SVID does not chain to: it cannot be put in force as a whole, and the
// authority it lacks is not trusted any more all the same.
func TestWithdrawnAuthorityIsNotTrustedOn(t *testing.T) {
	old, next := testca.New(t, "example.org"), testca.New(t, "example.org")
	dir := t.TempDir()
	svid := old.SVID("/orders")
	write(t, dir+"/svid.pem", testca.CertPEM(svid.Certificate[0]))
	write(t, dir+"/svid.key", testca.KeyPEM(t, svid))
	write(t, dir+"/bundle.pem", testca.CertPEM(old.Cert.Raw))
	s := openFiles(t, dir, 20*time.Millisecond, nil)
	s.await(svid.Leaf)
	lease, err := s.Own(context.Background(), Pick{})
	if err != nil {
		t.Fatal(err)
	}
	trusts := func(want bool) {
		t.Helper()
		late := time.After(patience)
		for {
			changed := lease.Changed()
			d := lease.Trust().domains[svidDomain(svid)]
			if got := d != nil && d.holds([]*x509.Certificate{old.Cert}); got == want {
				return
			}
			select {
			case <-changed:
			case <-late:
				t.Fatalf("trusts the old authority: want %t; %+v", want, s.Report())
			}
		}
	}
	trusts(true)
	write(t, dir+"/bundle.pem", testca.CertPEM(next.Cert.Raw))
	trusts(false)
	if _, err := lease.Current(); err != nil {
		t.Errorf("the identity went with the authority: %v", err)
	}
	write(t, dir+"/bundle.pem", testca.CertPEM(old.Cert.Raw))
	trusts(true)
	write(t, dir+"/svid.key", testca.KeyPEM(t, next.SVID("/orders"))) // of a certificate that never comes
	write(t, dir+"/bundle.pem", testca.CertPEM(old.Cert.Raw)[:20])    // says nothing
	s.load()
	trusts(true)
	write(t, dir+"/bundle.pem", testca.CertPEM(next.Cert.Raw))
	trusts(false)
	write(t, dir+"/bundle.pem", testca.CertPEM(old.Cert.Raw))
	write(t, dir+"/svid.key", testca.KeyPEM(t, svid))
	trusts(true)
}

func svidDomain(c tls.Certificate) spiffeid.TrustDomain {
	id, err := checkLeaf(c.Leaf)
	if err != nil {
		panic(err)
	}
	return id.TrustDomain()
}

// TestFilesOfTomorrow: a certificate whose time has not come waits for it
// while there is another, and is better than none.
func TestFilesOfTomorrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := testca.New(t, "example.org")
		dir := t.TempDir()
		put := func(cert tls.Certificate) {
			write(t, dir+"/svid.pem", testca.CertPEM(cert.Certificate[0]))
			write(t, dir+"/svid.key", testca.KeyPEM(t, cert))
		}
		later := func(by time.Duration) func(*x509.Certificate) {
			return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(by), time.Now().Add(by+time.Hour) }
		}
		good, next := ca.SVID("/orders"), ca.SVID("/orders", later(10*time.Minute))
		put(good)
		write(t, dir+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
		s := unwatched(t, dir)
		s.load()
		put(next)
		s.load()
		s.await(good.Leaf)
		if s.log.count("are the clocks right?") != 1 {
			t.Errorf("log:\n%s", s.log.text.String())
		}
		time.Sleep(11 * time.Minute)
		s.load()
		s.await(next.Leaf)
		alone := unwatched(t, dir)
		put(ca.SVID("/orders", later(time.Minute)))
		alone.load()
		if _, err := alone.current(); err != nil {
			t.Errorf("better than none: %v", err)
		}
	})
}

// TestFilesOfOtherNames: those of before stay until the new ones are good.
func TestFilesOfOtherNames(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	first, second := ca.SVID("/orders"), ca.SVID("/orders")
	write(t, dir+"/svid.pem", testca.CertPEM(first.Certificate[0]))
	write(t, dir+"/svid.key", testca.KeyPEM(t, first))
	write(t, dir+"/bundle.pem", testca.CertPEM(ca.Cert.Raw))
	s := openFiles(t, dir, time.Hour, nil)
	s.await(first.Leaf)
	s.Configure(FilePaths{Cert: dir + "/next.pem", Key: dir + "/next.key", Bundle: dir + "/bundle.pem"})
	s.await(first.Leaf)
	if got := s.Report().Problem; !strings.Contains(got, "next.pem: no such file") {
		t.Errorf("problem %q", got)
	}
	write(t, dir+"/next.pem", testca.CertPEM(second.Certificate[0]))
	write(t, dir+"/next.key", testca.KeyPEM(t, second))
	s.await(second.Leaf)
}
