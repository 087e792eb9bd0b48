// Package sigstore tells what is signed about the image a container runs:
// the selectors image-signature:… and image-attestations:verified of the
// workload attestors that know images.
//
//	v, err := sigstore.New(sigstore.Config{
//		TrustedRoot:       "/etc/narthex/trusted_root.json",
//		AllowedIdentities: map[string][]string{"https://accounts.google.com": {"release@example.org"}},
//	})
//	if err != nil { … }
//	selectors, err := v.Selectors(ctx, "ghcr.io/example/app@sha256:…")
//
// It reads what `cosign sign` and `cosign attest` store beside an image in
// its registry, as tags sha256-….sig and sha256-….att: a payload that names
// the image's digest, a signature of it, a short-lived certificate of Fulcio
// that says who signed, and the promise of the transparency log Rekor that it
// recorded the signature while the certificate was valid. All of it is
// verified here, offline, against the keys and certificates in TrustedRoot;
// the registry is asked for bytes and believed nothing.
//
// Which image a container runs is left to the attestor that asks. Sigstore's
// newer bundles, which registries list as referrers, are not read: nor are
// they by the spire-agent whose selectors these are.
package sigstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	// timeout bounds one verification with everything that is asked of the
	// registry. It ends before the attestation does that waits for it, so
	// that the reason reaches whoever asked.
	timeout = 5 * time.Second

	// atOnce bounds the verifications that run at the same time, and with
	// them the memory that registries can make us hold: at most some 3 MiB
	// each. Those of one registry are fewer, so that one that hangs leaves
	// slots to the others.
	atOnce        = 8
	atOnceFromOne = 4
)

// ErrUnverified is wrapped by the error of Selectors when the image has no
// signature that is valid and of an allowed identity. It is about the image;
// any other error is about the registry or the trusted root.
var ErrUnverified = errors.New("image has no valid signature")

// Config configures a Verifier. Only TrustedRoot has to be there.
type Config struct {
	// TrustedRoot is the path of a trusted_root.json of Sigstore, at most
	// 1 MiB: the certificates of Fulcio, the keys of Rekor and of the CT logs.
	// It is read again when it changes; what was verified against the old one
	// is then forgotten.
	TrustedRoot string

	// AllowedIdentities are the subjects to accept by their OIDC issuer. Either
	// is compared as it is or, when it holds one of *+?^${}[]|(), is a regular
	// expression in RE2 syntax, which matches anywhere in the name unless it
	// has ^ and $. Empty: every identity is accepted, and only the selectors
	// tell them apart.
	AllowedIdentities map[string][]string

	// SkippedImages are image ids, written as Selectors is asked for them,
	// that have no selectors and are not looked at.
	SkippedImages []string

	// IgnoreSCT accepts certificates that no CT log has promised to publish.
	IgnoreSCT bool

	// IgnoreTlog does not ask for a promise of Rekor. A signature then counts
	// only as long as its certificate is valid, which Fulcio makes ten minutes.
	IgnoreTlog bool

	// IgnoreAttestations does not look for attestations.
	IgnoreAttestations bool

	// AllowUnsigned makes an image without a valid signature one without
	// selectors. Otherwise Selectors fails with ErrUnverified, so that switching
	// verification on keeps images that nobody signed from every identity that
	// this attestor's selectors lead to, as spire-agent does.
	AllowUnsigned bool

	// Registries says how to ask registries that need more than their name, by
	// host or host:port as image names have it, such as docker.io.
	Registries map[string]Registry

	// Timeout bounds one verification. 0: 5 s.
	Timeout time.Duration
}

// Registry is how to ask one registry. Files are read at each verification.
type Registry struct {
	Username     string // with PasswordFile; neither: anonymous
	PasswordFile string // path; at most 16 KiB, a newline at its end does not count
	TokenHost    string // host or host:port of its token server, where that is another; only there is the password sent
	CA           string // path of PEM certificates to trust instead of the system's
	PlainHTTP    bool   // without TLS: anybody on the path reads along, and can withhold signatures but not make them
}

// Verifier verifies images. Its methods may be called from several goroutines
// at once.
type Verifier struct {
	config     Config
	identities []identity
	skipped    map[string]struct{}
	registries map[string]*registry
	others     *registry // every registry that is not in the map
	trust      *trustFile
	verdicts   *verdicts
	running    *slots
	now        func() time.Time
}

