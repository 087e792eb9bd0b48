package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/narthex-id/narthex/internal/config/importer"
)

// newImport makes `narthex import`.
func newImport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Make a narthex.yaml of a spire-agent's configuration",
		Long: `Reads the configuration of a spire-agent, HCL or JSON, and prints the narthex.yaml
that does the same. Every key is carried, or named on standard error and in a
comment of the output, with the reason and what to do. A file named - is standard
input. With -o the output goes into a file, and secrets such as a join token into
files of mode 0600 beside it; no secret is ever printed. What spire-agent is told by
flags is not in its file: write it there first.
Exit status: 0 when all was carried, 1 when something was not, 2 when the file
cannot be read.`,
		Example: `  narthex import /etc/spire/agent.conf -o /etc/narthex/narthex.yaml
  narthex import agent.conf --dir /opt/spire --data-dir /var/lib/narthex
  kubectl get configmap spire-agent -o jsonpath='{.data.agent\.conf}' | narthex import -`,
		Args: oneArg("no file: give a spire-agent's configuration, or - for standard input"),
	}
	flags := cmd.Flags()
	output := flags.StringP("output", "o", "", "write narthex.yaml here, and secrets beside it, where nothing is yet")
	dir := flags.String("dir", "", "the directory that spire-agent is started in, which its relative paths are relative to (default: this one)")
	dataDir := flags.String("data-dir", "/var/lib/narthex", "data_dir of the new agent")
	expand := flags.Bool("expand-env", false, "expand $VARIABLE and ${VARIABLE} first, as spire-agent's -expandEnv does")
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "expandEnv" { // as people have it in their fingers
			name = "expand-env"
		}
		return pflag.NormalizedName(name)
	})
	for _, name := range []string{"dir", "data-dir"} {
		if err := cmd.MarkFlagDirname(name); err != nil {
			panic(err) // a flag that is not there: a mistake in the program
		}
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o := importer.Options{DataDir: *dataDir, DirGiven: *dir != ""}
		if *expand {
			o.Getenv = func(name string) string {
				v, ok := os.LookupEnv(name)
				if !ok {
					fmt.Fprintf(cmd.ErrOrStderr(), "the variable %q is not set: its place is empty\n", name)
				}
				return v
			}
		}
		var err error
		if o.Dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
		r, err := readAgentConf(cmd, args[0], o)
		if err != nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: %v\n", cmd.CommandPath(), err)
			return exitError{exitUsage}
		}
		return putImport(cmd, r, *output)
	}
	return cmd
}

// readAgentConf reads a spire-agent's configuration.
func readAgentConf(cmd *cobra.Command, name string, o importer.Options) (*importer.Result, error) {
	data, err := readImport(cmd, name, importer.MaxSize+1)
	if err != nil {
		return nil, err
	}
	if name == "-" {
		name = "stdin"
	}
	return importer.SpireAgent(name, data, o)
}

// putImport writes narthex.yaml, and says what is to be known of it.
func putImport(cmd *cobra.Command, r *importer.Result, output string) error {
	errOut, complete := cmd.ErrOrStderr(), r.Complete()
	sayNotes(errOut, "Not carried over:", r.Notes, true)
	sayNotes(errOut, "To know:", r.Notes, false)
	name := output
	if name == "" {
		name = "narthex.yaml"
	}
	for _, f := range r.Check(name) {
		complete = false
		fmt.Fprintf(errOut, "the result needs more by hand: %s\n", f.Error())
	}
	if output == "" {
		for _, s := range r.Secrets {
			complete = false
			fmt.Fprintf(errOut, "%s: a secret, which is not printed: write it into %s beside narthex.yaml, mode 0600, or give -o\n", s.Key, s.Name)
		}
		if _, err := cmd.OutOrStdout().Write(r.Text); err != nil {
			return err
		}
	} else if err := writeImport(errOut, r, output); err != nil {
		return fmt.Errorf("write the result of the import: %w", err)
	}
	if !complete {
		return exitError{exitFailure}
	}
	return nil
}

// sayNotes prints the notes of what was lost, or of what was not, as they stand
// in the output.
func sayNotes(w io.Writer, title string, notes []importer.Note, lost bool) {
	for i := range notes {
		if notes[i].Lost != lost {
			continue
		}
		if title != "" {
			fmt.Fprintln(w, title)
			title = ""
		}
		fmt.Fprintln(w, notes[i].String())
	}
}

// writeImport writes the files, none of which may be there already.
func writeImport(errOut io.Writer, r *importer.Result, output string) error {
	var made []string
	write := func(name string, data string, mode os.FileMode) error {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("%s is there already: remove it, or give -o a file of another directory", name)
		}
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w; make its directory first: mkdir -p %s", err, filepath.Dir(name))
		}
		if err != nil {
			return err
		}
		made = append(made, name)
		_, err = f.WriteString(data)
		return errors.Join(err, f.Close())
	}
	err := write(output, string(r.Text), 0o644)
	for _, s := range r.Secrets {
		if err == nil {
			err = write(filepath.Join(filepath.Dir(output), s.Name), string(s.Value)+"\n", 0o600)
		}
	}
	if err != nil {
		for _, name := range made { // half of an import is of no use
			err = errors.Join(err, os.Remove(name))
		}
		return err
	}
	fmt.Fprintf(errOut, "written: %s\n", strings.Join(made, ", "))
	return nil
}
