package sigstore

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestSelectors(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	s := h.fake.signing(h.digest, nil)
	l := s.signature()
	h.registry.store(t, h.digest, ".sig", l)
	h.registry.store(t, h.digest, ".att", s.attestation())
	got, err := h.verifier.Selectors(t.Context(), h.image())
	if err != nil {
		t.Fatal(err)
	}
	var p promise
	if err := json.Unmarshal([]byte(l.annotations["dev.sigstore.cosign/bundle"]), &p); err != nil {
		t.Fatal(err)
	}
	id := keyID(t, h.fake.rekorKey)
	want := []string{
		"image-signature:verified",
		"image-attestations:verified",
		"image-signature-subject:" + subjectA,
		"image-signature-issuer:" + issuerA,
		"image-signature-value:" + l.annotations["dev.cosignproject.cosign/signature"],
		"image-signature-log-id:" + hex.EncodeToString(id[:]),
		"image-signature-log-index:42",
		fmt.Sprintf("image-signature-integrated-time:%d", s.at.Add(time.Minute).Unix()),
		"image-signature-signed-entry-timestamp:" + base64.StdEncoding.EncodeToString(p.SET),
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// corrupt changes one annotation or the content of a good signature.
func corrupt(name string, f func(string) string) func(*layer) {
	return func(l *layer) { l.annotations[name] = f(l.annotations[name]) }
}

func TestSignatures(t *testing.T) {
	t.Parallel()
	other := digestOf([]byte("another image"))
	for _, c := range []struct {
		name   string
		config func(*Config)
		sign   func(*signing)
		layer  func(*layer)
		want   string // in the error; empty: verified
	}{
		{name: "good"},
		{
			name:   "of a URI",
			config: func(c *Config) { c.AllowedIdentities = map[string][]string{issuerA: {`^https://github\.com/o/r/.*$`}} },
			sign:   func(s *signing) { s.subject = "https://github.com/o/r/.github/workflows/w.yml@refs/heads/main" },
		},
		{name: "everybody allowed", config: func(c *Config) { c.AllowedIdentities = nil }, sign: func(s *signing) { s.subject = "x@y" }},
		{name: "wrong subject", sign: func(s *signing) { s.subject = "mallory@example.org" }, want: `"mallory@example.org" of issuer`},
		{name: "wrong issuer", sign: func(s *signing) { s.issuer = "https://evil.example" }, want: `issuer "https://evil.example"`},
		{name: "another image", sign: func(s *signing) { s.digest = other }, want: "what is signed is another image"},
		{name: "logged after the certificate ended", sign: func(s *signing) { s.logged = 11 * time.Minute }, want: "expired"},
		{name: "logged before it began", sign: func(s *signing) { s.logged = -time.Minute }, want: "not yet valid"},
		{name: "not logged", sign: func(s *signing) { s.noTlog = true }, want: "no promise of a transparency log"},
		{name: "another log", sign: func(s *signing) { s.rekor = newKey(t) }, want: "is not in the trusted root"},
		{name: "another authority", sign: func(s *signing) { s.fake = newFakeSigstore(t) }, want: "not of an authority"},
		{name: "no SCT", sign: func(s *signing) { s.noSCT = true }, want: "has no SCT"},
		{name: "SCT of another log", sign: func(s *signing) { s.ctKey = newKey(t) }, want: "CT log that is not in the trusted root"},
		{name: "SCT ignored", config: func(c *Config) { c.IgnoreSCT = true }, sign: func(s *signing) { s.noSCT = true }},
		{name: "tlog ignored, certificate ended", config: func(c *Config) { c.IgnoreTlog = true }, want: "expired"},
		{name: "tlog ignored, certificate valid", config: func(c *Config) { c.IgnoreTlog = true }, sign: func(s *signing) {
			s.noTlog, s.at, s.life = true, time.Now().Add(-time.Hour), 2*time.Hour
		}},
		{name: "payload tampered with, digest kept", layer: func(l *layer) {
			l.digest = digestOf(l.content)
			l.content = append(slices.Clone(l.content[:len(l.content)-1]), ' ')
		}, want: "it sent other content"},
		{name: "payload tampered with", layer: func(l *layer) { l.content = append(slices.Clone(l.content), ' ') }, want: "it is not of what is signed"},
		{name: "signature of another", layer: corrupt("dev.cosignproject.cosign/signature", func(string) string { return "AAAA" }), want: "it is not of what is signed"},
		{name: "signature spelled oddly", layer: corrupt("dev.cosignproject.cosign/signature", func(s string) string { return s + "\n" }), want: "no signature in base64"},
		{name: "index of the log changed", layer: corrupt("dev.sigstore.cosign/bundle", func(s string) string { return strings.Replace(s, `"logIndex":42`, `"logIndex":43`, 1) }), want: "not signed by that log"},
		{name: "no certificate", layer: corrupt("dev.sigstore.cosign/certificate", func(string) string { return "" }), want: "it has no certificate"},
		{name: "two certificates", layer: corrupt("dev.sigstore.cosign/certificate", func(s string) string { return s + s }), want: "not one PEM block"},
		{name: "payload too large", layer: func(l *layer) { l.size = maxPayload + 1 }, want: "has none"},
		{name: "payload longer than said", layer: func(l *layer) { l.size = len(l.content) - 1 }, want: "its answer has"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, c.config)
			l := h.fake.signing(h.digest, c.sign).signature()
			if c.layer != nil {
				c.layer(&l)
			}
			h.registry.store(t, h.digest, ".sig", l)
			got, err := h.verifier.Selectors(t.Context(), h.image())
			if c.want == "" {
				if err != nil || !slices.Contains(got, "image-signature:verified") || slices.Contains(got, "image-attestations:verified") {
					t.Fatalf("got %q, %v", got, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("got %q, error %v, want one line with %q", got, err, c.want)
			}
			if unverified := !strings.Contains(c.want, "other content") && !strings.Contains(c.want, "its answer has"); errors.Is(err, ErrUnverified) != unverified {
				t.Errorf("errors.Is(%v, ErrUnverified) is not %v", err, unverified)
			}
		})
	}
}

// A signature and an entry of the log that belong to different signatures of
// the same signer are not each other's proof.
func TestEntryOfAnotherSignature(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	s := h.fake.signing(h.digest, nil)
	one, two := s.signature(), s.signature()
	one.annotations["dev.sigstore.cosign/bundle"] = two.annotations["dev.sigstore.cosign/bundle"]
	h.registry.store(t, h.digest, ".sig", one)
	if _, err := h.verifier.Selectors(t.Context(), h.image()); err == nil || !strings.Contains(err.Error(), "recorded another signature") {
		t.Fatal(err)
	}
}

func TestSeveralSignatures(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	bad := h.fake.signing(h.digest, func(s *signing) { s.subject = "mallory@example.org" }).signature()
	good := h.fake.signing(h.digest, nil).signature()
	h.registry.store(t, h.digest, ".sig", bad, good, layer{media: "text/plain", content: []byte("x")})
	got, err := h.verifier.Selectors(t.Context(), h.image())
	if err != nil || len(got) != 8 || slices.Contains(got, "image-signature-subject:mallory@example.org") {
		t.Fatalf("got %q, %v", got, err)
	}
}

func TestAttestations(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		sign  func(*signing)
		layer func(*layer)
		want  bool
	}{
		{name: "good", want: true},
		{name: "of another image", sign: func(s *signing) { s.digest = digestOf([]byte("y")) }},
		{name: "of another subject", sign: func(s *signing) { s.subject = "mallory@example.org" }},
		{name: "not logged", sign: func(s *signing) { s.noTlog = true }},
		{name: "tampered with", layer: func(l *layer) { l.content = append(slices.Clone(l.content), ' ') }},
		{name: "certificate of another", layer: func(l *layer) {
			l.annotations["dev.sigstore.cosign/certificate"] = string(newFakeSigstore(t).signing(digestOf(nil), nil).pem())
		}},
		{name: "too large", layer: func(l *layer) { l.size = maxAttestation + 1 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, nil)
			h.registry.store(t, h.digest, ".sig", h.fake.signing(h.digest, nil).signature())
			l := h.fake.signing(h.digest, c.sign).attestation()
			if c.layer != nil {
				c.layer(&l)
			}
			h.registry.store(t, h.digest, ".att", l)
			got, err := h.verifier.Selectors(t.Context(), h.image())
			if err != nil || slices.Contains(got, "image-attestations:verified") != c.want || got[0] != "image-signature:verified" {
				t.Fatalf("got %q, %v", got, err)
			}
		})
	}
}

