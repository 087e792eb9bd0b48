// Package fileset puts files in place as one set: whoever opens them by their
// names in the directory finds all of one set or all of the next.
//
//	d, err := fileset.Open("/run/certs", nil)
//	err = d.Put([]fileset.File{{Name: "svid.pem", …}, {Name: "svid_key.pem", …}})
//	… // readers are told, and have read
//	err = d.Sweep()
//
// Each set is a directory of its own, which is complete and on disk before its
// name is known. What readers open are symbolic links that stay:
//
//	svid.pem     -> ..data/svid.pem
//	svid_key.pem -> ..data/svid_key.pem
//	..data       -> ..set-2f1c…
//
// A new set comes into force by one rename(2), of ..data. Whoever opens two
// files while that happens can have one of each set; they are told after it,
// and no other set comes until they had their time (package fetch sees to that).
// The set before stays until Sweep, for those who have resolved ..data and are
// about to open the second file.
package fileset

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	current   = "..data" // as in the volumes of Kubernetes, which some readers watch
	setPrefix = "..set-"
	newPrefix = "..new-" // links on their way to their place
)

// Bounds of one set.
const (
	MaxFiles = 10_000
	maxName  = 255 // bytes of each element, NAME_MAX
)

// File is one file of a set.
type File struct {
	Name string // slash-separated, relative to the directory; no element begins with ".."
	Data []byte
	Mode fs.FileMode // permission bits, whatever the umask
}

// Owner is whom the files are given to; chown(2) is a privilege of root, apart
// from groups that one is a member of. An ID of -1 stays what it is.
type Owner struct{ UID, GID int }

// Dir is a directory that holds one set. One process at a time has it open. Its
// methods are for one goroutine.
type Dir struct {
	path  string
	root  *os.Root
	self  *os.File // locked
	owner *Owner
	step  func(string) error // after each step, in tests; nil
}

// Open opens the directory, making it (0755) where it is not there. It fails
// where the path is a symbolic link, where its group or everybody may write there
// and no sticky bit keeps them from replacing files, and where another process has
// it open.
// A nil owner leaves the files to the user who runs this.
func Open(dir string, owner *Owner) (_ *Dir, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open directory %s for writing: %w", dir, err)
		}
	}()
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // public names; keys have modes of their own
		return nil, err
	}
	named, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if named.Mode().Type() == fs.ModeSymlink {
		return nil, errors.New("it is a symbolic link, which whoever made it can turn elsewhere: name the directory itself")
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	d := &Dir{path: dir, root: root, owner: owner}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if d.self, err = root.Open("."); err != nil {
		return nil, err
	}
	info, err := d.self.Stat()
	switch {
	case err != nil:
		return nil, err
	case !os.SameFile(named, info): // somebody has put a link there meanwhile
		return nil, errors.New("it was replaced while it was opened")
	}
	if err := checkWriters(dir, info); err != nil {
		return nil, err
	}
	err = unix.Flock(int(d.self.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, errors.New("another process writes there: give each a directory of its own")
	}
	return d, err
}

// checkWriters fails where others than its owner can replace what is in a
// directory. A sticky bit keeps them from that, in a directory of root's or of
// ours: whoever owns it is not kept.
func checkWriters(dir string, info fs.FileInfo) error {
	mode := info.Mode()
	if mode.Perm()&0o022 == 0 {
		return nil
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if ok && mode&fs.ModeSticky != 0 && (st.Uid == 0 || int(st.Uid) == os.Geteuid()) {
		return nil
	}
	who := "everybody"
	if mode.Perm()&0o002 == 0 {
		who = "its group"
	}
	return fmt.Errorf("%s may write to it (mode %04o), and replace keys: chmod go-w %s", who, mode.Perm(), dir)
}

// Close leaves everything as it is.
func (d *Dir) Close() error {
	var err error
	if d.self != nil {
		err = d.self.Close()
	}
	return errors.Join(err, d.root.Close())
}

// Put puts a set in the place of the one before, which stays for those who have
// it open until Sweep. Names that the set has not are taken away. Plain files of
// those names are replaced; anything else there is an error, before anything
// changes. After an error the set before is in force, or the new one, complete.
func (d *Dir) Put(files []File) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write files to %s: %w", d.path, err)
		}
	}()
	tops, err := topNames(files)
	if err != nil {
		return err
	}
	for _, name := range append([]string{current}, tops...) {
		if err := d.replaceable(name); err != nil {
			return err
		}
	}
	if err := d.sweep(); err != nil { // what a crash has left
		return err
	}
	set := setPrefix + random()
	if err := d.writeSet(set, files); err != nil {
		return errors.Join(err, d.root.RemoveAll(set))
	}
	if err := d.did("written"); err != nil {
		return err
	}
	if err := d.link(set, current); err != nil {
		return err
	}
	if err := d.did("swapped"); err != nil {
		return err
	}
	for _, name := range tops {
		if to, err := d.root.Readlink(name); err == nil && to == inSet(name) && d.ours(name) {
			continue
		}
		if err := d.link(inSet(name), name); err != nil {
			return err
		}
		if err := d.did("linked " + name); err != nil {
			return err
		}
	}
	if err := d.unlinkOthers(tops); err != nil {
		return err
	}
	return d.self.Sync()
}

