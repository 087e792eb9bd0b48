//go:build cosign

package sigstore

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestCosign verifies what the real cosign stores in a real registry, that of
// crane. Building cosign takes longer than all other tests together, so it is
// given by hand:
//
//	COSIGN=…/cosign CRANE=…/crane go test -tags cosign -run TestCosign ./attestor/sigstore
//
// With RECORD=1 it writes what TestRecordedCosign reads again. Fulcio, the CT
// log and Rekor are fakes: the certificate is made here, and Rekor answers as
// its API says (POST /api/v1/log/entries).
func TestCosign(t *testing.T) {
	cosign, crane := os.Getenv("COSIGN"), os.Getenv("CRANE")
	if cosign == "" || crane == "" {
		t.Fatal("set COSIGN and CRANE to their programs")
	}
	dir := t.TempDir()
	h := newHouse(t, nil)
	s := h.fake.signing(h.digest, func(s *signing) { s.at = time.Now().Add(-time.Minute).Truncate(time.Second); s.life = time.Hour })
	rekor := httptest.NewServer(fakeRekor(t, s))
	t.Cleanup(rekor.Close)
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		write(t, path, content)
		return path
	}
	der, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		t.Fatal(err)
	}
	public := func(name string, key any) string {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return file(name, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	}
	file("leaf.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	file("leaf.pem", s.pem())
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.fake.middle.Raw}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.fake.root.Raw})...)
	file("chain.pem", chain)
	file("predicate.json", []byte(`{"builder":"x"}`))
	env := append(os.Environ(), "COSIGN_PASSWORD=", "HOME="+dir,
		"SIGSTORE_REKOR_PUBLIC_KEY="+public("rekor.pub", h.fake.rekorKey.Public()),
		"SIGSTORE_CT_LOG_PUBLIC_KEY_FILE="+public("ct.pub", h.fake.ctKey.Public()),
		"SIGSTORE_ROOT_FILE="+file("root.pem", chain))
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir, cmd.Env = dir, env
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, stderr.String())
		}
		return strings.TrimSpace(stdout.String())
	}
	address := serveRegistry(t, crane)
	file("layer.tar", tarOf(t))
	run(crane, "append", "--new_layer", "layer.tar", "--new_tag", address+"/team/app:1")
	digest := run(crane, "digest", address+"/team/app:1")
	image := address + "/team/app@" + digest

	run(cosign, "import-key-pair", "--key", "leaf.key")
	common := []string{"--key", "import-cosign.key", "--certificate", "leaf.pem", "--certificate-chain", "chain.pem",
		"--rekor-url", rekor.URL, "--new-bundle-format=false", "--use-signing-config=false", "--yes"}
	run(cosign, slices.Concat([]string{"sign"}, common, []string{image})...)
	run(cosign, slices.Concat([]string{"attest", "--predicate", "predicate.json", "--type", "custom"}, common, []string{image})...)

	v, err := New(Config{
		TrustedRoot: h.root, AllowedIdentities: map[string][]string{issuerA: {subjectA}},
		Registries: map[string]Registry{address: {PlainHTTP: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.Selectors(t.Context(), image)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%q", got)
	if len(got) != 9 || got[1] != selectorAttestations {
		t.Errorf("got %q", got)
	}
	if os.Getenv("RECORD") != "" {
		record(t, h.fake, address, digest, got)
	}

	// The same signature beside another image, as whoever may write to the
	// registry can put it there.
	file("layer.tar", append(tarOf(t), 0))
	run(crane, "append", "--new_layer", "layer.tar", "--new_tag", address+"/team/app:2")
	other := run(crane, "digest", address+"/team/app:2")
	run(crane, "copy", address+"/team/app:"+strings.Replace(digest, ":", "-", 1)+".sig", address+"/team/app:"+strings.Replace(other, ":", "-", 1)+".sig")
	if got, err := v.Selectors(t.Context(), address+"/team/app@"+other); err == nil || !strings.Contains(err.Error(), "another image") {
		t.Errorf("got %q, %v", got, err)
	}
}

// fakeRekor records whatever comes and promises it.
func fakeRekor(t *testing.T, s *signing) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		proposed, err := io.ReadAll(r.Body)
		if err != nil || r.Method != http.MethodPost || r.URL.Path != "/api/v1/log/entries" {
			t.Errorf("cosign asks Rekor for %s %s", r.Method, r.URL)
			http.NotFound(w, r)
			return
		}
		body := canonicalEntry(t, proposed)
		s.logged = time.Since(s.at)
		var p promise
		if err := json.Unmarshal([]byte(s.promise(body)), &p); err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "application/json")
		uuid := strings.Repeat("a", 64)
		w.Header().Set("ETag", uuid)
		w.Header().Set("Location", "/api/v1/log/entries/"+uuid)
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(map[string]any{uuid: map[string]any{
			"body": p.Payload.Body, "integratedTime": p.Payload.Integrated, "logID": p.Payload.Log, "logIndex": p.Payload.Index,
			"verification": map[string]any{"signedEntryTimestamp": p.SET, "inclusionProof": map[string]any{
				"logIndex": 0, "treeSize": 1, "rootHash": digestOf(append([]byte{0}, body...)), "hashes": []string{}, "checkpoint": "none",
			}},
		}})
	}
}

