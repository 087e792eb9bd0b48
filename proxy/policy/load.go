package policy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// MaxSize bounds the files of one policy together, in bytes. 100,000 rules
// take about a quarter of it.
const MaxSize = 64 << 20

// Load reads the files as one policy whose tests pass. It is all or nothing:
// the error is an Errors that names each finding's file, line and column, or the
// file that could not be read. Names are taken as they are (see Expand); their
// order does not matter.
func Load(files ...string) (*Policy, error) { return tested(Read(files...)) }

// Read is Load for whoever wants to see the results of the policy's tests: it
// does not run them.
func Read(files ...string) (*Policy, error) {
	if len(files) == 0 {
		return nil, errors.New("load policy: no file is named")
	}
	var l loader
	left := int64(MaxSize)
	for _, name := range unique(files) {
		data, err := readFile(name, left)
		if err != nil {
			l.findings.list = append(l.findings.list, err)
			continue
		}
		left -= int64(len(data))
		l.read(name, data)
	}
	return l.policy()
}

// Parse reads one policy from data, and runs its tests; name stands for the
// file in errors.
func Parse(name string, data []byte) (*Policy, error) {
	var l loader
	if len(data) > MaxSize {
		return nil, Errors{tooLarge(name)}
	}
	l.read(name, data)
	return tested(l.policy())
}

// Expand returns the files that match the shell patterns, sorted, each once.
// A pattern that matches nothing is an error: a policy that is not there
// should be noticed. A name without wildcards is returned as it is.
func Expand(patterns ...string) ([]string, error) {
	var files []string
	for _, pattern := range patterns {
		if !strings.ContainsAny(pattern, `*?[\`) {
			files = append(files, pattern)
			continue
		}
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("expand %q: %w", pattern, err)
		}
		if !strings.HasPrefix(filepath.Base(pattern), ".") { // what editors leave behind, as a shell has it
			found = slices.DeleteFunc(found, func(name string) bool { return strings.HasPrefix(filepath.Base(name), ".") })
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("expand %q: no file matches: %w", pattern, fs.ErrNotExist)
		}
		files = append(files, found...)
	}
	return unique(files), nil
}

func unique(files []string) []string {
	cleaned := make([]string, len(files))
	for i, f := range files {
		cleaned[i] = filepath.Clean(f)
	}
	slices.Sort(cleaned)
	return slices.Compact(cleaned)
}

// readFile reads a file of at most limit bytes. What is not a plain file is
// refused: reading it may never end.
func readFile(name string, limit int64) ([]byte, *Error) {
	unreadable := func(err error) *Error {
		if path := (*fs.PathError)(nil); errors.As(err, &path) {
			err = path.Err
		}
		return &Error{File: name, Msg: "read policy: " + err.Error(), err: err}
	}
	info, err := os.Stat(name)
	switch {
	case err != nil:
		return nil, unreadable(err)
	case info.IsDir():
		return nil, &Error{File: name, Msg: "read policy: a directory; name its files, or " + filepath.Join(name, "*.yaml")}
	case !info.Mode().IsRegular():
		return nil, &Error{File: name, Msg: "read policy: not a plain file"}
	case info.Size() > limit:
		return nil, tooLarge(name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, unreadable(err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, unreadable(err)
	}
	if int64(len(data)) > limit {
		return nil, tooLarge(name)
	}
	return data, nil
}

func tooLarge(name string) *Error {
	return &Error{File: name, Msg: fmt.Sprintf("too large: the files of a policy may have %d MiB together", MaxSize>>20)}
}