// Sweep removes the sets that are not in force.
func (d *Dir) Sweep() error {
	if err := d.sweep(); err != nil {
		return fmt.Errorf("remove old files from %s: %w", d.path, err)
	}
	return nil
}

func (d *Dir) did(step string) error {
	if d.step == nil {
		return nil
	}
	return d.step(step)
}

func inSet(name string) string { return current + "/" + name }

// topNames checks the names and returns the first element of each, once.
func topNames(files []File) ([]string, error) {
	if len(files) == 0 {
		return nil, errors.New("no files")
	}
	if len(files) > MaxFiles {
		return nil, fmt.Errorf("%d files, of %d that a directory may hold", len(files), MaxFiles)
	}
	var tops []string
	seen := map[string]bool{}
	for _, f := range files {
		if err := checkName(f.Name); err != nil {
			return nil, err
		}
		if seen[f.Name] {
			return nil, fmt.Errorf("two files have the name %s: give them others", f.Name)
		}
		seen[f.Name] = true
		top, _, _ := strings.Cut(f.Name, "/")
		if !slices.Contains(tops, top) {
			tops = append(tops, top)
		}
	}
	for name := range seen {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if seen[dir] {
				return nil, fmt.Errorf("%s is to be a file, and a directory for %s: give them other names", dir, name)
			}
		}
	}
	return tops, nil
}

// checkName keeps files within the directory and away from our own names.
func checkName(name string) error {
	for e := range strings.SplitSeq(name, "/") {
		switch {
		case e == "" || e == "." || strings.HasPrefix(e, "..") || strings.ContainsRune(e, 0):
			return fmt.Errorf("file name %q: want names that do not begin with two dots, separated by slashes", name)
		case len(e) > maxName:
			return fmt.Errorf("file name %.40q…: %d bytes, of %d that a name may have", e, len(e), maxName)
		}
	}
	return nil
}

// replaceable fails where something is in the place of a link of ours that we
// have not made and whose loss would matter.
func (d *Dir) replaceable(name string) error {
	info, err := d.root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().IsRegular() && name != current:
		return nil
	case info.Mode().Type() == fs.ModeSymlink:
		to, err := d.root.Readlink(name)
		if err != nil {
			return err
		}
		if to == inSet(name) || name == current && strings.HasPrefix(to, setPrefix) {
			return nil
		}
		return fmt.Errorf("%s is a symbolic link to %.200q that was not made here: find out who did, and remove it", name, to)
	}
	return fmt.Errorf("%s is there and is not a file that was written here: remove it or choose another directory", name)
}

