package sigstore

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

const (
	// maxSigned bounds the signatures, or attestations, of one image. Signing
	// an image again adds one.
	maxSigned = 64

	// maxPayload bounds what is signed, in bytes. A payload of cosign has some
	// 250 and what the signer adds.
	maxPayload = 32 << 10

	// maxAttestation bounds one attestation, in bytes. Provenance has some
	// 20 KiB, a bill of materials can have a hundred times
	// as much, and is then left out.
	maxAttestation = 1 << 20

	mediaSimpleSigning = "application/vnd.dev.cosign.simplesigning.v1+json"
	mediaDSSE          = "application/vnd.dsse.envelope.v1+json"

	// maxListed bounds every list in what strangers send: a list of empty
	// objects would take many times its own size.
	maxListed = 4096
)

// signed is one layer of a manifest that cosign wrote: what is signed is the
// layer's content, who signed it stands in its annotations.
type signed struct {
	digest string // SHA-256 of the content, in hexadecimal
	size   int64

	signature   string // base64; empty for attestations
	certificate string // PEM
	bundle      string // JSON; empty where there is no promise of Rekor
}

// manifestLayer is a layer as the OCI image specification has it, with the
// annotations of cosign.
type manifestLayer struct {
	MediaType   string `json:"mediaType"`
	Digest      string `json:"digest"`
	Size        int64  `json:"size"`
	Annotations struct {
		Signature   string `json:"dev.cosignproject.cosign/signature"`
		Certificate string `json:"dev.sigstore.cosign/certificate"`
		Bundle      string `json:"dev.sigstore.cosign/bundle"`
	} `json:"annotations"`
}

// list is a JSON array of at most maxListed elements.
type list[T any] []T

// UnmarshalJSON implements json.Unmarshaler.
func (l *list[T]) UnmarshalJSON(data []byte) error {
	*l = nil
	dec := json.NewDecoder(bytes.NewReader(data))
	open, err := dec.Token()
	if err != nil || open == nil {
		return err
	}
	if open != json.Delim('[') {
		return errors.New("not an array")
	}
	for dec.More() {
		if len(*l) == maxListed {
			return fmt.Errorf("an array has more than %d elements", maxListed)
		}
		var one T
		if err := dec.Decode(&one); err != nil {
			return err
		}
		*l = append(*l, one)
	}
	return nil
}

// parseManifest returns the layers of a media type. Layers of other types are
// left out. Malformed is what the registry, or whoever may write to it,
// stored wrongly: it is about the image.
func parseManifest(data []byte, media string, maxSize int64) ([]signed, error) {
	var manifest struct {
		Layers list[manifestLayer] `json:"layers"`
	}
	if err := json.Unmarshal(data, &manifest); err != nil {
		return nil, errors.New("the manifest beside it is not the JSON it should be")
	}
	if len(manifest.Layers) > maxSigned {
		return nil, fmt.Errorf("the manifest beside it has more than %d layers; sign the image anew in their place", maxSigned)
	}
	var found []signed
	for _, l := range manifest.Layers {
		if l.MediaType != media {
			continue
		}
		sum, ok := strings.CutPrefix(l.Digest, "sha256:")
		if raw, err := hex.DecodeString(sum); !ok || err != nil || len(raw) != 32 || strings.ToLower(sum) != sum {
			return nil, errors.New("a layer beside it has a digest that is not sha256: and 64 hexadecimal digits")
		}
		if l.Size <= 0 || l.Size > maxSize {
			continue
		}
		found = append(found, signed{
			digest: sum, size: l.Size,
			signature:   l.Annotations.Signature,
			certificate: l.Annotations.Certificate,
			bundle:      l.Annotations.Bundle,
		})
	}
	return found, nil
}
