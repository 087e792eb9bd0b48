package sigstore

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"
)

// promise is Rekor's signed entry timestamp (SET) and what it is of, as
// cosign stores them in an annotation.
type promise struct {
	SET     []byte `json:"SignedEntryTimestamp"`
	Payload struct {
		Body       string `json:"body"`
		Integrated int64  `json:"integratedTime"`
		Index      int64  `json:"logIndex"`
		Log        string `json:"logID"`
	} `json:"Payload"`
}

// at is when Rekor recorded the entry.
func (p *promise) at() time.Time { return time.Unix(p.Payload.Integrated, 0) }

func parsePromise(text string) (*promise, error) {
	if text == "" {
		return nil, errors.New("it has no promise of a transparency log")
	}
	var p promise
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return nil, errors.New("the promise of its transparency log is not the JSON it should be")
	}
	return &p, nil
}

// verify checks that a trusted log has signed the promise, with a key that
// was valid then. What it signs is the JSON in canonical form (RFC 8785):
// sorted keys, no white space. The texts in it are base64 and hexadecimal,
// which need no escapes.
func (p *promise) verify(t *trust) error {
	id, err := hex.DecodeString(p.Payload.Log)
	if err != nil || len(id) != len(logID{}) || strings.ToLower(p.Payload.Log) != p.Payload.Log {
		return errors.New("its transparency log has a malformed id")
	}
	log, ok := t.tlogs[logID(id)]
	if !ok {
		return fmt.Errorf("its transparency log %s is not in the trusted root", p.Payload.Log)
	}
	if _, err := decodeBase64(p.Payload.Body); err != nil {
		return errors.New("the entry of its transparency log is not base64")
	}
	if p.Payload.Integrated <= 0 || p.Payload.Index < 0 {
		return errors.New("the entry of its transparency log has a malformed time or index")
	}
	canonical := fmt.Sprintf(`{"body":"%s","integratedTime":%d,"logID":"%s","logIndex":%d}`,
		p.Payload.Body, p.Payload.Integrated, p.Payload.Log, p.Payload.Index)
	if !log.verifies([]byte(canonical), p.SET) {
		return errors.New("the promise of its transparency log is not signed by that log")
	}
	if !log.valid.contains(p.at()) {
		return errors.New("its transparency log signed with a key that was not valid at that time")
	}
	return nil
}

// entry is what an entry of Rekor says was signed, and by which certificate.
type entry struct {
	hash        string // SHA-256, in hexadecimal, of what is signed or, for attestations, of the whole envelope
	signature   []byte // nil where hash covers it
	certificate []byte // DER
}

type entryHash struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"value"`
}

// hashedRekord is the kind "hashedrekord" 0.0.1, which signatures have.
type hashedRekord struct {
	Data struct {
		Hash entryHash `json:"hash"`
	} `json:"data"`
	Signature struct {
		Content   []byte `json:"content"`
		PublicKey struct {
			Content []byte `json:"content"`
		} `json:"publicKey"`
	} `json:"signature"`
}

// dsseEntry is the kind "dsse" 0.0.1, which attestations have.
type dsseEntry struct {
	EnvelopeHash entryHash `json:"envelopeHash"`
	Signatures   list[struct {
		Verifier []byte `json:"verifier"`
	}] `json:"signatures"`
}

// intotoEntry is the kind "intoto" 0.0.1 and 0.0.2, which attestations had.
type intotoEntry struct {
	Content struct {
		Hash     entryHash `json:"hash"`
		Envelope struct {
			Signatures list[struct {
				PublicKey []byte `json:"publicKey"`
			}] `json:"signatures"`
		} `json:"envelope"`
	} `json:"content"`
	PublicKey []byte `json:"publicKey"`
}

// entry reads the body of the entry. Call verify first.
func (p *promise) entry() (entry, error) {
	body, err := decodeBase64(p.Payload.Body)
	if err != nil {
		return entry{}, errors.New("the entry of its transparency log is not base64")
	}
	var e struct {
		Kind    string          `json:"kind"`
		Version string          `json:"apiVersion"`
		Spec    json.RawMessage `json:"spec"`
	}
	if err := json.Unmarshal(body, &e); err != nil {
		return entry{}, errors.New("the entry of its transparency log is not the JSON it should be")
	}
	var hash entryHash
	var found entry
	var certificate []byte
	switch e.Kind + " " + e.Version {
	case "hashedrekord 0.0.1":
		var spec hashedRekord
		err = json.Unmarshal(e.Spec, &spec)
		hash, found.signature, certificate = spec.Data.Hash, spec.Signature.Content, spec.Signature.PublicKey.Content
	case "dsse 0.0.1":
		var spec dsseEntry
		err = json.Unmarshal(e.Spec, &spec)
		if len(spec.Signatures) == 1 {
			hash, certificate = spec.EnvelopeHash, spec.Signatures[0].Verifier
		}
	case "intoto 0.0.1":
		var spec intotoEntry
		err = json.Unmarshal(e.Spec, &spec)
		hash, certificate = spec.Content.Hash, spec.PublicKey
	case "intoto 0.0.2":
		var spec intotoEntry
		err = json.Unmarshal(e.Spec, &spec)
		if len(spec.Content.Envelope.Signatures) == 1 {
			hash, certificate = spec.Content.Hash, spec.Content.Envelope.Signatures[0].PublicKey
		}
	default:
		return entry{}, errors.New("the entry of its transparency log is of a kind not known here")
	}
	block, _ := pem.Decode(certificate)
	if err != nil || block == nil || hash.Algorithm != "sha256" || len(hash.Value) != 64 {
		return entry{}, errors.New("the entry of its transparency log names no SHA-256 and certificate")
	}
	found.hash, found.certificate = hash.Value, block.Bytes
	return found, nil
}

// decodeBase64 decodes the one spelling of base64: what is compared as text
// elsewhere must not have several.
func decodeBase64(s string) ([]byte, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("line breaks in base64")
	}
	return b, nil
}
