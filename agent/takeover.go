package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/narthex-id/narthex/agent/keys"
)

// The files of a spire-agent (pkg/agent/storage and
// pkg/agent/plugin/keymanager/disk of spiffe/spire, v1.15).
const (
	stockStateFile = "agent-data.json"
	stockKeysFile  = "keys.json"
)

// TakeOver names what a spire-agent has left: the identity that it was attested
// for, on which this agent goes on. Its files are read and never changed, so that
// it can be started again until this agent has renewed its SVID for the first
// time.
type TakeOver struct {
	DataDir string // the spire-agent's data_dir
	Keys    string // the directory of its KeyManager "disk"; default: DataDir
}

// stockState is agent-data.json, as far as it is of use here.
type stockState struct {
	SVID         [][]byte `json:"svid"`   // PEM, one certificate each, leaf first
	Bundle       [][]byte `json:"bundle"` // PEM, one certificate each
	Reattestable bool     `json:"reattestable"`
}

// takeOver returns the state of the spire-agent before us, as our own and saved
// as such. It is empty where there is nothing to be taken over, and the agent
// attests anew. What is there and cannot be used is an error for the operator:
// to attest anew could cost a join token, or evict an agent that still runs.
func (l *looper) takeOver(ctx context.Context) (state, error) {
	t := l.cfg.TakeOver
	if t == nil {
		return state{}, nil
	}
	left, signer, err := t.read(l.cfg.TrustDomain, time.Now())
	if errors.Is(err, errNothingLeft) {
		l.log.Info("no spire-agent to take over from: the agent attests its node", "reason", err)
		return state{}, nil
	}
	if err != nil {
		return state{}, fmt.Errorf("take over from spire-agent: %w; take agent.take_over out to attest anew", err)
	}
	store, ok := l.cfg.Keys.(keys.Adopter)
	if !ok {
		return state{}, errors.New("take over from spire-agent: its key can be kept by key_manager disk alone")
	}
	key, err := store.Adopt(ctx, signer)
	if err != nil {
		return state{}, fmt.Errorf("take over from spire-agent: %w", err)
	}
	left.KeyID = key.ID()
	if err := l.dir.store(left); err != nil {
		return state{}, err
	}
	left.Version = stateVersion
	l.log.Info("took over from spire-agent, which can be started again until this agent renews its SVID", "data_dir", t.DataDir, "reattestable", left.Reattestable)
	return left, nil
}

// errNothingLeft is wrapped when a spire-agent has left nothing of use.
var errNothingLeft = errors.New("nothing is left of a spire-agent")

// read returns what the spire-agent has left, and its key.
func (t *TakeOver) read(td spiffeid.TrustDomain, now time.Time) (state, crypto.Signer, error) {
	var left stockState
	if err := readStock(t.DataDir, stockStateFile, 0o022, &left); err != nil {
		return state{}, nil, err
	}
	if len(left.SVID) == 0 {
		return state{}, nil, fmt.Errorf("%w: %s holds no SVID", errNothingLeft, filepath.Join(t.DataDir, stockStateFile))
	}
	svid, err := parsePEM(left.SVID)
	if err != nil {
		return state{}, nil, fmt.Errorf("svid of %s: %w", filepath.Join(t.DataDir, stockStateFile), err)
	}
	bundle, err := parsePEM(left.Bundle)
	if err != nil {
		return state{}, nil, fmt.Errorf("bundle of %s: %w", filepath.Join(t.DataDir, stockStateFile), err)
	}
	if !now.Before(svid[0].NotAfter) {
		return state{}, nil, fmt.Errorf("%w: its SVID has expired at %s", errNothingLeft, svid[0].NotAfter.Format(time.RFC3339))
	}
	if err := checkStock(td, svid, bundle, now); err != nil {
		return state{}, nil, fmt.Errorf("%s: %w", filepath.Join(t.DataDir, stockStateFile), err)
	}
	signer, err := t.key(svid[0])
	if err != nil {
		return state{}, nil, err
	}
	return state{TrustDomain: td.Name(), SVID: rawCertificates(svid), Bundle: rawCertificates(bundle), Reattestable: left.Reattestable}, signer, nil
}