// ours tells whether nobody else owns the name, who could replace it under a
// sticky bit.
func (d *Dir) ours(name string) bool {
	info, err := d.root.Lstat(name)
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// writeSet makes the directory of a set with all of its files, and has them on
// disk. Nobody else enters it before they are complete.
func (d *Dir) writeSet(set string, files []File) error {
	if err := d.root.Mkdir(set, 0o700); err != nil {
		return err
	}
	in, err := d.root.OpenRoot(set)
	if err != nil {
		return err
	}
	defer in.Close()
	self, err := in.Open(".")
	if err != nil {
		return err
	}
	defer self.Close()
	// Who owns the directory can have put another one in its place.
	info, err := self.Stat()
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Geteuid() || info.Mode().Perm() != 0o700 {
		return fmt.Errorf("somebody has replaced the new directory: choose one that only user %d can write to", os.Geteuid())
	}
	dirs := []string{"."}
	for i := range files {
		made, err := makeParents(in, files[i].Name)
		if err != nil {
			return err
		}
		dirs = append(dirs, made...)
		if err := d.writeFile(in, &files[i]); err != nil {
			return err
		}
		if err := d.did("wrote " + files[i].Name); err != nil {
			return err
		}
	}
	slices.Reverse(dirs)
	for _, dir := range dirs {
		if err := publish(in, dir); err != nil {
			return err
		}
	}
	return nil
}

// makeParents makes the directories that a file needs and returns those that
// are new, outer ones first.
func makeParents(in *os.Root, name string) (made []string, err error) {
	for i, c := range name {
		if c != '/' {
			continue
		}
		err := in.Mkdir(name[:i], 0o700)
		switch {
		case err == nil:
			made = append(made, name[:i])
		case !errors.Is(err, fs.ErrExist):
			return nil, err
		}
	}
	return made, nil
}

// publish lets others enter a directory and has what is in it on disk. What they
// can read there the modes of the files say.
func publish(in *os.Root, dir string) error {
	f, err := in.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Chmod(0o755), f.Sync(), f.Close())
}

// writeFile makes one file. Its owner and mode are set before there is anything
// in it to read.
func (d *Dir) writeFile(in *os.Root, f *File) (err error) {
	out, err := in.OpenFile(f.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if d.owner != nil {
		if err := out.Chown(d.owner.UID, d.owner.GID); err != nil {
			return fmt.Errorf("%w: only root gives files to others, and anybody to groups of their own", err)
		}
	}
	if err := out.Chmod(f.Mode.Perm()); err != nil {
		return err
	}
	if _, err := out.Write(f.Data); err != nil {
		return err
	}
	return out.Sync()
}

// link puts a symbolic link in place, replacing what is there.
func (d *Dir) link(to, name string) error {
	temporary := newPrefix + random()
	if err := d.root.Symlink(to, temporary); err != nil {
		return err
	}
	if err := d.root.Rename(temporary, name); err != nil {
		return errors.Join(err, d.root.Remove(temporary))
	}
	return d.self.Sync()
}

// names returns what is in the directory.
func (d *Dir) names() ([]string, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return nil, err
	}
	names, err := f.Readdirnames(-1)
	return names, errors.Join(err, f.Close())
}

// unlinkOthers removes the links of earlier sets that are not among names.
func (d *Dir) unlinkOthers(names []string) error {
	all, err := d.names()
	if err != nil {
		return err
	}
	for _, name := range all {
		if slices.Contains(names, name) || !d.ours(name) {
			continue
		}
		if to, err := d.root.Readlink(name); err == nil && to == inSet(name) {
			if err := d.root.Remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweep removes sets and links of ours that are not in force.
func (d *Dir) sweep() error {
	all, err := d.names()
	if err != nil {
		return err
	}
	inForce, err := d.root.Readlink(current)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	for _, name := range all {
		old := strings.HasPrefix(name, setPrefix) && name != inForce || strings.HasPrefix(name, newPrefix)
		if old && d.ours(name) {
			errs = append(errs, d.root.RemoveAll(name))
		}
	}
	return errors.Join(errs...)
}

func random() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
