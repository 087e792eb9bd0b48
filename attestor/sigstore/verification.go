package sigstore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

const (
	selectorSignature    = "image-signature:verified"
	selectorAttestations = "image-attestations:verified"

	cosignType = "cosign container image signature" // critical.type of a payload
	inTotoType = "application/vnd.in-toto+json"     // payloadType of an attestation
)

// verification is one look at what is signed about an image.
type verification struct {
	trusted    *trust
	identities []identity
	config     *Config
	now        time.Time
}

// image returns the selectors of the image of a session, and when they end by
// themselves, zero for never. The error wraps ErrUnverified where it is about
// the image.
func (v *verification) image(ctx context.Context, s *session) (selectors []string, expires time.Time, err error) {
	signatures, err := layers(ctx, s, ".sig", mediaSimpleSigning, maxPayload)
	if err != nil {
		return nil, time.Time{}, err
	}
	if len(signatures) == 0 {
		return nil, time.Time{}, fmt.Errorf("%w: %s has none as sha256-….sig (cosign 3 signs so with --new-bundle-format=false)", ErrUnverified, s.ref.registry)
	}
	selectors = []string{selectorSignature}
	var why error
	good := 0
	for i, layer := range signatures {
		found, end, err := v.signature(ctx, s, layer)
		switch {
		case err == nil:
			good++
			selectors = append(selectors, found...)
			expires = earlier(expires, end)
		case !errors.Is(err, ErrUnverified):
			return nil, time.Time{}, err
		case why == nil:
			why = fmt.Errorf("%w (signature %d of %d)", err, i+1, len(signatures))
		}
	}
	if good == 0 {
		return nil, time.Time{}, why
	}
	if v.config.IgnoreAttestations {
		return selectors, expires, nil
	}
	ok, end, err := v.attested(ctx, s)
	if err != nil {
		return nil, time.Time{}, err
	}
	if ok {
		selectors = slices.Insert(selectors, 1, selectorAttestations)
		expires = earlier(expires, end)
	}
	return selectors, expires, nil
}

// earlier returns the earlier of two ends, of which zero is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// layers returns what is stored beside the image under a tag.
func layers(ctx context.Context, s *session, suffix, media string, maxSize int64) ([]signed, error) {
	manifest, err := s.manifest(ctx, "sha256-"+s.ref.digest+suffix)
	if errors.Is(err, errAbsent) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	found, err := parseManifest(manifest, media, maxSize)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnverified, err)
	}
	return found, nil
}

// signature verifies one signature of the image and returns its selectors.
func (v *verification) signature(ctx context.Context, s *session, layer signed) (selectors []string, expires time.Time, err error) {
	refuse := func(err error) ([]string, time.Time, error) {
		return nil, time.Time{}, fmt.Errorf("%w: %w", ErrUnverified, err)
	}
	// What costs the registry nothing comes first.
	who, promised, expires, err := v.signer(layer)
	if err != nil {
		return refuse(err)
	}
	signature, err := decodeBase64(layer.signature)
	if err != nil || len(signature) == 0 {
		return refuse(errors.New("its annotation holds no signature in base64"))
	}
	payload, err := s.blob(ctx, layer.digest, layer.size)
	if errors.Is(err, errAbsent) {
		return refuse(errors.New("the registry has not what it is of"))
	}
	if err != nil {
		return nil, time.Time{}, err
	}
	if !who.verifies(payload, signature) {
		return refuse(errors.New("it is not of what is signed"))
	}
	if promised != nil {
		e, err := promised.entry()
		if err != nil {
			return refuse(err)
		}
		if !bytes.Equal(e.signature, signature) || !e.covers(layer.digest, who) {
			return refuse(errors.New("its transparency log recorded another signature"))
		}
	}
	if err := claims(payload, s.ref.digest); err != nil {
		return refuse(err)
	}
	return details(who, layer.signature, promised), expires, nil
}

// signer verifies who signed a layer, that they may, and when. promised is
// nil where the transparency log is ignored; then expires is the end of the
// certificate.
func (v *verification) signer(layer signed) (who *signer, promised *promise, expires time.Time, err error) {
	if who, err = parseSigner(layer.certificate); err != nil {
		return nil, nil, time.Time{}, err
	}
	at := v.now
	if v.config.IgnoreTlog {
		expires = who.cert.NotAfter
	} else {
		if promised, err = parsePromise(layer.bundle); err != nil {
			return nil, nil, time.Time{}, err
		}
		if err := promised.verify(v.trusted); err != nil {
			return nil, nil, time.Time{}, err
		}
		at = promised.at()
	}
	chain, err := who.chain(v.trusted, at)
	if err != nil {
		return nil, nil, time.Time{}, err
	}
	if !v.config.IgnoreSCT {
		if err := verifySCTs(chain, v.trusted); err != nil {
			return nil, nil, time.Time{}, err
		}
	}
	if !allowed(v.identities, who.issuer, who.subjects) {
		return nil, nil, time.Time{}, fmt.Errorf("it is of %q of issuer %q, which allowed_identities does not name", who.subjects[0], who.issuer)
	}
	return who, promised, expires, nil
}

