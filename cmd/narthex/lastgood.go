package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/proxy/policy"
)

// This file keeps the rule files that were last in force, for a start at which
// those that are configured cannot be used. docs/design has the reasons.

// proxyDirName is the inherited directory in which the proxy under `narthex
// run` keeps what is to survive it.
const proxyDirName = "@proxy-dir"

const (
	manifestName = "manifest.json"
	manifestMax  = 16 << 20 // bytes: a policy of some 50,000 files
	unfinished   = ".new"   // of a file that is being written
)

// lastGood is the copy and where it is. One without a directory keeps nothing.
type lastGood struct {
	base string // data_dir/proxy: what the sandbox leaves open
	dir  string
	log  hclog.Logger
	kept manifest // what is known to be there
	said string   // the last problem that was logged
	bars error    // where there is no dir: why the copy that is there is not used
}

// manifest says of what the copy is one. A copy is good for the narthex.yaml
// whose rules it has, and for listeners that lead where they did: rules are
// written for the listeners they come with.
type manifest struct {
	Version   int        `json:"version"`
	Config    string     `json:"config"`    // narthex.yaml
	Listeners string     `json:"listeners"` // hash of what they are and where they lead
	Kept      time.Time  `json:"kept"`
	Files     []ruleFile `json:"files"`
	SHA256    string     `json:"sha256"` // of all this with this field empty
}

const manifestVersion = 1

// ruleFile is a rule file by what was in it. Its copy is named by the hash.
type ruleFile struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
}

func (f ruleFile) copyName() string { return f.SHA256 + ".yaml" }

// openLastGood finds the directory: the one that was handed down, or the one
// in data_dir, which it makes. Where there is none it says so once.
func openLastGood(c *config.Config, files inherited, log hclog.Logger) *lastGood {
	g := &lastGood{log: log, base: files.path(proxyDirName)}
	_, supervised := files[statusPeerName]
	switch {
	case g.base != "":
	case supervised: // which has said why there is none
		return g
	case !c.HasDataDir():
		log.Warn("data_dir is not set: the rules in force are not kept, so a restart with rule files that cannot be used fails")
		return g
	default:
		g.base = filepath.Join(string(c.DataDir), "proxy")
	}
	if err := g.open(); err != nil {
		log.Warn("the rules in force are not kept, so a restart with rule files that cannot be used fails", "error", err)
		return &lastGood{log: log, bars: g.barred(err)}
	}
	return g
}

// barred is why a copy is not used whose directory cannot be; nil where there
// is none.
func (g *lastGood) barred(why error) error {
	dir := filepath.Join(g.base, "last-good")
	if _, err := os.Lstat(filepath.Join(dir, manifestName)); err == nil {
		return notUsed(dir, why)
	}
	return nil
}

func (g *lastGood) open() error {
	if err := os.MkdirAll(g.base, 0o700); err != nil {
		return fmt.Errorf("make the proxy's directory in data_dir: %w", err)
	}
	dir := filepath.Join(g.base, "last-good")
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the directory of the last good rules: %w", err)
	}
	for _, path := range []string{g.base, dir} {
		if err := ours(path); err != nil {
			return err
		}
	}
	g.dir = dir
	return nil
}

// ours fails for a directory in which somebody else could put rules.
func ours(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory", path)
	case !ok || int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s does not belong to user %d who runs this: chown or remove it", path, os.Geteuid())
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s has mode %#o, so that others may read or write it: chmod 0700 it", path, info.Mode().Perm())
	}
	return nil
}

// purpose is what a copy is good for: nothing in it but what the manifest says
// before there are files.
func purpose(c *config.Config, path string) manifest {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	h := sha256.New()
	for i := range c.Proxy.Listeners {
		l := &c.Proxy.Listeners[i]
		fmt.Fprintf(h, "%q %q %q %q %q %q\n", l.Name, l.Direction, l.Bind, l.Mode, l.Target, l.ServerName)
		for _, r := range l.Routes {
			fmt.Fprintf(h, "route %q %q %q\n", r.SNI, r.ALPN, r.Target)
		}
		if l.Identity != nil {
			fmt.Fprintf(h, "identity %q %q\n", l.Identity.SPIFFEID.String(), l.Identity.Hint)
		}
		for _, id := range l.Expect {
			fmt.Fprintf(h, "expect %q\n", id.String())
		}
	}
	for i := range c.Proxy.ExtAuthz {
		e := &c.Proxy.ExtAuthz[i]
		fmt.Fprintf(h, "ext_authz %q %q %q\n", e.Name, e.Bind, e.Clients)
	}
	return manifest{Version: manifestVersion, Config: path, Listeners: hex.EncodeToString(h.Sum(nil))}
}

