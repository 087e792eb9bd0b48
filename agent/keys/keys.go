// Package keys makes private keys and keeps the agent's own.
//
// The agent's key is kept by a Store, since it must be on disk before the
// server learns of it: an agent that is attested and then loses its key cannot
// speak to the server any more.
//
//	store, err := keys.Disk("/var/lib/narthex/keys")
//	key, err := store.New(ctx) // durable from here on
//	// attest or renew with key, save the SVID beside key.ID()
//	err = store.Keep(ctx, key.ID()) // the old one is gone
//
// The keys of workloads are made by NewWorkloadKey and live in memory only, so
// they never meet a Store. What the keys sign, and for whom, is left to agent.
package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
)

var (
	// ErrNotFound is what Load's error wraps when the store has no such key.
	ErrNotFound = errors.New("no such key")
	// ErrCorrupt is what Load's error wraps when something is there that
	// cannot be read as a key. The error names it.
	ErrCorrupt = errors.New("not a readable private key")
)

// Key is a private key in a Store. Signing is all it can be used for, and
// printing it shows its ID alone.
type Key interface {
	crypto.Signer
	// ID names the key in its store. It is no secret and may be in a file name.
	ID() string
}

// Store keeps the agent's own private keys. Its methods may be called side by
// side.
type Store interface {
	// New makes an EC P-256 key. It returns once the key would outlast a loss of
	// power, as far as the store can promise that.
	New(ctx context.Context) (Key, error)

	// Load returns the key of that ID. The error wraps ErrNotFound if there is
	// none, and ErrCorrupt if it is not readable as a key.
	Load(ctx context.Context, id string) (Key, error)

	// Keep deletes all keys but these, whether or not there are such.
	Keep(ctx context.Context, ids ...string) error
}

// Adopter is a Store that takes in keys that were made elsewhere: Disk's does.
type Adopter interface {
	Store

	// Adopt keeps a key under a new ID, with the promise of New.
	Adopt(ctx context.Context, signer crypto.Signer) (Key, error)
}

// key is a Key whose private half is in this process's memory.
type key struct {
	id     string
	signer crypto.Signer
}

func (k *key) ID() string               { return k.id }
func (k *key) Public() crypto.PublicKey { return k.signer.Public() }

func (k *key) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.signer.Sign(random, digest, opts)
}

// Format writes the key's ID, whatever the verb, so that a key in a log line
// gives nothing away.
func (k *key) Format(f fmt.State, _ rune) { _, _ = fmt.Fprintf(f, "key %s", k.id) }

// idLength is that of an ID in bytes: 16 random bytes in hexadecimal.
const idLength = 32

func newID() string {
	b := make([]byte, idLength/2)
	_, _ = rand.Read(b) // never fails
	return fmt.Sprintf("%x", b)
}

// checkID lets through what newID makes and nothing else, since an ID becomes
// a file name.
func checkID(id string) error {
	ok := len(id) == idLength
	for i := 0; ok && i < len(id); i++ {
		c := id[i]
		ok = '0' <= c && c <= '9' || 'a' <= c && c <= 'f'
	}
	if !ok {
		return fmt.Errorf("key ID %.40q is not %d lower-case hexadecimal digits: %w", id, idLength, ErrNotFound)
	}
	return nil
}

// NewWorkloadKey makes the key of a workload's SVID: ec-p256, ec-p384 or
// rsa-2048.
func NewWorkloadKey(kind string) (crypto.Signer, error) {
	switch kind {
	case "ec-p256":
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ec-p384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "rsa-2048":
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("make a workload key: unknown kind %q, want ec-p256, ec-p384 or rsa-2048", kind)
}
