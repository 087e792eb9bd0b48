package bootstrap

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"
)

// parseSPIFFE returns the X.509 authorities of a SPIFFE bundle (SPIFFE Trust
// Domain and Bundle §4). Keys of kinds and uses that are not known here are
// passed over, as §4.2 asks for: a trust domain may come to have others. One
// that is known and makes no sense fails the whole, for half a bundle would have
// us take the right server for a stranger.
func parseSPIFFE(data []byte) ([]*x509.Certificate, error) {
	var set struct {
		Keys []map[string]json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("no SPIFFE bundle: %w", err)
	}
	if set.Keys == nil {
		return nil, errors.New(`no SPIFFE bundle: it has no "keys"`)
	}
	var roots []*x509.Certificate
	for i, key := range set.Keys {
		root, err := parseAuthority(key)
		if err != nil {
			return nil, fmt.Errorf("no SPIFFE bundle: key %d: %w", i+1, err)
		}
		if root != nil {
			roots = append(roots, root)
		}
	}
	if len(roots) == 0 {
		return nil, errors.New(`no X.509 authority in it (a key with "use": "x509-svid" and "x5c")`)
	}
	return roots, nil
}

// parseAuthority returns nil where the key is for something else, or has no
// certificate. Of several the first one counts (SPIFFE X509-SVID §6.2); that
// the key is its own is checked (RFC 7517 §4.7).
func parseAuthority(key map[string]json.RawMessage) (*x509.Certificate, error) {
	if member(key, "use") != "x509-svid" || !slices.Contains([]string{"EC", "RSA", "OKP"}, member(key, "kty")) {
		return nil, nil
	}
	var chain []json.RawMessage
	if err := json.Unmarshal(key["x5c"], &chain); err != nil && key["x5c"] != nil {
		return nil, fmt.Errorf("x5c: %w", err)
	}
	if len(chain) == 0 {
		return nil, nil
	}
	first, err := json.Marshal(map[string]any{
		"kty": key["kty"], "crv": key["crv"], "x": key["x"], "y": key["y"], "n": key["n"], "e": key["e"], "x5c": chain[:1],
	})
	if err != nil {
		return nil, err
	}
	var parsed jose.JSONWebKey
	if err := parsed.UnmarshalJSON(first); err != nil {
		return nil, err
	}
	return parsed.Certificates[0], nil
}

// member returns a member that is a string, or "".
func member(key map[string]json.RawMessage, name string) (text string) {
	if json.Unmarshal(key[name], &text) != nil {
		return ""
	}
	return text
}
