package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/policy/suggest"
)

func newPolicyDiff() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Say which decisions change from one policy to another",
		Long: `Prints the rules, limits, revocations and ceilings that differ, and the decisions
that do, those that become allowed first. OLD and NEW are a rule file each, a
pattern of them in quotes, or a directory (its *.yaml).
Without --replay, requests are made up from what differs: each value that such a
rule names, somebody for each wildcard, and what is beside it. That finds what
people mean by a change, and is no proof that nothing else changes. With --replay
the records of access logs are asked instead; - is standard input, and logs that
gzip packed are unpacked.
Rules in shadow decide nothing, and are listed as reported only.
Exit status: 0 when nothing changes, 1 when a decision or a limit does, or may as
a rule with "when" is undecided or not everything was asked, 2 when there is no
answer: the call cannot be made sense of, or a file cannot be read.`,
		Example: `  narthex policy diff old.yaml new.yaml
  narthex policy diff /etc/narthex/policies ./policies --replay access.log --replay access.log.1.gz
  narthex policy diff 'main/*.yaml' 'branch/*.yaml' --format json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return fmt.Errorf("want two policies, OLD and NEW, not %d", len(args))
			}
			return nil
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
		},
	}
	logs := cmd.Flags().StringArray("replay", nil, "an access log whose records are asked; may be given several times")
	format := cmd.Flags().String("format", "text", "text or json")
	completeWords(cmd, "format", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *format != "text" && *format != "json" {
			return usageError{fmt.Errorf("--format %q: want text or json", *format)}
		}
		if err := checkLogs(*logs); err != nil {
			return err
		}
		d, err := comparePolicies(cmd, args[0], args[1], *logs)
		if err == nil && *format == "json" {
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetIndent("", "  ")
			err = enc.Encode(d.json())
		} else if err == nil {
			_, err = fmt.Fprint(cmd.OutOrStdout(), d.text())
		}
		switch {
		case err != nil:
			return unanswered(cmd, err)
		case d.mayChange():
			return exitError{exitFailure}
		}
		return nil
	}
	return cmd
}

// readPolicy reads a rule file, those that a pattern covers, or those of a
// directory. Tests are not run.
func readPolicy(name string) (*policy.Policy, error) {
	if info, err := os.Stat(name); err == nil && info.IsDir() {
		name = filepath.Join(escapePattern(name), "*.yaml")
	}
	files, err := policy.Expand(name)
	if err != nil {
		return nil, err
	}
	return policy.Read(files...)
}

// escapePattern has a pattern match the name itself.
func escapePattern(name string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(name)
}

// policyDiff is what came of a comparison.
type policyDiff struct {
	*policy.Comparison
	rules     policy.Changes
	limits    []policy.LimitChange
	reported  []string // rules that differ and decide nothing
	undecided []string // what differs and was not asked as it would be
	changes   []policy.Change
	changed   int // decisions
	replay    *replay
	notes     []string
}

// mayChange reports whether anything changes, or nobody can say that it does not.
func (d *policyDiff) mayChange() bool {
	return len(d.changes) > 0 || len(d.limits) > 0 || len(d.undecided) > 0 || d.Incomplete
}

func comparePolicies(cmd *cobra.Command, oldName, newName string, logs []string) (*policyDiff, error) {
	was, err := readPolicy(oldName)
	if err != nil {
		return nil, err
	}
	is, err := readPolicy(newName)
	if err != nil {
		return nil, err
	}
	d := &policyDiff{Comparison: policy.NewComparison(was, is)}
	d.rules, d.limits, d.reported = d.Differences(), d.Limits(), d.Reported()
	if len(logs) == 0 {
		d.AskAround()
		d.noteMadeUp()
	} else {
		d.replay = &replay{comparison: d.Comparison, requests: map[string]bool{}, reasons: map[string]int{}}
		if d.replay.stats, err = readLogs(cmd, logs, d.replay.ask); err != nil {
			return nil, err
		}
		if d.Asked == 0 {
			return nil, fmt.Errorf("no record of the access log can be asked: %s", d.replay.why())
		}
		d.noteReplay(was, is)
	}
	d.changes = d.Changes()
	for i := range d.changes {
		d.changed += d.changes[i].Count
	}
	return d, nil
}

func (d *policyDiff) noteMadeUp() {
	if d.Incomplete {
		d.notes = append(d.notes, "not everything was asked that could be made up, as there is too much of it: more may change")
	}
	if d.undecided = d.Conditions; len(d.undecided) > 0 {
		d.notes = append(d.notes, "nothing can be made up that meets a `when`, and what the undecided rules ask for may change more; try --replay")
	}
}

func (d *policyDiff) noteReplay(was, is *policy.Policy) {
	rules := slices.Concat(was.HeaderRules(), is.HeaderRules())
	slices.Sort(rules)
	if rules = slices.Compact(rules); len(rules) > 0 {
		d.notes = append(d.notes, "headers and JWT-SVIDs are not logged, and were taken to be missing, which is what these rules may ask for: "+someWords(rules))
	}
	d.undecided = slices.DeleteFunc(d.differing(), func(name string) bool {
		_, header := slices.BinarySearch(rules, name)
		return !header && !isCertificate(name)
	})
	if was.RevokesCertificates() || is.RevokesCertificates() {
		d.notes = append(d.notes, "who issued a certificate is not logged: revocations of certificates were not looked at")
	}
	if n := d.replay.otherwise; n > 0 {
		d.notes = append(d.notes, fmt.Sprintf("%s otherwise than the log says: it is of other rules than OLD, or something else than rules refused them", oldDecides(n)))
	}
}

// differing returns the names of all that differs, sorted.
func (d *policyDiff) differing() []string {
	names := slices.Concat(d.rules.Added, d.rules.Changed, d.rules.Removed)
	slices.Sort(names)
	return names
}

// isCertificate reports whether a name of what differs is a revocation of one
// certificate.
func isCertificate(name string) bool {
	return strings.HasPrefix(name, "revoked:") && strings.Contains(name, "@")
}

func oldDecides(n int) string { return "OLD decides " + count(n, "record") }

// someWords lists the first few.
func someWords(words []string) string {
	const most = 10
	if len(words) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(words[:most], ", "), len(words)-most)
	}
	return strings.Join(words, ", ")
}

// replay asks the records of access logs.
type replay struct {
	comparison *policy.Comparison
	stats      suggest.Stats
	requests   map[string]bool // listeners that saw requests
	carried    int             // connections to them
	skipped    int             // records that cannot be asked
	reasons    map[string]int
	otherwise  int
}

// maxListed bounds what a log can make grow: reasons, and listeners of HTTP.
const maxListed = 1000

func (r *replay) ask(a *telemetry.Access) {
	switch {
	case a.HTTP != nil && len(r.requests) < maxListed:
		r.requests[a.Listener] = true
	case a.HTTP == nil && r.requests[a.Listener]:
		r.carried++ // its requests are logged before it, and are asked
		return
	}
	q, err := suggest.Request(a)
	if err != nil {
		r.skipped++
		if why := err.Error(); r.reasons[why] > 0 || len(r.reasons) < maxListed {
			r.reasons[why]++
		}
		return
	}
	if was, _ := r.comparison.Ask(q); was.Allow != (a.Decision == "allow") {
		r.otherwise++
	}
}

// why says why records were not asked, the most frequent reason first.
func (r *replay) why() string {
	reasons := slices.SortedFunc(maps.Keys(r.reasons), func(a, b string) int {
		return cmp.Or(cmp.Compare(r.reasons[b], r.reasons[a]), strings.Compare(a, b))
	})
	for i, why := range reasons {
		reasons[i] = fmt.Sprintf("%d %s", r.reasons[why], why)
	}
	const most = 5
	if len(reasons) > most {
		reasons = append(reasons[:most], "and others")
	}
	return strings.Join(reasons, "; ")
}

func (d *policyDiff) text() string {
	var b strings.Builder
	if len(d.rules.Added)+len(d.rules.Changed)+len(d.rules.Removed) == 0 {
		b.WriteString("The policies say the same.\n")
	}
	for _, list := range []struct {
		word  string
		names []string
	}{{"added", d.rules.Added}, {"changed", d.rules.Changed}, {"removed", d.rules.Removed}} {
		for _, name := range list.names {
			fmt.Fprintf(&b, "%-7s  %s%s\n", list.word, name, d.beside(name))
		}
	}
	if len(d.undecided) > 0 {
		fmt.Fprintf(&b, "\nundecided: %s\n", someWords(d.undecided))
	}
	what := "made-up request"
	if d.replay != nil {
		what = "record"
	}
	fmt.Fprintf(&b, "\n%d of %s would be decided otherwise", d.changed, count(d.Asked, what))
	if d.Redecided > 0 {
		fmt.Fprintf(&b, ", %d the same by something else", d.Redecided)
	}
	b.WriteString("\n")
	if r := d.replay; r != nil {
		r.write(&b)
	}
	d.writeChanges(&b)
	for _, note := range d.notes {
		fmt.Fprintf(&b, "\nNote: %s.\n", note)
	}
	return b.String()
}

// beside is what stands beside the name of something that differs: what became
// of a limit, and that a rule is in shadow.
func (d *policyDiff) beside(name string) string {
	if slices.Contains(d.reported, name) {
		return " (reported only)"
	}
	for i := range d.limits {
		l := &d.limits[i]
		was, is := limitText(l.Was), limitText(l.Is)
		switch {
		case name != "limit:"+l.ID:
			continue
		case was == is:
			return ": " + was + ", for others than before"
		}
		return fmt.Sprintf(": %s → %s", was, is)
	}
	return ""
}

func limitText(l *policy.Limit) string {
	if l == nil {
		return "none"
	}
	return l.String()
}

func (r *replay) write(b *strings.Builder) {
	for _, line := range []struct {
		n    int
		what string
	}{
		{r.skipped, "could not be asked: " + r.why()},
		{r.carried, "of connections to listeners of HTTP, whose requests were asked"},
		{r.stats.Other, "more that came to no decision"},
		{r.stats.Strange, "more lines, no access record in JSON"},
	} {
		if line.n > 0 {
			fmt.Fprintf(b, "%7d %s\n", line.n, line.what)
		}
	}
}

func (d *policyDiff) writeChanges(b *strings.Builder) {
	heading := ""
	for i := range d.changes {
		c := &d.changes[i]
		word := "DENIED BY NOW"
		if c.Is.Allow {
			word = "ALLOWED BY NOW"
		}
		if word != heading {
			heading = word
			fmt.Fprintf(b, "\n%s\n", word)
		}
		fmt.Fprintf(b, "  %s -> %s: %d\n", decidedBy(&c.Was), decidedBy(&c.Is), c.Count)
		for j := range c.Examples {
			fmt.Fprintf(b, "      %s\n", d.example(&c.Examples[j]))
		}
	}
}

func decidedBy(d *policy.Decision) string {
	if d.Rule == "" {
		return d.Reason.String()
	}
	return fmt.Sprintf("%s by %q", map[bool]string{true: "allowed", false: "denied"}[d.Allow], d.Rule)
}

// example says what is asked, in a line.
func (d *policyDiff) example(q *policy.Request) string {
	e := d.exampleOf(q)
	var b strings.Builder
	if e.Do != "" {
		b.WriteString(e.Do + " ")
	}
	fmt.Fprintf(&b, "from %s to %s, %s on %q", e.As, cmp.Or(e.To, "nobody"), e.At, e.On)
	for _, part := range []struct{ word, value string }{{"host", e.Host}, {"source", e.SourceIP}, {"server name", e.SNI}, {"certificate", e.Serial}, {"at", e.Time}} {
		if part.value != "" {
			fmt.Fprintf(&b, ", %s %s", part.word, part.value)
		}
	}
	if e.Port > 0 {
		fmt.Fprintf(&b, ", port %d", e.Port)
	}
	for _, name := range slices.Sorted(maps.Keys(e.Headers)) {
		fmt.Fprintf(&b, ", %s: %s", name, strings.Join(e.Headers[name], ", "))
	}
	return printable(b.String())
}

// diffExample is a request in the words of a policy's tests.
type diffExample struct {
	As       string              `json:"as"`
	To       string              `json:"to,omitempty"`
	On       string              `json:"on,omitempty"`
	At       string              `json:"at"`
	SourceIP string              `json:"source_ip,omitempty"`
	Port     uint16              `json:"port,omitempty"`
	SNI      string              `json:"sni,omitempty"`
	Do       string              `json:"do,omitempty"`
	Host     string              `json:"host,omitempty"`
	Headers  map[string][]string `json:"headers,omitempty"`
	Time     string              `json:"time,omitempty"`
	Serial   string              `json:"certificate,omitempty"` // not in tests
}

func (d *policyDiff) exampleOf(q *policy.Request) diffExample {
	e := diffExample{As: "nobody", On: q.Listener, At: q.Direction.String(), Port: q.Port, SNI: q.SNI}
	if d.replay == nil {
		e.Serial = cmp.Or(q.From.Serial, q.To.Serial)
	}
	if q.From.Unauthenticated {
		e.As = policy.Unauthenticated
	} else if !q.From.ID.IsZero() {
		e.As = q.From.ID.String()
	}
	if !q.To.ID.IsZero() {
		e.To = q.To.ID.String()
	}
	if q.Source.Addr().IsValid() {
		e.SourceIP = q.Source.Addr().String()
	}
	if !q.Time.Equal(policy.DefaultTime) {
		e.Time = q.Time.UTC().Format("2006-01-02T15:04:05Z")
	}
	if q.HTTP == nil {
		return e
	}
	e.Do, e.Host = q.HTTP.Method+" "+q.HTTP.Path, q.HTTP.Host
	for _, h := range q.HTTP.Headers {
		if e.Headers == nil {
			e.Headers = map[string][]string{}
		}
		e.Headers[h.Name] = append(e.Headers[h.Name], h.Value)
	}
	return e
}