func TestUnsigned(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	for _, image := range []string{h.image(), "sha256:" + h.digest, "app:latest"} {
		if got, err := h.verifier.Selectors(t.Context(), image); got != nil || !errors.Is(err, ErrUnverified) {
			t.Errorf("%s: got %q, %v", image, got, err)
		}
	}
	lenient := newHouse(t, func(c *Config) { c.AllowUnsigned = true })
	if got, err := lenient.verifier.Selectors(t.Context(), lenient.image()); got != nil || err != nil {
		t.Errorf("allowed: got %q, %v", got, err)
	}
	skipping := newHouse(t, func(c *Config) { c.SkippedImages = []string{"a/b@sha256:x"} })
	if got, err := skipping.verifier.Selectors(t.Context(), "a/b@sha256:x"); got != nil || err != nil {
		t.Errorf("skipped: got %q, %v", got, err)
	}
}

// What registries may send, and what becomes of it.
func TestRegistryAnswers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, want string
		handler    http.HandlerFunc
	}{
		{"500", "HTTP 500", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "secret\ntext", http.StatusInternalServerError)
		}},
		{"403", "HTTP 403; give a user name", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }},
		{"429", "HTTP 429", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) }},
		{"oversized", "more than 524288", func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, maxManifest+1)) }},
		{"oversized, said before", "has 1073741824 bytes", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "1073741824") }},
		{"large header", "exceeded", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 2*maxHeader)) }},
		{"breaks off", "breaks off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10")
			w.Write([]byte("x"))
		}},
		{"to plain HTTP", "not https", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "http://127.0.0.1/")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}},
		{"to a file", "not https", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "file://x/etc/passwd")
			w.WriteHeader(http.StatusFound)
		}},
		{"to itself", "redirects more than 3 times", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", r.URL.Path)
			w.WriteHeader(http.StatusFound)
		}},
		{"to nowhere", "redirects to no URL", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusFound) }},
		{"to a cloud's metadata", "link-local", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "https://169.254.169.254/latest/")
			w.WriteHeader(http.StatusFound)
		}},
		{"asks for what is unknown", "no way known here", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", "Negotiate")
			w.WriteHeader(http.StatusUnauthorized)
		}},
		{"asks for a password", "give them under registries", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		}},
		{"token server over HTTP", "not https", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://127.0.0.1/token"`)
			w.WriteHeader(http.StatusUnauthorized)
		}},
		{"a broken challenge", "malformed", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="x`)
			w.WriteHeader(http.StatusUnauthorized)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, nil)
			h.registry.handle(c.handler)
			got, err := h.verifier.Selectors(t.Context(), h.image())
			if err == nil || got != nil || errors.Is(err, ErrUnverified) || !strings.Contains(err.Error(), c.want) ||
				strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "secret") {
				t.Fatalf("got %q, %v; want one line with %q", got, err, c.want)
			}
		})
	}
}