// covers tells whether the entry is about content with a SHA-256 and a
// signer's certificate.
func (e entry) covers(digest string, who *signer) bool {
	return e.hash == digest && bytes.Equal(e.certificate, who.cert.Raw)
}

// claims checks that a signed payload is about the image. Without this a
// signature of any image would do for every other. The format is cosign's
// "simple signing".
func claims(payload []byte, digest string) error {
	var p struct {
		Critical struct {
			Type  string `json:"type"`
			Image struct {
				Digest string `json:"docker-manifest-digest"`
			} `json:"image"`
		} `json:"critical"`
	}
	if err := json.Unmarshal(payload, &p); err != nil {
		return errors.New("what is signed is not the JSON it should be")
	}
	if p.Critical.Type != cosignType {
		return errors.New("what is signed is not an image")
	}
	if p.Critical.Image.Digest != "sha256:"+digest {
		return errors.New("what is signed is another image")
	}
	return nil
}

// details are the selectors of one signature.
func details(who *signer, signature string, promised *promise) []string {
	selectors := []string{
		"image-signature-subject:" + who.subjects[0],
		"image-signature-issuer:" + who.issuer,
		"image-signature-value:" + signature,
	}
	if promised == nil {
		return selectors
	}
	return append(selectors,
		"image-signature-log-id:"+promised.Payload.Log,
		"image-signature-log-index:"+strconv.FormatInt(promised.Payload.Index, 10),
		"image-signature-integrated-time:"+strconv.FormatInt(promised.Payload.Integrated, 10),
		"image-signature-signed-entry-timestamp:"+base64.StdEncoding.EncodeToString(promised.SET),
	)
}

// attested tells whether one of the image's attestations is valid. The
// smallest come first, since one is enough. None, or none that is valid, is no
// error: entries that want one name the selector.
func (v *verification) attested(ctx context.Context, s *session) (ok bool, expires time.Time, err error) {
	found, err := layers(ctx, s, ".att", mediaDSSE, maxAttestation)
	if errors.Is(err, ErrUnverified) {
		return false, time.Time{}, nil
	}
	if err != nil {
		return false, time.Time{}, err
	}
	slices.SortStableFunc(found, func(a, b signed) int { return cmp.Compare(a.size, b.size) })
	for _, layer := range found {
		end, err := v.attestation(ctx, s, layer)
		if err == nil {
			return true, end, nil
		}
		if !errors.Is(err, ErrUnverified) {
			return false, time.Time{}, err
		}
	}
	return false, time.Time{}, nil
}

// attestation verifies one attestation of the image.
func (v *verification) attestation(ctx context.Context, s *session, layer signed) (expires time.Time, err error) {
	who, promised, expires, err := v.signer(layer)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: %w", ErrUnverified, err)
	}
	if promised != nil {
		e, err := promised.entry()
		if err != nil {
			return time.Time{}, fmt.Errorf("%w: %w", ErrUnverified, err)
		}
		if !e.covers(layer.digest, who) {
			return time.Time{}, fmt.Errorf("%w: its transparency log recorded another", ErrUnverified)
		}
	}
	envelope, err := s.blob(ctx, layer.digest, layer.size)
	if errors.Is(err, errAbsent) {
		return time.Time{}, fmt.Errorf("%w: %w", ErrUnverified, err)
	}
	if err != nil {
		return time.Time{}, err
	}
	if err := attests(envelope, who, s.ref.digest); err != nil {
		return time.Time{}, fmt.Errorf("%w: %w", ErrUnverified, err)
	}
	return expires, nil
}

// attests checks that an envelope (DSSE 1.0) with an in-toto statement is of
// the signer and about the image.
func attests(data []byte, who *signer, digest string) error {
	var envelope struct {
		PayloadType string `json:"payloadType"`
		Payload     []byte `json:"payload"`
		Signatures  list[struct {
			Sig []byte `json:"sig"`
		}] `json:"signatures"`
	}
	if err := json.Unmarshal(data, &envelope); err != nil {
		return errors.New("the envelope is not the JSON it should be")
	}
	if envelope.PayloadType != inTotoType || len(envelope.Signatures) != 1 {
		return errors.New("the envelope is not one of an in-toto statement with one signature")
	}
	// The pre-authentication encoding, "DSSEv1 LEN(type) type LEN(body) body".
	pae := fmt.Appendf(make([]byte, 0, len(envelope.Payload)+64), "DSSEv1 %d %s %d ", len(inTotoType), inTotoType, len(envelope.Payload))
	if !who.verifies(append(pae, envelope.Payload...), envelope.Signatures[0].Sig) {
		return errors.New("the envelope is not signed by its certificate")
	}
	var statement struct {
		Subject list[struct {
			Digest struct {
				SHA256 string `json:"sha256"`
			} `json:"digest"`
		}] `json:"subject"`
	}
	if err := json.Unmarshal(envelope.Payload, &statement); err != nil {
		return errors.New("the statement is not the JSON it should be")
	}
	for _, subject := range statement.Subject {
		if subject.Digest.SHA256 == digest {
			return nil
		}
	}
	return errors.New("the statement is about something else")
}

// digestOf is the SHA-256 in hexadecimal.
func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
