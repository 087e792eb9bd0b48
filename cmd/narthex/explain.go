package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/narthex-id/narthex/agent/endpoint"
)

func newExplain() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain --pid N [-c narthex.yaml]",
		Short: "Say what a running agent knows of a process, and why it gets what it gets",
		Long: `Has a running agent attest a process as if it had called the Workload API, and
prints the selectors that each attestor found, the registration entries that
match, and of those that come nearest which selectors the process lacks. It asks at
the admin socket (agent.admin), as root or as the agent's own user.
Exit status: 0 when an entry matches, 1 when none does or there is no answer, 2 for
a call that cannot be made sense of.`,
		Example: `  narthex explain --pid 4711
  narthex explain --pid "$(pgrep -o nginx)" -c /etc/narthex/narthex.yaml
  narthex explain --pid 4711 --format json | jq .nearest`,
	}
	where := adminFlags(cmd)
	pid := cmd.Flags().Int64("pid", 0, "the process, in the agent's PID namespace (required)")
	format := cmd.Flags().String("format", "text", "text or json")
	completeWords(cmd, "format", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case *format != "text" && *format != "json":
			return usageError{fmt.Errorf("--format %q: want text or json", *format)}
		case *pid == 0:
			return usageError{errors.New("no process: give --pid N")}
		case *pid < 0 || *pid > math.MaxInt32:
			return usageError{fmt.Errorf("--pid %d: want the number of a process", *pid)}
		}
		var e *endpoint.Explanation
		err := where.ask(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) (err error) {
			e, err = endpoint.Explain(ctx, conn, int32(*pid))
			return err
		})
		if err != nil {
			return err
		}
		if err := printExplanation(cmd.OutOrStdout(), e, *format); err != nil {
			return err
		}
		if e.MatchedCount == 0 {
			return exitError{exitFailure}
		}
		return nil
	}
	return cmd
}

func printExplanation(w io.Writer, e *endpoint.Explanation, format string) error {
	if format == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(e)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(t, "process %d\tuid %d\tgid %d\n", e.PID, e.UID, e.GID)
	for _, a := range e.Attestors {
		printFinding(t, &a)
	}
	if e.Problem != "" {
		fmt.Fprintf(t, "not attested: %s\n", printable(e.Problem))
	}
	printServerState(t, &e.Server)
	switch {
	case e.MatchedCount > 0:
		fmt.Fprintf(t, "\nentries that match: %d\n", e.MatchedCount)
	case e.Server.Synced:
		fmt.Fprintln(t, "\nno entry matches")
	default:
		fmt.Fprintln(t, "\nno entry matches: the agent has not synced with the server yet")
	}
	for i := range e.Matched {
		printMatched(t, &e.Matched[i])
	}
	if more := e.MatchedCount - len(e.Matched); more > 0 {
		fmt.Fprintf(t, "  and %d more\n", more)
	}
	if len(e.Nearest) > 0 && e.MatchedCount == 0 {
		fmt.Fprintln(t, "\nentries that come nearest")
		for i := range e.Nearest {
			printNear(t, &e.Nearest[i], e.Attestors)
		}
	}
	return t.Flush()
}

func printFinding(w io.Writer, f *endpoint.AttestorFinding) {
	took := time.Duration(f.Seconds * float64(time.Second)).Round(10 * time.Microsecond)
	if f.Problem != "" {
		fmt.Fprintf(w, "\nattestor %s failed after %s: %s\n", f.Type, took, printable(f.Problem))
		return
	}
	fmt.Fprintf(w, "\nattestor %s found %d selectors in %s\n", f.Type, len(f.Selectors), took)
	for _, s := range f.Selectors {
		fmt.Fprintf(w, "  %s\n", printable(s))
	}
}

func printServerState(w io.Writer, s *endpoint.ServerState) {
	last := "never"
	if !s.LastSync.IsZero() {
		last = time.Since(s.LastSync).Round(time.Second).String() + " ago"
	}
	fmt.Fprintf(w, "\nserver %s\tlast sync %s\t%d entries for this agent\n", s.Address, last, s.Entries)
	if s.Problem != "" {
		fmt.Fprintf(w, "  problem\t%s\n", printable(s.Problem))
	}
}

func printMatched(w io.Writer, m *endpoint.MatchedEntry) {
	state := "no X.509-SVID is signed"
	if !m.ExpiresAt.IsZero() {
		state = "X.509-SVID expires in " + until(m.ExpiresAt)
	}
	fmt.Fprintf(w, "  %s\t%s\tentry %s\t%s\n", m.SPIFFEID, cmp.Or(printable(m.Hint), "-"), printable(m.ID), state)
	if m.Problem != "" {
		fmt.Fprintf(w, "    problem\t%s\n", printable(m.Problem))
	}
}

// printNear says what an entry asks for that was not found, and of selectors no
// attestor could have found, that.
func printNear(w io.Writer, n *endpoint.NearEntry, attestors []endpoint.AttestorFinding) {
	fmt.Fprintf(w, "  %s\tentry %s\t%d of %d selectors\n", n.SPIFFEID, printable(n.ID), len(n.Selectors)-len(n.Missing), len(n.Selectors))
	for _, s := range n.Missing {
		kind, _, _ := strings.Cut(s, ":")
		i := slices.IndexFunc(attestors, func(a endpoint.AttestorFinding) bool { return a.Type == kind })
		why := ""
		switch {
		case i < 0:
			why = fmt.Sprintf(" (this agent has no attestor %s: see agent.workload_attestors)", printable(kind))
		case attestors[i].Problem != "":
			why = fmt.Sprintf(" (the attestor %s failed)", printable(kind))
		}
		fmt.Fprintf(w, "    misses %s%s\n", printable(s), why)
	}
}