func TestSlowRegistry(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(c *Config) { c.Timeout = 50 * time.Millisecond })
	gone := make(chan struct{})
	t.Cleanup(func() { close(gone) })
	h.registry.handle(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-gone:
		}
	})
	_, err := h.verifier.Selectors(t.Context(), h.image())
	if err == nil || !strings.Contains(err.Error(), "has not answered within 50ms") {
		t.Fatal(err)
	}
}

// A caller who gives up does not take the others' verification along.
func TestCallerGivesUp(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	h.registry.store(t, h.digest, ".sig", h.fake.signing(h.digest, nil).signature())
	arrived, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	h.registry.handle(func(w http.ResponseWriter, r *http.Request) {
		first := false
		once.Do(func() { first = true })
		if first {
			close(arrived)
			select {
			case <-release:
			case <-r.Context().Done():
			}
			return
		}
		h.registry.mu.Lock()
		body, ok := h.registry.paths[r.URL.Path]
		h.registry.mu.Unlock()
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Write(body)
	})
	ctx, cancel := context.WithCancel(t.Context())
	var impatient, patient error
	var both sync.WaitGroup
	both.Go(func() { _, impatient = h.verifier.Selectors(ctx, h.image()) })
	<-arrived
	both.Go(func() { _, patient = h.verifier.Selectors(t.Context(), h.image()) })
	cancel()
	both.Wait()
	close(release)
	if !errors.Is(impatient, context.Canceled) || patient != nil {
		t.Fatalf("got %v and %v", impatient, patient)
	}
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	password := filepath.Join(t.TempDir(), "password")
	write(t, password, []byte("hunter2\n"))
	withPassword := func(c *Config) {
		for host, r := range c.Registries {
			r.Username, r.PasswordFile = "robot", password
			c.Registries[host] = r
		}
	}
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("robot:hunter2"))

	t.Run("basic", func(t *testing.T) {
		t.Parallel()
		h := newHouse(t, withPassword)
		h.registry.store(t, h.digest, ".sig", h.fake.signing(h.digest, nil).signature())
		h.registry.handle(h.registry.guarded(basic, `Basic realm="r"`))
		if _, err := h.verifier.Selectors(t.Context(), h.image()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("token", func(t *testing.T) {
		t.Parallel()
		h := newHouse(t, withPassword)
		h.registry.store(t, h.digest, ".sig", h.fake.signing(h.digest, nil).signature())
		guarded := h.registry.guarded("Bearer abc", `Bearer realm="`+h.registry.URL+`/token?x=1",service="s",scope="repository:other:push"`)
		h.registry.handle(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/token" {
				guarded(w, r)
				return
			}
			if q := r.URL.Query(); r.Header.Get("Authorization") != basic || q.Get("scope") != "repository:team/app:pull" || q.Get("service") != "s" || q.Get("x") != "1" {
				t.Errorf("asked for a token with %v", r.URL)
			}
			fmt.Fprint(w, `{"token":"abc"}`)
		})
		if _, err := h.verifier.Selectors(t.Context(), h.image()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("token server elsewhere", func(t *testing.T) {
		t.Parallel()
		h := newHouse(t, withPassword)
		h.registry.handle(h.registry.guarded("never", `Bearer realm="https://evil.example/token"`))
		if _, err := h.verifier.Selectors(t.Context(), h.image()); err == nil || !strings.Contains(err.Error(), "the password is sent there only where token_host") || strings.Contains(err.Error(), "hunter2") {
			t.Fatal(err)
		}
	})
	t.Run("asked for by whom it redirects to", func(t *testing.T) {
		t.Parallel()
		h := newHouse(t, withPassword)
		thief := newFakeRegistry(t) // another port of the same host
		thief.handle(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+thief.URL+`/token"`)
			w.WriteHeader(http.StatusUnauthorized)
		})
		h.registry.handle(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", thief.URL+r.URL.Path)
			w.WriteHeader(http.StatusTemporaryRedirect)
		})
		if _, err := h.verifier.Selectors(t.Context(), h.image()); err == nil || !strings.Contains(err.Error(), "HTTP 401") {
			t.Errorf("error %v", err)
		}
		for _, r := range thief.requests {
			if r.URL.Path == "/token" || r.Header.Get("Authorization") != "" {
				t.Errorf("%s was asked, with %q", r.URL, r.Header.Get("Authorization"))
			}
		}
	})
	t.Run("storage elsewhere", func(t *testing.T) {
		t.Parallel()
		h := newHouse(t, withPassword)
		storage := newFakeRegistry(t)
		storage.store(t, h.digest, ".sig", h.fake.signing(h.digest, nil).signature())
		guarded := h.registry.guarded(basic, `Basic realm="r"`)
		h.registry.handle(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") == "" {
				guarded(w, r)
				return
			}
			w.Header().Set("Location", storage.URL+r.URL.Path)
			w.WriteHeader(http.StatusTemporaryRedirect)
		})
		if _, err := h.verifier.Selectors(t.Context(), h.image()); err != nil {
			t.Fatal(err)
		}
		for _, r := range storage.requests {
			if r.Header.Get("Authorization") != "" {
				t.Errorf("%s had the registry's credentials", r.URL)
			}
		}
	})
}

