package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/proxy/policy/suggest"
)

func newPolicySuggest() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "suggest ACCESS_LOG...",
		Short: "Suggest rules that allow what access logs saw, and no more",
		Long: `Reads access logs in JSON and prints a rule file that allows what passed, also
where a listener only audits: identities are named whole, methods and paths are
those of the requests; segments that look like identifiers, or of which there are
eight or more in one place, become {name}. What a rule is for stands above it. Read it before you
put it in force: the log knows who spoke to whom, not who should.
- is standard input; logs that gzip packed are unpacked. What became of the
records, and what shadow rules would have done, is said on standard error.
Exit status: 0, 1 when a file cannot be read or the logs hold no decision, 2 for a
call that cannot be made sense of.`,
		Example: `  narthex policy suggest access.log > suggested.yaml
  narthex policy suggest -f 'rules/*.yaml' access.log.1.gz access.log    what rules are missing?
  narthex policy suggest --denied --shadow --min 5 access.log            try what was refused as shadow rules
  kubectl logs deploy/orders -c narthex | narthex policy suggest -`,
		Args: cobra.ArbitraryArgs,
	}
	var files policyFiles
	var o suggest.Options
	files.register(cmd)
	f := cmd.Flags()
	f.Lookup("file").Usage = "rules that are there, for what they do not allow; a file, or a pattern of them in quotes; may be given several times"
	f.Lookup("config").Usage = "the same with the rule files that this narthex.yaml names"
	f.BoolVar(&o.Denied, "denied", false, "allow what was denied too, but for what a deny rule refused; give -f, so that nothing is suggested for revoked identities")
	f.BoolVar(&o.Shadow, "shadow", false, "suggest shadow rules, which change nothing and are reported")
	f.IntVar(&o.MinCount, "min", 1, "leave out connections, and requests of one method and pattern, that were seen less often")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError{errors.New("no access log: name some, or give - for standard input")}
		}
		if o.MinCount < 1 {
			return usageError{fmt.Errorf("--min %d: want 1 or more", o.MinCount)}
		}
		if err := checkLogs(args); err != nil {
			return err
		}
		if files.given() {
			var err error
			if o.Policy, err = files.read(); err != nil {
				return err
			}
		}
		return suggestRules(cmd, args, o)
	}
	return cmd
}

func suggestRules(cmd *cobra.Command, logs []string, o suggest.Options) error {
	s := suggest.New(o)
	stats, err := readLogs(cmd, logs, s.Add)
	if err != nil {
		return err
	}
	rules := s.Rules()
	text := s.Text(rules)
	if err := s.Check(text); err != nil {
		return fmt.Errorf("nothing is suggested, by a mistake of this program; report it with the log: %w", err)
	}
	if _, err := io.WriteString(cmd.OutOrStdout(), text); err != nil {
		return err
	}
	_, err = io.WriteString(cmd.ErrOrStderr(), suggestSummary(s, &stats, &o, len(rules)))
	return err
}

// suggestSummary says what became of the records.
func suggestSummary(s *suggest.Sightings, stats *suggest.Stats, o *suggest.Options, rules int) string {
	var b strings.Builder
	first, last := s.Span()
	fmt.Fprintf(&b, "%s of decisions, %s to %s\n", count(stats.Records, "record"), first.UTC().Format(time.RFC3339), last.UTC().Format(time.RFC3339))
	hint := "; --denied takes them too"
	if o.Denied {
		hint = ""
	}
	for _, line := range []struct {
		n    int
		what string
	}{
		{s.Taken, fmt.Sprintf("taken, for %s", count(rules, "rule"))},
		{s.Allowed, "allowed already"},
		{s.Denied, "denied" + hint},
		{s.Barred, "refused by a deny rule, a ceiling or a revocation, which an allow does not change"},
		{s.Rare, fmt.Sprintf("seen less often than %d times", o.MinCount)},
		{s.Idle, "of connections to listeners of HTTP, where requests count"},
		{s.Odd, "that no rule can be made of"},
		{s.Beyond, "LEFT OUT, as there were too many different ones; give fewer logs at a time"},
		{stats.Other, "more that came to no decision"},
		{stats.Strange, "more lines, no access record in JSON"},
	} {
		if line.n > 0 || line.n == s.Taken && strings.HasPrefix(line.what, "taken") {
			fmt.Fprintf(&b, "%7d %s\n", line.n, line.what)
		}
	}
	shadowTable(&b, s)
	return b.String()
}

// shadowTable says what shadow rules would have done, so that one can be put in
// force, or not.
func shadowTable(b *strings.Builder, s *suggest.Sightings) {
	rules, complete := s.ShadowRules()
	if len(rules) == 0 {
		return
	}
	b.WriteString("\nShadow rules, and how many of the records they would have decided otherwise:\n")
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "RULE\tALLOWED\tDENIED\tLAST")
	for _, r := range rules {
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\n", printable(r.ID), r.Allowed, r.Denied, r.Last.UTC().Format(time.RFC3339))
	}
	_ = w.Flush() // to memory
	if !complete {
		b.WriteString("There are more.\n")
	}
}

// printable quotes what a terminal would obey: a log holds what others wrote.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}
