package devserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// maxStateFile bounds what is read back from Config.Dir, in bytes.
const maxStateFile = 16 << 20

// store keeps named JSON documents in a directory that it alone uses. A nil
// store keeps nothing.
type store struct {
	dir     string
	lease   *os.File
	release sync.Once
}

// openStore makes dir and takes its lease. It returns nil for no dir.
func openStore(dir string) (*store, error) {
	if dir == "" {
		return nil, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s is open to others (mode %#o) and would hold private keys; chmod 700 it or choose another directory", dir, info.Mode().Perm())
	}
	lease, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(lease.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = lease.Close() // nothing was written to it
		return nil, fmt.Errorf("%s is in use by another development server (%w); end it or choose another directory", dir, err)
	}
	return &store{dir: dir, lease: lease}, nil
}

// close gives up the lease.
func (s *store) close() {
	if s != nil {
		s.release.Do(func() { _ = s.lease.Close() }) // nothing was written to it
	}
}

// read fills v from the document and reports whether there was one.
func (s *store) read(name string, v any) (bool, error) {
	if s == nil {
		return false, nil
	}
	path := filepath.Join(s.dir, name)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	dec := json.NewDecoder(io.LimitReader(f, maxStateFile))
	dec.DisallowUnknownFields()
	err = dec.Decode(v)
	if err == nil {
		if _, more := dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("something follows the document")
		}
	}
	if err != nil {
		return false, s.corrupt(name, err)
	}
	return true, nil
}

// corrupt is the error for a document that makes no sense.
func (s *store) corrupt(name string, err error) error {
	return fmt.Errorf("%s is damaged (%w); remove %s to begin anew (agents must then attest again)", filepath.Join(s.dir, name), err, s.dir)
}

// write replaces the document, whole or not at all.
func (s *store) write(name string, v any) error {
	if s == nil {
		return nil
	}
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	tmp, err := os.CreateTemp(s.dir, name+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // gone already when the rename went well
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(s.dir, name))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", filepath.Join(s.dir, name), err)
	}
	return syncDir(s.dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
