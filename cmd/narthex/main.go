// Command narthex gives workloads short-lived identities and lets them speak
// only to peers that rules name by SPIFFE ID: an agent, a proxy, and the
// tools around them, in one binary. Each file here is one command; what a
// command does beyond flags, files and signals is in the rooms it wires.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"os/user"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/narthex-id/narthex/internal/config"
)

// version is set when the binary is built.
var version = "dev"

// Exit codes. A command that tells good from bad (check) keeps 1 for findings
// and 2 for a call it could not make sense of; one that asks somebody (fetch)
// has 3 for no answer.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitUnavailable = 3
)

// exitError carries an exit code to main. What it has to say was said.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// usageError marks a call that the user has to write otherwise.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func main() { os.Exit(execute()) }

func execute() int {
	root := newRoot()
	cmd, err := root.ExecuteC()
	var exit exitError
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		return exit.code
	case errors.As(err, &usage), strings.HasPrefix(err.Error(), "unknown command"): // cobra has no type for it
		fmt.Fprintf(os.Stderr, "narthex: %v\nSee `%s --help`.\n", err, cmd.CommandPath())
		return exitUsage
	}
	fmt.Fprintf(os.Stderr, "%s: %v%s\n", cmd.CommandPath(), err, asWhom(err))
	return exitFailure
}

// asWhom tells who it was that a file could not be opened by: under `narthex
// run` as root that is not the user who reads the message.
func asWhom(err error) string {
	if !errors.Is(err, fs.ErrPermission) {
		return ""
	}
	name := fmt.Sprintf("uid %d", os.Geteuid())
	if u, err := user.LookupId(strconv.Itoa(os.Geteuid())); err == nil {
		name = fmt.Sprintf("user %s (%s)", u.Username, name)
	}
	return fmt.Sprintf("\nThis process runs as %s.", name)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "narthex",
		Short: "Workload identity and mutual TLS by SPIFFE ID",
		Long: `Narthex gives every workload of a node a short-lived identity from a SPIRE
Server, and lets services that know nothing of it speak mutual TLS with peers
that rules name by SPIFFE ID.`,
		Example: `  narthex demo                       see it work, without server, root or configuration
  narthex run -c narthex.yaml        agent and proxy of one host
  narthex check -c narthex.yaml      is this configuration good?`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{flagError(err)} })
	root.AddCommand(
		newDemo(), newRun(), newAgent(), newProxy(), newCSI(), newCheck(), newPolicy(), newImport(),
		newFetch(), newValidate(), newStatus(), newExplain(), newLevel(), newHealth(), newDevServer(), newVersion(),
	)
	checkArgs(root.Commands())
	return root
}

// flagError says what is wrong with a flag's value, without the name of the
// function that has found it out.
func flagError(err error) error {
	var invalid *pflag.InvalidValueError
	var number *strconv.NumError
	if errors.As(err, &invalid) && errors.As(err, &number) {
		return fmt.Errorf("--%s %q: want a number (%w)", invalid.GetFlag().Name, invalid.GetValue(), number.Err)
	}
	return err
}

// oneArg takes one argument; missing is what a person reads without it.
func oneArg(missing string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch len(args) {
		case 0:
			return errors.New(missing)
		case 1:
			return nil
		}
		return fmt.Errorf("%d arguments: want one", len(args))
	}
}

// whichCommand is what a command does that is nothing without one of those below
// it.
func whichCommand(cmd *cobra.Command, _ []string) error {
	var names []string
	for _, below := range cmd.Commands() {
		if below.IsAvailableCommand() {
			names = append(names, below.Name())
		}
	}
	choice := strings.Join(names, ", ")
	if len(names) > 1 {
		choice = "one of " + choice
	}
	return usageError{fmt.Errorf("%s alone does nothing: say %s", cmd.CommandPath(), choice)}
}

// checkArgs has each command, and those below it, take no arguments where it
// does not say which, and makes wrong ones a usageError.
func checkArgs(commands []*cobra.Command) {
	for _, c := range commands {
		if c.Args == nil {
			c.Args = cobra.NoArgs
		}
		args := c.Args
		c.Args = func(cmd *cobra.Command, list []string) error {
			if err := args(cmd, list); err != nil {
				return usageError{err}
			}
			return nil
		}
		checkArgs(c.Commands())
	}
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  narthex version",
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "narthex %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			fmt.Fprintf(cmd.OutOrStdout(), "FIPS 140-3 module %s\n", fipsWords())
		},
	}
}

// completeWords has the shell complete a flag's value from a list.
func completeWords(cmd *cobra.Command, flag string, words ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // a flag that is not there: a mistake in the program
	}
}

// configFlag adds -c, which every command that reads narthex.yaml has.
func configFlag(cmd *cobra.Command) *string {
	path := cmd.Flags().StringP("config", "c", "", "the configuration file, narthex.yaml (required)")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if *path == "" {
			return usageError{errors.New("no configuration file: give -c narthex.yaml")}
		}
		return nil
	}
	return path
}

// newLogger makes the log of a process as its configuration asks. It writes
// to standard error: standard output belongs to the access log.
func newLogger(name string, c config.Log) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Name:       name,
		Level:      hclog.LevelFromString(c.Level),
		JSONFormat: c.Format == "json",
		Output:     os.Stderr,
		TimeFormat: "2006-01-02T15:04:05.000Z07:00",
	})
}

// untilSignal returns a context that ends at the first SIGINT or SIGTERM, and
// a channel that receives at each SIGHUP. A second SIGINT or SIGTERM calls
// again, which is to end things at once; a nil again ends the process.
func untilSignal(parent context.Context, again func()) (ctx context.Context, hangup <-chan os.Signal, stop func()) {
	ctx, cancel := context.WithCancel(parent)
	ends := make(chan os.Signal, 2)
	hups := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGINT, syscall.SIGTERM)
	signal.Notify(hups, syscall.SIGHUP)
	over, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		select {
		case <-ends:
			cancel()
		case <-over:
			return
		}
		select {
		case <-ends:
			if again == nil {
				os.Exit(exitFailure)
			}
			again()
		case <-over:
		}
	}()
	return ctx, hups, func() {
		signal.Stop(ends)
		signal.Stop(hups)
		cancel()
		close(over)
		<-gone
	}
}