// errNoCopy is why there is nothing to fall back on.
var errNoCopy = errors.New("there are no last good rules")

// notUsed says of a copy that is there why it is of no use, and what to do.
func notUsed(dir string, why error) error {
	return fmt.Errorf("there is a copy of the last good rules in %s, but it is not used: %w. Mend the rule files: once they are in force, a new copy takes its place", dir, why)
}

// load reads the copy, if it is whole and good for the purpose, and returns
// when it was made. The error is errNoCopy, or says why the copy that is there
// is not used.
func (g *lastGood) load(want manifest) (*policy.Policy, time.Time, error) {
	switch {
	case g.bars != nil:
		return nil, time.Time{}, g.bars
	case g.dir == "":
		return nil, time.Time{}, errNoCopy
	}
	data, err := readPlain(filepath.Join(g.dir, manifestName), manifestMax)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, time.Time{}, errNoCopy
	}
	if err != nil {
		return nil, time.Time{}, notUsed(g.dir, err)
	}
	m, err := parseManifest(data)
	if err != nil {
		return nil, time.Time{}, notUsed(g.dir, fmt.Errorf("%s: %w", manifestName, err))
	}
	rules, err := g.read(m, want)
	if err != nil {
		return nil, time.Time{}, notUsed(g.dir, err)
	}
	g.kept = m
	return rules, m.Kept, nil
}

// read reads the copies that m names, if they are good for the purpose.
func (g *lastGood) read(m, want manifest) (*policy.Policy, error) {
	switch {
	case m.Config != want.Config:
		return nil, fmt.Errorf("its rules are those of %s, not of %s: give each a data_dir of its own", m.Config, want.Config)
	case m.Listeners != want.Listeners:
		return nil, errors.New("its rules were for other listeners than narthex.yaml has now; with the listeners as they were it would be used")
	}
	var paths []string
	for _, f := range m.Files {
		path := filepath.Join(g.dir, f.copyName())
		if sum, err := hashOf(path); err != nil {
			return nil, fmt.Errorf("the copy of %s: %w", f.Name, err)
		} else if sum != f.SHA256 {
			return nil, fmt.Errorf("the copy of %s, %s, is not what was kept, so it was edited or is torn", f.Name, f.copyName())
		}
		paths = append(paths, path)
	}
	return policy.Load(paths...)
}

// parseManifest reads what manifest.encode wrote, and nothing else.
func parseManifest(data []byte) (manifest, error) {
	var m manifest
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return manifest{}, err
	}
	if m.Version != manifestVersion {
		return manifest{}, fmt.Errorf("it is of version %d, want %d", m.Version, manifestVersion)
	}
	again, err := m.encode()
	if err != nil {
		return manifest{}, err
	}
	if !bytes.Equal(again, data) {
		return manifest{}, errors.New("its hash does not fit, so it was edited or is torn")
	}
	for _, f := range m.Files {
		if sum, err := hex.DecodeString(f.SHA256); err != nil || len(sum) != sha256.Size {
			return manifest{}, fmt.Errorf("%q is no SHA-256", f.SHA256)
		}
	}
	if len(m.Files) == 0 {
		return manifest{}, errors.New("it names no file")
	}
	return m, nil
}

// encode returns the manifest with its hash, as it is written.
func (m manifest) encode() ([]byte, error) {
	m.SHA256 = ""
	bare, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("write the manifest: %w", err)
	}
	sum := sha256.Sum256(bare)
	m.SHA256 = hex.EncodeToString(sum[:])
	data, err := json.MarshalIndent(m, "", "  ")
	return append(data, '\n'), err
}

// fingerprint says what is in rule files, before they are loaded: what is kept
// later must be that. Where one cannot be read there is nothing to keep.
func fingerprint(files []string) []ruleFile {
	var list []ruleFile
	for _, name := range files {
		sum, err := hashOf(name)
		if err != nil {
			return nil
		}
		list = append(list, ruleFile{name, sum})
	}
	return list
}

