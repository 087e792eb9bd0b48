package suggest

import (
	"fmt"
	"strings"
	"time"

	"github.com/narthex-id/narthex/proxy/policy"
)

// Text returns the rules as a rule file, in the canonical form.
func (s *Sightings) Text(rules []Rule) string {
	if len(rules) == 0 {
		return "# Nothing to suggest.\n\nversion: 1\n"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# Suggested from %s, %s to %s.\n", times(s.Taken, "record"), s.first.UTC().Format(time.RFC3339), s.last.UTC().Format(time.RFC3339))
	b.WriteString("# Each rule allows what was seen. Whether it should be is for you to say.\n\nversion: 1\n\nrules:\n")
	for i := range rules {
		rules[i].write(&b, s.options.Shadow)
	}
	text, err := policy.Format("suggested rules", []byte(b.String()))
	if err != nil {
		return b.String() // Check says the same
	}
	return string(text)
}

func (r *Rule) write(b *strings.Builder, shadow bool) {
	fmt.Fprintf(b, "  # %s\n  - id: %q\n    effect: allow\n", r.About(), r.ID)
	if shadow {
		b.WriteString("    shadow: true\n")
	}
	fmt.Fprintf(b, "    on: [%q]\n    at: %s\n    from: [%s]\n    to: [%q]\n", r.On, r.At, quoted(r.From), r.To)
	if r.Methods != nil {
		fmt.Fprintf(b, "    http: {methods: [%s], paths: [%s]}\n", quoted(r.Methods), quoted(r.Paths))
	}
}

// quoted writes a list. Nothing that comes here needs an escape that YAML does
// not have: SPIFFE IDs, names of listeners, methods, and canonical paths.
func quoted(items []string) string {
	out := make([]string, len(items))
	for i, item := range items {
		out[i] = fmt.Sprintf("%q", item)
	}
	return strings.Join(out, ", ")
}

// About says what a rule would have allowed.
func (r *Rule) About() string {
	text := "seen " + times(r.Count, "time")
	if r.Count == 1 {
		text = "seen once"
	}
	switch {
	case r.Denied == r.Count:
		text += ", refused by the rules of that time"
	case r.Denied > 0:
		text += fmt.Sprintf(", %d of them refused by the rules of that time", r.Denied)
	}
	if r.Example != "" {
		text += fmt.Sprintf("; %s, like %s", times(r.Different, "different request"), r.Example)
	}
	return text
}

func times(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
