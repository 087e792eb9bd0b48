package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
)

// A bundle without authorities, kept, would be one that verifies no server
// ever again, not even after a restart.
func TestBundleWithoutAuthoritiesIsNotKept(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.test")
	dir, err := openDataDir(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.close()
	client, err := spire.New(spire.Config{Address: "127.0.0.1:1", TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	l := &looper{Agent: &Agent{log: hclog.NewNullLogger(), dir: dir, client: client}, self: self{state: state{TrustDomain: td.Name()}}}
	if err := l.keepBundle(&registry.Bundle{TrustDomain: td, X509: []*x509.Certificate{selfSigned(t)}}); err != nil {
		t.Fatal(err)
	}
	if err := l.keepBundle(&registry.Bundle{TrustDomain: td}); err == nil || !strings.Contains(err.Error(), "no X.509 authority") {
		t.Errorf("an empty bundle: %v", err)
	}
	saved, err := dir.load(td.Name())
	if err != nil || len(saved.Bundle) != 1 || len(l.self.state.Bundle) != 1 {
		t.Errorf("%d authorities on disk and %d in memory, want 1 (%v)", len(saved.Bundle), len(l.self.state.Bundle), err)
	}
}

func selfSigned(t *testing.T) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