// checkStock fails unless the SVID is one of an agent of the trust domain, and
// the bundle's.
func checkStock(td spiffeid.TrustDomain, svid, bundle []*x509.Certificate, now time.Time) error {
	id, err := x509svid.IDFromCert(svid[0])
	switch {
	case err != nil:
		return fmt.Errorf("svid: %w", err)
	case !id.MemberOf(td):
		return fmt.Errorf("svid: %s is not of trust domain %s: compare trust_domain with spire-agent's", id, td)
	case !strings.HasPrefix(id.Path(), "/spire/agent/"):
		return fmt.Errorf("svid: %s is not the SPIFFE ID of an agent", id)
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range bundle {
		roots.AddCert(c)
	}
	for _, c := range svid[1:] {
		intermediates.AddCert(c)
	}
	_, err = svid[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return fmt.Errorf("svid: the bundle beside it does not vouch for it: %w", err)
	}
	return nil
}

// key returns the key of the SVID from keys.json, where the one in force and
// the one before it are.
func (t *TakeOver) key(leaf *x509.Certificate) (crypto.Signer, error) {
	dir := t.Keys
	if dir == "" {
		dir = t.DataDir
	}
	path := filepath.Join(dir, stockKeysFile)
	var held struct {
		Keys map[string][]byte `json:"keys"` // PKCS#8, by IDs such as agent-svid-A
	}
	if err := readStock(dir, stockKeysFile, 0o077, &held); err != nil {
		return nil, err
	}
	public, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		return nil, fmt.Errorf("svid: a key of type %T", leaf.PublicKey)
	}
	for _, der := range held.Keys {
		k, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			continue // spire-agent's other plugins keep nothing here, and what is of no use to it is none to us
		}
		if signer, ok := k.(crypto.Signer); ok && public.Equal(signer.Public()) {
			return signer, nil
		}
	}
	return nil, fmt.Errorf("%s has not the key of the SVID in %s: is agent.take_over.keys the directory of spire-agent's KeyManager \"disk\"?",
		path, filepath.Join(t.DataDir, stockStateFile))
}

// readStock reads a file of a spire-agent in a directory that nobody else can
// write to. The error wraps errNothingLeft where there is none.
func readStock(dir, name string, shut fs.FileMode, into any) error {
	d, err := ownDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", errNothingLeft, err)
	}
	if err != nil {
		return err
	}
	defer d.Close()
	info, err := d.Stat()
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("others can write to %s (mode %#o), so what is in it may be anybody's: find out who did, then chmod it", dir, info.Mode().Perm())
	}
	path := filepath.Join(dir, name)
	data, err := readOwn(path, shut, "spire-agent has not written it so: look at who could")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", errNothingLeft, err)
	case errors.Is(err, errCorruptState):
		return fmt.Errorf("%s: more than %d bytes", path, stateLimit)
	case err != nil:
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("%s is not what spire-agent writes: %w", path, plainJSON(err))
	}
	return nil
}

// plainJSON says what is wrong and where, and nothing of what the file holds.
func plainJSON(err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return fmt.Errorf("no JSON at byte %d", syntax.Offset)
	case errors.As(err, &kind):
		return fmt.Errorf("another kind of value at byte %d", kind.Offset)
	}
	return errors.New("no JSON of its kind")
}

// parsePEM reads certificates of one PEM block each.
func parsePEM(blocks [][]byte) ([]*x509.Certificate, error) {
	raw := make([][]byte, len(blocks))
	for i, text := range blocks {
		block, rest := pem.Decode(text)
		if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
			return nil, fmt.Errorf("certificate %d is no PEM block of a certificate", i+1)
		}
		raw[i] = block.Bytes
	}
	return parseCertificates(raw)
}

// alone fails where a spire-agent runs on what is to be taken over: two agents
// with one identity evict each other at the server. It has no lock, so its
// process is looked for in proc, which is /proc. One in another PID namespace is
// not seen.
func (t *TakeOver) alone(proc string) error {
	if t == nil {
		return nil
	}
	dir, err := os.Stat(t.DataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a node that never had one
	}
	if err != nil {
		return fmt.Errorf("take over from spire-agent: %w", err)
	}
	pid, err := stockAgentOn(proc, t.DataDir, dir)
	if err != nil {
		return fmt.Errorf("look for a running spire-agent: %w", err)
	}
	if pid != "" {
		return fmt.Errorf("a spire-agent (pid %s) runs on %s, which this agent is to take over: stop it first, and see that nothing starts it again; two agents with one identity evict each other",
			pid, t.DataDir)
	}
	return nil
}
