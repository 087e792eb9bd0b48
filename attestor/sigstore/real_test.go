package sigstore

import (
	"crypto/ecdsa"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// recorded is a signature out of a public log, as testdata has it.
type recorded struct {
	Certificate []byte          `json:"certificate"`
	Bundle      json.RawMessage `json:"bundle"`
	Digest      []byte          `json:"digest"`    // of what is signed; nil with an envelope
	Signature   []byte          `json:"signature"` // of it
	Envelope    json.RawMessage `json:"envelope"`
}

func readRecorded(t testing.TB, name string) (recorded, signed) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	var r recorded
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	return r, signed{
		certificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate})),
		bundle:      string(r.Bundle),
	}
}

func readRoot(t testing.TB, name string) *trust {
	t.Helper()
	f := &trustFile{path: filepath.Join("testdata", name), needTlog: true, needCT: true}
	trusted, err := f.current()
	if err != nil {
		t.Fatal(err)
	}
	return trusted
}

// The certificates, SCTs and promises that Sigstore's public services and its
// scaffolding (with an OtherName) made years ago are what the fakes of the
// other tests imitate.
func TestRecorded(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		file, root, issuer, subject string
	}{
		{"public-2022.json", "public-root.json", "https://github.com/login/oauth", "brian@dehamer.com"},
		{
			"public-2023.json", "public-root.json", "https://token.actions.githubusercontent.com",
			"https://github.com/sigstore/sigstore-js/.github/workflows/release.yml@refs/heads/main",
		},
		{"scaffolding.json", "scaffolding-root.json", "http://oidc.local:8080", "foo!oidc.local"},
	} {
		t.Run(c.file, func(t *testing.T) {
			t.Parallel()
			r, layer := readRecorded(t, c.file)
			v := verification{trusted: readRoot(t, c.root), config: &Config{}, now: time.Now()}
			who, promised, _, err := v.signer(layer)
			if err != nil {
				t.Fatal(err)
			}
			if who.issuer != c.issuer || who.subjects[0] != c.subject {
				t.Errorf("signed by %q of %q", who.subjects, who.issuer)
			}
			e, err := promised.entry()
			if err != nil {
				t.Fatal(err)
			}
			if !e.covers(e.hash, who) {
				t.Error("the entry is of another certificate")
			}
			if r.Envelope != nil {
				// Its subject is no image.
				if err := attests(r.Envelope, who, e.hash); err == nil || !strings.Contains(err.Error(), "about something else") {
					t.Errorf("envelope: %v", err)
				}
				return
			}
			if e.hash != hex.EncodeToString(r.Digest) || !ecdsa.VerifyASN1(who.cert.PublicKey.(*ecdsa.PublicKey), r.Digest, r.Signature) {
				t.Error("the entry is of another signature")
			}
		})
	}
}

// cosignRecord is what cosign 3.1.1 stored for an image; TestCosign makes it.
type cosignRecord struct {
	Digest    string            `json:"digest"`
	Root      json.RawMessage   `json:"root"`
	Selectors []string          `json:"selectors"`
	Paths     map[string]string `json:"paths"`
}

func readCosign(t testing.TB) (c cosignRecord) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "cosign.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRecordedCosign(t *testing.T) {
	t.Parallel()
	c := readCosign(t)
	h := newHouse(t, nil)
	write(t, h.root, c.Root)
	for path, content := range c.Paths {
		h.registry.paths[path] = []byte(content)
	}
	got, err := h.verifier.Selectors(t.Context(), h.registry.image(c.Digest))
	if err != nil || !slices.Equal(got, c.Selectors) {
		t.Errorf("got  %q, %v\nwant %q", got, err, c.Selectors)
	}
}