// guarded serves what is stored to those with an Authorization header.
func (r *fakeRegistry) guarded(authorization, challenge string) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Authorization") != authorization {
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		r.mu.Lock()
		body, ok := r.paths[req.URL.Path]
		r.mu.Unlock()
		if !ok {
			http.NotFound(w, req)
			return
		}
		w.Write(body)
	}
}

// What is remembered, and for how long.
func TestVerdicts(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	now := time.Now()
	h.verifier.now = func() time.Time { return now }
	ask := func(verified bool, requests int) {
		t.Helper()
		before := h.registry.count()
		_, err := h.verifier.Selectors(t.Context(), h.image())
		if (err == nil) != verified {
			t.Fatalf("got %v", err)
		}
		if n := h.registry.count() - before; n != requests {
			t.Fatalf("asked the registry %d times, not %d", n, requests)
		}
	}
	ask(false, 1)
	ask(false, 0)
	h.registry.store(t, h.digest, ".sig", h.fake.signing(h.digest, nil).signature())
	now = now.Add(unsignedFor)
	ask(true, 3) // signatures, payload, attestations
	ask(true, 0)
	h.registry.handle(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	now = now.Add(fresh)
	ask(true, 1) // stands in
	ask(true, 0)
	now = now.Add(lasting - fresh)
	ask(false, 1) // not for ever
	ask(false, 0)
	now = now.Add(unknownFor)
	h.registry.handle(nil)
	ask(true, 3)

	// A root that is taken back takes what it vouched for along.
	h.fake.rekorTo = now.Add(-8000 * time.Hour)
	write(t, h.root, h.fake.trustedRoot())
	ask(false, 1)
	if err := os.Remove(h.root); err != nil {
		t.Fatal(err)
	}
	ask(false, 0)
}

// Without the log a verdict ends with the certificate.
func TestVerdictEndsWithCertificate(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(c *Config) { c.IgnoreTlog = true })
	now := time.Now()
	h.verifier.now = func() time.Time { return now }
	h.registry.store(t, h.digest, ".sig", h.fake.signing(h.digest, func(s *signing) {
		s.noTlog, s.at, s.life = true, now.Add(-time.Minute), 10*time.Minute
	}).signature())
	if got, err := h.verifier.Selectors(t.Context(), h.image()); err != nil || len(got) != 4 {
		t.Fatalf("got %q, %v", got, err)
	}
	now = now.Add(10 * time.Minute)
	h.registry.handle(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	if _, err := h.verifier.Selectors(t.Context(), h.image()); err == nil {
		t.Fatal("still verified")
	}
}

// A hundred callers at once are one verification.
func TestOneVerification(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	h.registry.store(t, h.digest, ".sig", h.fake.signing(h.digest, nil).signature())
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			if _, err := h.verifier.Selectors(t.Context(), h.image()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := h.registry.count(); n != 3 {
		t.Errorf("asked the registry %d times", n)
	}
}

func TestVerdictsAreBounded(t *testing.T) {
	t.Parallel()
	vs := newVerdicts()
	for i := range 2 * maxVerdicts {
		ref := reference{registry: "r", repository: fmt.Sprint(i)}
		v, mine := vs.claim(ref, nil, time.Now())
		if !mine {
			t.Fatal("a new image is known")
		}
		vs.settle(v, time.Now(), false)
	}
	if len(vs.known) != maxVerdicts || len(vs.order) != maxVerdicts {
		t.Errorf("%d and %d are remembered", len(vs.known), len(vs.order))
	}
}
