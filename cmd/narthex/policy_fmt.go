package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/proxy/policy"
)

func newPolicyFmt() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fmt FILE...",
		Short: "Lay rule files out in their one form",
		Long: `Rewrites rule files in the canonical form: sections and keys in one order, one
layout, one way to quote. What the rules say stays the same; the order of rules,
tests and items is yours; comments stay with what they stand at. A file that
does not load is formatted too, if it is YAML and has a section of rules. One that
cannot be read is left as it is, and the others are still written. The names of
files that were rewritten go to standard error.
A symbolic link is followed: the file it names is replaced. - reads standard
input and writes standard output.
Exit status: 0 when all is well, 1 when a file could not be formatted or, with
--check, is not in its form, 2 for a call that cannot be made sense of.`,
		Example: `  narthex policy fmt rules.yaml              rewrite a file
  narthex policy fmt --check rules/*.yaml    for CI: list those that would change
  narthex policy fmt --diff rules.yaml       show what would change, write nothing
  narthex policy fmt - <rules.yaml           from an editor`,
		Args: cobra.ArbitraryArgs,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
		},
	}
	check := cmd.Flags().Bool("check", false, "write nothing; list the files that would change, and exit with 1 if there are any")
	diff := cmd.Flags().Bool("diff", false, "write nothing; print what would change")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return usageError{errors.New("no rule file: name some, or give - for standard input")}
		case len(args) > 1 && slices.Contains(args, "-"):
			return usageError{errors.New("- is standard input, and stands alone")}
		}
		f := policyFmt{in: cmd.InOrStdin(), out: cmd.OutOrStdout(), errOut: cmd.ErrOrStderr(), check: *check, diff: *diff}
		good := true
		for _, name := range args {
			if err := f.file(name); err != nil {
				fmt.Fprintln(cmd.ErrOrStderr(), err)
				good = false
			}
		}
		if !good || *check && f.changed {
			return exitError{exitFailure}
		}
		return nil
	}
	return cmd
}

// policyFmt is one call of the command.
type policyFmt struct {
	in          io.Reader
	out, errOut io.Writer
	check, diff bool

	changed bool // a file is not in its form
}

// file formats one file. The error names it.
func (f *policyFmt) file(name string) error {
	target, shown := name, name
	var data []byte
	var err error
	if name == "-" {
		shown = "standard input"
		data, err = readBounded(f.in)
	} else {
		// The link stays, and what it names is replaced.
		if target, err = filepath.EvalSymlinks(name); err == nil {
			data, err = readRules(target)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: read rules: %w", shown, withoutPath(err))
	}
	formatted, err := policy.Format(shown, data)
	if err != nil {
		return err
	}
	if !policy.HasSections(formatted) {
		return fmt.Errorf("%s: not a rule file: it has none of %s", shown, strings.Join(policy.Sections(), ", "))
	}
	same := bytes.Equal(data, formatted)
	f.changed = f.changed || !same
	switch {
	case f.check || f.diff:
		return f.show(shown, data, formatted)
	case name == "-":
		_, err := f.out.Write(formatted)
		return err
	case same:
		return nil
	}
	if err := rewriteFile(target, formatted); err != nil {
		return fmt.Errorf("%s: write formatted rules: %w", shown, err)
	}
	_, err = fmt.Fprintln(f.errOut, shown)
	return err
}

// show prints what would change of a file, or its name alone.
func (f *policyFmt) show(name string, data, formatted []byte) error {
	switch {
	case bytes.Equal(data, formatted):
		return nil
	case f.diff:
		_, err := fmt.Fprintf(f.out, "--- %s.orig\n+++ %s\n%s", name, name, lineDiff(data, formatted))
		return err
	}
	_, err := fmt.Fprintln(f.out, name)
	return err
}

// withoutPath takes the file's name off an error that is said with it.
func withoutPath(err error) error {
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		return path.Err
	}
	return err
}

// readRules reads a file that may hold rules. What is not a plain file is
// refused: reading it may never end.
func readRules(name string) ([]byte, error) {
	info, err := os.Stat(name)
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, fmt.Errorf("a directory; name its files, or %s", filepath.Join(name, "*.yaml"))
	case !info.Mode().IsRegular():
		return nil, errors.New("not a plain file")
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return readBounded(file)
}

// readBounded reads no more than a policy may have, and one byte for the
// policy package to see that there is more.
func readBounded(r io.Reader) ([]byte, error) {
	return io.ReadAll(io.LimitReader(r, policy.MaxSize+1))
}

// rewriteFile puts data in the place of a file at once: who reads it meanwhile
// has the old or the new, and a crash leaves one of them. Mode and owner stay.
func rewriteFile(name string, data []byte) (err error) {
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() {
		temp.Close()
		if err != nil {
			os.Remove(temp.Name())
		}
	}()
	if _, err := temp.Write(data); err != nil {
		return err
	}
	if err := keepOwner(temp, info); err != nil {
		return err
	}
	if err := temp.Chmod(info.Mode()); err != nil { // after chown, which clears bits
		return err
	}
	if err := temp.Sync(); err != nil {
		return err
	}
	return os.Rename(temp.Name(), name)
}

// keepOwner gives a new file the owner and group of the old.
func keepOwner(f *os.File, old fs.FileInfo) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	was, ok := old.Sys().(*syscall.Stat_t)
	is, too := info.Sys().(*syscall.Stat_t)
	if !ok || !too || was.Uid == is.Uid && was.Gid == is.Gid {
		return nil
	}
	if err := f.Chown(int(was.Uid), int(was.Gid)); err != nil {
		return fmt.Errorf("the file would not stay that of uid %d, gid %d; run as its owner: %w", was.Uid, was.Gid, withoutPath(err))
	}
	return nil
}
