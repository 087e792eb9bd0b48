package telemetry

import (
	"fmt"
	"io/fs"
	"os"
	"sync"
)

// ReopenableFile is a file that is appended to and can be opened anew under
// its path, for who moves it away: logrotate renames the file, then has the
// program reopen it. Every Write goes to one file as a whole, so a record is
// in the old file or in the new one. It is safe for concurrent use.
type ReopenableFile struct {
	path string
	mode fs.FileMode

	mu   sync.Mutex // guards the following
	file *os.File   // nil: closed
}

// OpenReopenable opens the file for appending, and makes it with the given
// mode (less the umask) when it is not there.
func OpenReopenable(path string, mode fs.FileMode) (*ReopenableFile, error) {
	f := &ReopenableFile{path: path, mode: mode}
	file, err := f.open()
	if err != nil {
		return nil, err
	}
	f.file = file
	return f, nil
}

func (f *ReopenableFile) open() (*os.File, error) {
	file, err := os.OpenFile(f.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, f.mode)
	if err != nil {
		return nil, fmt.Errorf("open for appending: %w", err)
	}
	return file, nil
}

// Write appends b.
func (f *ReopenableFile) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file == nil {
		return 0, f.closed()
	}
	return f.file.Write(b)
}

// Reopen opens the path anew and closes the file that was written to so far.
// On an error writing goes on to that file, and Reopen may be called again.
func (f *ReopenableFile) Reopen() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file == nil {
		return f.closed()
	}
	next, err := f.open()
	if err != nil {
		return err
	}
	old := f.file
	f.file = next
	if err := old.Close(); err != nil {
		return fmt.Errorf("close the file that was reopened: %w", err)
	}
	return nil
}

// Close closes the file. What is written later is refused with an error that
// is os.ErrClosed, and so is a second Close.
func (f *ReopenableFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file == nil {
		return f.closed()
	}
	err := f.file.Close()
	f.file = nil
	return err
}

func (f *ReopenableFile) closed() error {
	return &fs.PathError{Op: "write", Path: f.path, Err: os.ErrClosed}
}
