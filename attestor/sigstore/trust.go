package sigstore

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

const (
	maxLogs        = 64 // keys of logs of one kind, and authorities
	maxCertificate = 16 // certificates of one authority
)

// trust is what a trusted_root.json says is to be believed. It is not changed
// after it is made, so its address stands for its content.
type trust struct {
	authorities []authority
	tlogs       map[logID]logKey // Rekor
	ctlogs      map[logID]logKey
}

// logID is the SHA-256 of a log's public key in DER, which is how RFC 6962,
// section 3.2, and Rekor name a log.
type logID [sha256.Size]byte

// authority is one chain of Fulcio.
type authority struct {
	roots, intermediates *x509.CertPool
	valid                period
}

// logKey is a log's public key, ECDSA or RSA.
type logKey struct {
	key   crypto.PublicKey
	valid period
}

// verifies tells whether signature is the log's, of the SHA-256 of message.
func (k logKey) verifies(message, signature []byte) bool {
	sum := sha256.Sum256(message)
	switch key := k.key.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, sum[:], signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], signature) == nil
	}
	return false
}

// period is a time with both ends in it. A zero end is open.
type period struct {
	Start time.Time `json:"start"`
	End   time.Time `json:"end"`
}

func (p period) contains(t time.Time) bool {
	return !t.Before(p.Start) && (p.End.IsZero() || !t.After(p.End))
}

// rootFile is the part of Sigstore's TrustedRoot message, as JSON, that is
// used here.
type rootFile struct {
	Tlogs       []logEntry `json:"tlogs"`
	Authorities []struct {
		CertChain struct {
			Certificates []struct {
				RawBytes []byte `json:"rawBytes"`
			} `json:"certificates"`
		} `json:"certChain"`
		ValidFor period `json:"validFor"`
	} `json:"certificateAuthorities"`
	CTLogs []logEntry `json:"ctlogs"`
}

type logEntry struct {
	PublicKey struct {
		RawBytes []byte `json:"rawBytes"`
		ValidFor period `json:"validFor"`
	} `json:"publicKey"`
}

func parseTrust(data []byte) (*trust, error) {
	var file rootFile
	if err := json.Unmarshal(data, &file); err != nil {
		return nil, fmt.Errorf("it is not a trusted_root.json: %w", err)
	}
	if len(file.Tlogs) > maxLogs || len(file.CTLogs) > maxLogs || len(file.Authorities) > maxLogs {
		return nil, fmt.Errorf("it has more than %d logs or authorities", maxLogs)
	}
	t := &trust{}
	for i, a := range file.Authorities {
		n := len(a.CertChain.Certificates)
		if n == 0 || n > maxCertificate {
			return nil, fmt.Errorf("certificateAuthorities[%d] has %d certificates, not 1 to %d", i, n, maxCertificate)
		}
		one := authority{roots: x509.NewCertPool(), intermediates: x509.NewCertPool(), valid: a.ValidFor}
		for j, c := range a.CertChain.Certificates {
			cert, err := x509.ParseCertificate(c.RawBytes)
			if err != nil {
				return nil, fmt.Errorf("certificateAuthorities[%d].certChain.certificates[%d]: %w", i, j, err)
			}
			// The root stands last.
			if j == n-1 {
				one.roots.AddCert(cert)
			} else {
				one.intermediates.AddCert(cert)
			}
		}
		t.authorities = append(t.authorities, one)
	}
	if len(t.authorities) == 0 {
		return nil, errors.New("it has no certificateAuthorities")
	}
	var err error
	if t.tlogs, err = logKeys(file.Tlogs); err != nil {
		return nil, fmt.Errorf("tlogs%w", err)
	}
	if t.ctlogs, err = logKeys(file.CTLogs); err != nil {
		return nil, fmt.Errorf("ctlogs%w", err)
	}
	return t, nil
}

// logKeys leaves out keys of kinds that the first versions of the logs do not
// have, such as the Ed25519 of Rekor 2.
func logKeys(entries []logEntry) (map[logID]logKey, error) {
	keys := map[logID]logKey{}
	for i, e := range entries {
		key, err := x509.ParsePKIXPublicKey(e.PublicKey.RawBytes)
		if err != nil {
			return nil, fmt.Errorf("[%d].publicKey: %w", i, err)
		}
		switch key.(type) {
		case *ecdsa.PublicKey, *rsa.PublicKey:
			keys[sha256.Sum256(e.PublicKey.RawBytes)] = logKey{key: key, valid: e.PublicKey.ValidFor}
		}
	}
	return keys, nil
}

// trustFile is a trusted_root.json that is read again when it changes.
type trustFile struct {
	path             string
	needTlog, needCT bool

	mu   sync.Mutex // guards the following
	last *trust
	info os.FileInfo
}

// current returns what the file says now. A file that has become unreadable
// or wrong is an error: nobody is to go on with roots that were taken back.
func (f *trustFile) current() (*trust, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.path)
	if err != nil {
		return nil, fmt.Errorf("trusted root: %w", err)
	}
	if f.last != nil && os.SameFile(info, f.info) && info.Size() == f.info.Size() && info.ModTime().Equal(f.info.ModTime()) {
		return f.last, nil
	}
	t, err := f.read()
	if err != nil {
		return nil, fmt.Errorf("trusted root %s: %w", f.path, err)
	}
	f.last, f.info = t, info
	return t, nil
}

func (f *trustFile) read() (*trust, error) {
	data, err := readBounded(f.path, maxFile)
	if err != nil {
		return nil, err
	}
	t, err := parseTrust(data)
	if err != nil {
		return nil, err
	}
	if f.needTlog && len(t.tlogs) == 0 {
		return nil, errors.New("it has no tlogs with a key that is ECDSA or RSA; set ignore_tlog where there is no Rekor")
	}
	if f.needCT && len(t.ctlogs) == 0 {
		return nil, errors.New("it has no ctlogs with a key that is ECDSA or RSA; set ignore_sct where there is no CT log")
	}
	return t, nil
}