func serveRegistry(t *testing.T, crane string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	cmd := exec.CommandContext(t.Context(), crane, "registry", "serve", "--address", address)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for {
		resp, err := http.Get("http://" + address + "/v2/")
		if err == nil {
			resp.Body.Close()
			return address
		}
		if t.Context().Err() != nil {
			t.Fatal(err)
		}
	}
}

func tarOf(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "hello", Size: 2, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	w.Write([]byte("hi"))
	w.Close()
	return b.Bytes()
}

// canonicalEntry is what Rekor keeps of what it is sent: of an envelope only
// hashes.
func canonicalEntry(t *testing.T, proposed []byte) []byte {
	var e struct {
		Kind string `json:"kind"`
		Spec struct {
			Proposed struct {
				Envelope  string   `json:"envelope"`
				Verifiers [][]byte `json:"verifiers"`
			} `json:"proposedContent"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(proposed, &e); err != nil {
		t.Error(err)
	}
	if e.Kind == "hashedrekord" {
		return proposed
	}
	var envelope struct {
		Payload    []byte `json:"payload"`
		Signatures []struct {
			Sig string `json:"sig"`
		} `json:"signatures"`
	}
	if err := json.Unmarshal([]byte(e.Spec.Proposed.Envelope), &envelope); err != nil || e.Kind != "dsse" {
		t.Errorf("kind %q, envelope: %v", e.Kind, err)
	}
	body, err := json.Marshal(map[string]any{"apiVersion": "0.0.1", "kind": "dsse", "spec": map[string]any{
		"envelopeHash": map[string]any{"algorithm": "sha256", "value": digestOf([]byte(e.Spec.Proposed.Envelope))},
		"payloadHash":  map[string]any{"algorithm": "sha256", "value": digestOf(envelope.Payload)},
		"signatures":   []any{map[string]any{"signature": envelope.Signatures[0].Sig, "verifier": e.Spec.Proposed.Verifiers[0]}},
	}})
	if err != nil {
		t.Error(err)
	}
	return body
}

// record writes what is in the registry, by path, for TestRecordedCosign.
func record(t *testing.T, f *fakeSigstore, address, digest string, selectors []string) {
	t.Helper()
	sum := strings.TrimPrefix(digest, "sha256:")
	r := cosignRecord{Digest: sum, Root: f.trustedRoot(), Selectors: selectors, Paths: map[string]string{}}
	get := func(path string) []byte {
		resp, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		r.Paths[path] = string(body)
		return body
	}
	for _, suffix := range []string{".sig", ".att"} {
		var m struct {
			Layers []struct {
				Digest string `json:"digest"`
			} `json:"layers"`
		}
		if err := json.Unmarshal(get("/v2/team/app/manifests/sha256-"+sum+suffix), &m); err != nil {
			t.Fatal(err)
		}
		for _, l := range m.Layers {
			get("/v2/team/app/blobs/" + l.Digest)
		}
	}
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join("testdata", "cosign.json"), append(text, '\n'))
}