func hashOf(name string) (string, error) {
	data, err := readPlain(name, policy.MaxSize)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}

// readPlain reads a plain file of at most limit bytes. Of another, reading may
// never end.
func readPlain(name string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s is not a plain file of at most %d MiB", name, limit>>20)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s grows beyond %d MiB", name, limit>>20)
	}
	return data, err
}

// keep makes the rule files that were put in force the copy, in the place of
// the one there is.
func (g *lastGood) keep(want manifest, files []ruleFile) {
	if g.dir == "" || len(files) == 0 {
		return
	}
	if g.kept.Config == want.Config && g.kept.Listeners == want.Listeners && slices.Equal(g.kept.Files, files) {
		return
	}
	want.Kept, want.Files = time.Now().UTC().Truncate(time.Second), files
	err := g.write(want)
	switch {
	case err == nil:
		g.kept, g.said = want, ""
	case errors.Is(err, errChanged): // and whoever watches them loads them again
	case g.said != err.Error():
		g.said = err.Error()
		g.log.Warn("the rules in force are not kept, so a restart with rule files that cannot be used goes on with older ones or fails", "error", err)
	}
}

// errChanged is why files are not kept that are no longer what was loaded.
var errChanged = errors.New("a rule file has changed since it was loaded")

// write makes the copy: texts under names that nothing refers to yet, then the
// manifest in one step, then what it refers to no more goes. Whenever this
// ends, the old copy or the new one is whole.
func (g *lastGood) write(m manifest) error {
	refers := map[string]bool{manifestName: true}
	for _, f := range m.Files {
		refers[f.copyName()] = true
		path := filepath.Join(g.dir, f.copyName())
		if sum, err := hashOf(path); err == nil && sum == f.SHA256 {
			continue
		}
		data, err := readPlain(f.Name, policy.MaxSize)
		if err != nil {
			return fmt.Errorf("keep a rule file: %w", err)
		}
		if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != f.SHA256 {
			return errChanged
		}
		if err := replaceFile(path, data); err != nil {
			return fmt.Errorf("keep a rule file: %w", err)
		}
	}
	data, err := m.encode()
	if err != nil {
		return err
	}
	err = syncDir(g.dir) // texts are on the disk before what refers to them is
	if err == nil {
		err = replaceFile(filepath.Join(g.dir, manifestName), data)
	}
	if err == nil {
		err = syncDir(g.dir)
	}
	if err != nil {
		return fmt.Errorf("keep the rule files: %w", err)
	}
	entries, err := os.ReadDir(g.dir)
	for _, e := range entries {
		if !refers[e.Name()] {
			err = errors.Join(err, os.Remove(filepath.Join(g.dir, e.Name())))
		}
	}
	return err
}

// replaceFile puts a file of mode 0600 in the place of path in one step.
func replaceFile(path string, data []byte) error {
	next := path + unfinished
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		_ = os.Remove(next)
	}
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lendProxyDir opens data_dir/proxy for the proxy of `narthex run`, which may
// not enter data_dir, and makes it where it is missing. It belongs to the user
// whom the proxy becomes.
func lendProxyDir(c *config.Config, u *account) (_ *os.File, err error) {
	if err := os.MkdirAll(string(c.DataDir), 0o700); err != nil {
		return nil, fmt.Errorf("make data_dir: %w", err)
	}
	if err := ours(string(c.DataDir)); err != nil {
		return nil, fmt.Errorf("data_dir: %w", err)
	}
	root, err := os.OpenRoot(string(c.DataDir))
	if err != nil {
		return nil, fmt.Errorf("open data_dir: %w", err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	if err := root.Mkdir("proxy", 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make the proxy's directory in data_dir: %w", err)
	}
	dir, err := root.OpenFile("proxy", os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open the proxy's directory in data_dir: %w", err)
	}
	if u != nil {
		if err := dir.Chown(int(u.uid), int(u.gid)); err != nil {
			return nil, errors.Join(fmt.Errorf("give the proxy its directory in data_dir: %w", err), dir.Close())
		}
	}
	return dir, nil
}
