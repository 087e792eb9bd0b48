package keys

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

const (
	suffix     = ".key"
	tempPrefix = ".new-"
	// maxFile bounds what is read of a key file, in bytes. An RSA-4096 key in
	// PEM takes 3.3 kB.
	maxFile = 64 << 10
)

// Disk returns a Store with one PKCS#8 PEM file for each key in dir, which is
// made (0700) if it is not there. Files are 0600, and complete or not there at
// all. Disk fails if others may enter dir or if it belongs to somebody else:
// whoever may write there could replace the keys.
func Disk(dir string) (Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("key directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("key directory: %w", err)
	}
	if err := private(dir, info, "0700"); err != nil {
		return nil, fmt.Errorf("key directory: %w", err)
	}
	// The directory may be new, and a key is only as durable as its directory.
	if err := syncDir(filepath.Dir(filepath.Clean(dir))); err != nil {
		return nil, fmt.Errorf("key directory: %w", err)
	}
	return &disk{dir: dir}, nil
}

type disk struct {
	dir string
	mu  sync.Mutex // one New or Keep at a time: Keep sweeps up unfinished files
}

func (d *disk) path(id string) string { return filepath.Join(d.dir, id+suffix) }

func (d *disk) New(ctx context.Context) (Key, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	signer, err := NewWorkloadKey("ec-p256")
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return d.Adopt(ctx, signer)
}

func (d *disk) Adopt(ctx context.Context, signer crypto.Signer) (Key, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		return nil, fmt.Errorf("save key: %w", err)
	}
	k := &key{id: newID(), signer: signer}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.write(d.path(k.id), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return nil, fmt.Errorf("save key: %w", err)
	}
	return k, nil
}

// write makes a file that is there as a whole or not at all, and stays.
func (d *disk) write(path string, content []byte) (err error) {
	f, err := os.CreateTemp(d.dir, tempPrefix) // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(d.dir)
}

// syncDir makes what was created, renamed and removed in a directory last.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (d *disk) Load(ctx context.Context, id string) (Key, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := checkID(id); err != nil {
		return nil, fmt.Errorf("load key: %w", err)
	}
	path := d.path(id)
	content, err := read(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("load key %s: %w", path, ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("load key: %w", err)
	}
	signer, err := parse(content)
	if err != nil {
		return nil, fmt.Errorf("load key %s: %w: %w", path, ErrCorrupt, err)
	}
	return &key{id: id, signer: signer}, nil
}

// read returns the content of a private file. It follows no symbolic link,
// and does not wait for a writer should the path be a pipe.
func read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file: %w", path, ErrCorrupt)
	}
	if err := private(path, info, "0600"); err != nil {
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(content) > maxFile {
		err = fmt.Errorf("%s: larger than %d bytes: %w", path, maxFile, ErrCorrupt)
	}
	return content, err
}

// private fails unless the file or directory is ours and nobody else's to
// read, enter or write.
func private(path string, info fs.FileInfo, want string) error {
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, not to user %d who runs this: chown it", path, st.Uid, os.Geteuid())
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o, open to others: find out who had access, then chmod %s", path, perm, want)
	}
	return nil
}

func parse(content []byte) (crypto.Signer, error) {
	block, rest := pem.Decode(content)
	switch {
	case block == nil:
		return nil, errors.New("no PEM block")
	case block.Type != "PRIVATE KEY":
		return nil, fmt.Errorf("PEM block %.40q, want PRIVATE KEY", block.Type)
	case len(strings.TrimSpace(string(rest))) > 0:
		return nil, errors.New("something follows the PEM block")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	signer, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T cannot sign", k)
	}
	return signer, nil
}

func (d *disk) Keep(ctx context.Context, ids ...string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	files, err := os.ReadDir(d.dir)
	if err != nil {
		return fmt.Errorf("delete old keys: %w", err)
	}
	var errs []error
	removed := false
	for _, f := range files {
		id, isKey := strings.CutSuffix(f.Name(), suffix)
		isKey = isKey && checkID(id) == nil
		// What another run left unfinished is nobody's key; any other file is not
		// ours to delete.
		if isKey && !slices.Contains(ids, id) || strings.HasPrefix(f.Name(), tempPrefix) {
			errs = append(errs, os.Remove(filepath.Join(d.dir, f.Name())))
			removed = true
		}
	}
	if removed {
		errs = append(errs, syncDir(d.dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete old keys: %w", err)
	}
	return nil
}
