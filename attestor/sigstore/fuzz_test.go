package sigstore

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

func FuzzParseReference(f *testing.F) {
	sum := strings.Repeat("a", 64)
	for _, image := range []string{
		"docker.io/library/x@sha256:" + sum, "x@sha256:" + sum, "docker-pullable://a.b:5000/c/d:tag@sha256:" + sum, "[::1]:5000/a@sha256:" + sum, "sha256:" + sum,
	} {
		f.Add(image)
	}
	f.Fuzz(func(t *testing.T, image string) {
		ref, err := parseReference(image)
		if err != nil {
			return
		}
		// What it prints is the same image, and puts nothing into a URL that
		// changes the path.
		if again, err := parseReference(ref.String()); err != nil || again != ref {
			t.Errorf("%q: %v, then %v, %v", image, ref, again, err)
		}
		if strings.ContainsAny(ref.repository+ref.registry, "?#%@\\ ") || strings.Contains(ref.repository, "..") {
			t.Errorf("%q: %v", image, ref)
		}
	})
}

func FuzzParseChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull"`)
	f.Add(`Basic realm="a\"b"`)
	f.Add(`Negotiate`)
	f.Fuzz(func(t *testing.T, header string) {
		scheme, params, err := parseChallenge(header)
		if err == nil && scheme != strings.ToLower(scheme) || len(params) > len(header) {
			t.Errorf("%q: %q %q", header, scheme, params)
		}
	})
}

func FuzzParseSCTs(f *testing.F) {
	_, layer := readRecorded(f, "public-2023.json")
	who, err := parseSigner(layer.certificate)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(who.cert.Raw)
	f.Fuzz(func(t *testing.T, b []byte) {
		if scts, err := parseSCTs(b); err == nil && len(scts) > maxSCTs {
			t.Errorf("%d SCTs", len(scts))
		}
		// None of these may panic, whatever the DER.
		_, _ = withoutSCTs(b)
		_, _ = userName(b)
	})
}

func FuzzTrustedRoot(f *testing.F) {
	f.Add(newFakeSigstore(f).trustedRoot())
	f.Fuzz(func(t *testing.T, data []byte) {
		if trusted, err := parseTrust(data); err == nil && len(trusted.authorities) == 0 {
			t.Error("a root that trusts nobody")
		}
	})
}

// FuzzLayer changes the annotations of a signature that is good: nothing but
// the good one is verified.
func FuzzLayer(f *testing.F) {
	c := readCosign(f)
	trusted, err := parseTrust(c.Root)
	if err != nil {
		f.Fatal(err)
	}
	good, err := parseManifest([]byte(c.Paths["/v2/team/app/manifests/sha256-"+c.Digest+".sig"]), mediaSimpleSigning, maxPayload)
	if err != nil || len(good) != 1 {
		f.Fatal(good, err)
	}
	goodWho, goodPromise, _, err := (&verification{trusted: trusted, config: &Config{}}).signer(good[0])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[0].certificate, good[0].bundle)
	f.Fuzz(func(t *testing.T, certificate, bundle string) {
		v := verification{trusted: trusted, config: &Config{}, now: time.Now()}
		who, promised, _, err := v.signer(signed{certificate: certificate, bundle: bundle})
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("error of two lines: %q", err)
			}
			return
		}
		if !slices.Equal(who.cert.Raw, goodWho.cert.Raw) || promised.Payload != goodPromise.Payload {
			t.Errorf("verified %q %q", certificate, bundle)
		}
		_, _ = promised.entry()
	})
}

// FuzzEntry reads entries as a log could have them.
func FuzzEntry(f *testing.F) {
	for _, name := range []string{"public-2022.json", "scaffolding.json"} {
		_, layer := readRecorded(f, name)
		f.Add(layer.bundle)
	}
	f.Fuzz(func(t *testing.T, bundle string) {
		p, err := parsePromise(bundle)
		if err != nil {
			return
		}
		if e, err := p.entry(); err == nil && (len(e.hash) != 64 || len(e.certificate) == 0) {
			t.Errorf("entry %v", e)
		}
	})
}

// FuzzRegistry sends manifests and payloads that are not the good ones:
// nothing of it makes an image verified.
func FuzzRegistry(f *testing.F) {
	c := readCosign(f)
	manifest := "/v2/team/app/manifests/sha256-" + c.Digest
	h := newHouse(f, nil)
	write(f, h.root, c.Root)
	trusted, err := h.verifier.trust.current()
	if err != nil {
		f.Fatal(err)
	}
	ref, err := parseReference(h.registry.image(c.Digest))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(c.Paths[manifest+".sig"]), []byte("x"))
	f.Add([]byte(`{"layers":[{},{}]}`), []byte(c.Paths[manifest+".att"]))
	f.Fuzz(func(t *testing.T, sent, content []byte) {
		h.registry.handle(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, manifest) {
				w.Write(sent)
				return
			}
			w.Write(content)
		})
		selectors, _, err := h.verifier.ask(t.Context(), ref, trusted)
		if err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %q, %v", selectors, err)
		}
	})
}