// New returns a Verifier. It fails when the trusted root or another file
// cannot be used, or a pattern is no regular expression.
func New(c Config) (*Verifier, error) {
	if c.Timeout == 0 {
		c.Timeout = timeout
	}
	v := &Verifier{
		config:   c,
		skipped:  make(map[string]struct{}, len(c.SkippedImages)),
		verdicts: newVerdicts(),
		running:  newSlots(atOnceFromOne, atOnce),
		now:      time.Now,
	}
	for _, image := range c.SkippedImages {
		v.skipped[image] = struct{}{}
	}
	var err error
	if v.identities, err = compileIdentities(c.AllowedIdentities); err != nil {
		return nil, fmt.Errorf("sigstore: %w", err)
	}
	if v.others, v.registries, err = newRegistries(c.Registries); err != nil {
		return nil, fmt.Errorf("sigstore: %w", err)
	}
	v.trust = &trustFile{path: c.TrustedRoot, needTlog: !c.IgnoreTlog, needCT: !c.IgnoreSCT}
	if _, err := v.trust.current(); err != nil {
		return nil, fmt.Errorf("sigstore: %w", err)
	}
	return v, nil
}

// Warnings are what is allowed and still worth a second look, a line each.
func (v *Verifier) Warnings() []string {
	var lines []string
	if len(v.identities) == 0 {
		lines = append(lines, "allowed_identities is empty: anybody who can sign in to an issuer of the trusted root can sign images, and image-signature:verified says nothing of who did")
	}
	for _, id := range v.identities {
		for _, p := range []pattern{id.issuer, id.subject} {
			if p.loose() {
				lines = append(lines, fmt.Sprintf("allowed_identities: %q is a regular expression that matches anywhere in a name; write ^ and $ around it", p.text))
			}
		}
	}
	slices.Sort(lines)
	return slices.Compact(lines)
}

// Selectors returns the values of the selectors of an image, without a type
// before them, such as "image-signature:verified". The image is named by
// repository and digest, as the kubelet or Docker report it:
// docker.io/library/app@sha256:… .
//
// A skipped image has none. The error wraps ErrUnverified when the image has
// no valid signature, unless AllowUnsigned; then there are none either. Any
// other error means that it could not be found out. Errors are one line and do
// not name the image.
//
// Answers are remembered (see verdicts), and callers who ask for the same
// image at the same time share one verification. It returns soon after ctx
// ends.
func (v *Verifier) Selectors(ctx context.Context, image string) ([]string, error) {
	if _, ok := v.skipped[image]; ok {
		return nil, nil
	}
	selectors, err := v.selectors(ctx, image)
	if v.config.AllowUnsigned && errors.Is(err, ErrUnverified) {
		return nil, nil
	}
	return selectors, err
}

func (v *Verifier) selectors(ctx context.Context, image string) ([]string, error) {
	ref, err := parseReference(image)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnverified, err)
	}
	trusted, err := v.trust.current()
	if err != nil {
		return nil, err
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		verdict, mine := v.verdicts.claim(ref, trusted, v.now())
		if mine {
			verdict.selectors, verdict.expires, verdict.err = v.ask(ctx, ref, trusted)
			v.verdicts.settle(verdict, v.now(), ctx.Err() != nil)
			return slices.Clone(verdict.selectors), verdict.err
		}
		select {
		case <-verdict.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if !verdict.abandoned {
			return slices.Clone(verdict.selectors), verdict.err
		}
	}
}

// ask verifies ref in one of the slots, within the timeout. expires is when
// what it found stops being true by itself, zero for never.
func (v *Verifier) ask(ctx context.Context, ref reference, trusted *trust) (selectors []string, expires time.Time, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, v.config.Timeout,
		fmt.Errorf("registry %s has not answered within %s", ref.registry, v.config.Timeout))
	defer cancel()
	if err := v.running.acquire(ctx, ref.registry); err != nil {
		return nil, time.Time{}, fmt.Errorf("wait for other images to be verified: %w", err)
	}
	defer v.running.release(ref.registry)
	r, ok := v.registries[ref.registry]
	if !ok {
		r = v.others
	}
	s, err := r.open(ref)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer s.close()
	check := verification{trusted: trusted, identities: v.identities, config: &v.config, now: v.now()}
	selectors, expires, err = check.image(ctx, s)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return selectors, expires, err
}
