package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// image is an executable that children are started from. It is kept open, so
// that all of them are the same program even when a package manager has put
// another one in its place.
type image struct{ file *os.File }

const selfPath = "/proc/self/exe"

// openImage opens the program that this process runs.
func openImage() (*image, error) {
	f, err := os.Open(selfPath)
	if err != nil {
		return nil, fmt.Errorf("open the executable: %w", err)
	}
	return &image{f}, nil
}

// openImageAt opens the program that is at path now.
func openImageAt(path string) (*image, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the executable: %w", err)
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Mode()&0o111 == 0) {
		err = fmt.Errorf("open the executable: %s is no program: its mode is %v", path, info.Mode())
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &image{f}, nil
}

func (i *image) close() { _ = i.file.Close() }

// startedAs returns the path under which this process was started, where a
// newer version of the program will be put. It is to be called at the start,
// when the program is still there. Symbolic links are not followed, because
// they may lead elsewhere by then.
func startedAs() (string, error) {
	own, err := os.Stat(selfPath)
	if err != nil {
		return "", fmt.Errorf("find this executable: %w", err)
	}
	path, err := exec.LookPath(os.Args[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err == nil {
		at, err := os.Stat(path) //nolint:gosec // G703: whoever started us may name any program
		if err == nil && os.SameFile(own, at) {
			return path, nil
		}
	}
	if path, err = os.Executable(); err != nil { // args[0] was no path
		return "", fmt.Errorf("find this executable: %w", err)
	}
	return path, nil
}
