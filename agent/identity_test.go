package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/keys"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
	"github.com/narthex-id/narthex/attestor"
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

// A cluster of another name is noticed when the agent starts, and not when its
// SVID has to be renewed.
func TestSavedSVIDOfAnotherCluster(t *testing.T) {
	t.Parallel()
	for id, warns := range map[string]bool{
		"/spire/agent/k8s_psat/demo/1-2-3":  false,
		"/spire/agent/k8s_psat/other/1-2-3": true,
		"/spire/agent/k8s_psat/demo2/1":     true,
		"/spire/agent/join_token/1":         true,
	} {
		var said strings.Builder
		a := &Agent{cfg: Config{Node: attestor.PSAT{Cluster: "demo"}}, log: hclog.New(&hclog.LoggerOptions{Output: &said})}
		s := state{SVID: [][]byte{selfSigned(t, "spiffe://example.test"+id).Raw}}
		a.warnOfAnotherNode(s)
		a.warnOfAnotherNode(s)
		if n := strings.Count(said.String(), "not of the node attestor that is configured"); n > 1 || (n == 1) != warns {
			t.Errorf("%s: it says\n%s", id, said.String())
		}
	}
}

// authorityOf returns a certificate with a subject key ID of one byte.
func authorityOf(t *testing.T, keyID byte) *x509.Certificate {
	t.Helper()
	return selfSign(t, &x509.Certificate{SubjectKeyId: []byte{keyID}, IsCA: true, BasicConstraintsValid: true})
}

// What the agent gives up for each refusal, and what it does not.
func TestDenied(t *testing.T) {
	t.Parallel()
	denied := func(reason spire.Reason) error { return fmt.Errorf("sync: %w", &spire.DeniedError{Reason: reason}) }
	superseded := &spire.DeniedError{Reason: spire.AgentNotActive, Superseded: true}
	for name, test := range map[string]struct {
		errs                     []error
		forgets, wipes, attestes bool
	}{
		"expired":                 {[]error{denied(spire.AgentExpired)}, true, false, false},
		"not attested":            {[]error{denied(spire.AgentNotAttested)}, true, false, false},
		"not active once":         {[]error{denied(spire.AgentNotActive)}, false, false, false},
		"not active still":        {[]error{denied(spire.AgentNotActive), denied(spire.AgentNotActive)}, true, false, false},
		"superseded":              {[]error{superseded, superseded}, false, false, false},
		"must attest":             {[]error{denied(spire.AgentMustReattest)}, false, false, false},
		"by policy":               {[]error{denied(spire.Other)}, false, false, false},
		"banned":                  {[]error{denied(spire.AgentBanned)}, true, true, false},
		"certificate not taken":   {[]error{spire.ErrIdentityRefused}, false, false, true},
		"away":                    {[]error{spire.ErrUnreachable}, false, false, false},
		"a server it cannot know": {[]error{errStrange}, false, false, false},
	} {
		l := newLooper(t, Config{})
		l.self.state = state{TrustDomain: "example.test", SVID: [][]byte{selfSigned(t).Raw}, Strange: time.Now().UTC()}
		l.self.leaf = selfSigned(t)
		l.registry.Apply(registry.Update{HasEntries: true})
		l.view.synced = true
		for _, err := range test.errs {
			if got := l.denied(err); !errors.Is(got, err) {
				t.Errorf("%s: it tells %v", name, got)
			}
		}
		if forgot := l.self.leaf == nil && len(l.self.state.SVID) == 0; forgot != test.forgets || l.self.state.Strange.IsZero() {
			t.Errorf("%s: forgets is %t; since when the server is strange: %v", name, forgot, l.self.state.Strange)
		}
		if wiped := !l.view.synced; wiped != test.wipes || l.isBanned() != test.wipes || l.mustAttest != test.attestes {
			t.Errorf("%s: wiped %t, banned %t, attests next %t", name, wiped, l.isBanned(), l.mustAttest)
		}
		if saved, err := l.dir.load("example.test"); err != nil || test.forgets && len(saved.SVID) > 0 {
			t.Errorf("%s: on disk are %d certificates (%v)", name, len(saved.SVID), err)
		}
	}
	if !mustReattest(denied(spire.AgentMustReattest)) || mustReattest(denied(spire.AgentExpired)) || mustReattest(nil) {
		t.Error("which renewals are made by attesting")
	}
}

// A disk that takes nothing costs no node its identity: one that renews keeps
// the SVID that the server takes still, and one that has attested again, whose
// SVID of before the server takes no more, holds the new one in memory.
func TestKeepWithoutRoomOnDisk(t *testing.T) {
	t.Parallel()
	for _, reattestable := range []bool{false, true} {
		l := newLooper(t, Config{Keys: keys.Memory()})
		key, err := l.cfg.Keys.New(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
			URIs: []*url.URL{spiffeid.RequireFromString("spiffe://example.test/spire/agent/a").URL()},
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		l.dir.path = filepath.Join(l.dir.path, "not", "there")
		err = l.keep(t.Context(), state{KeyID: key.ID(), SVID: [][]byte{der}, Reattestable: reattestable}, key)
		if (err == nil) != reattestable || (l.self.leaf != nil) != reattestable {
			t.Errorf("attests again %t: %v, and holds %v", reattestable, err, l.self.leaf)
		}
	}
}

func selfSigned(t *testing.T, ids ...string) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{}
	for _, id := range ids {
		template.URIs = append(template.URIs, spiffeid.RequireFromString(id).URL())
	}
	return selfSign(t, template)
}

func selfSign(t *testing.T, template *x509.Certificate) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.NotAfter = big.NewInt(1), time.Now().Add(time.Hour)
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
