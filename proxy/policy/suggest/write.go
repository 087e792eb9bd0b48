package suggest

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Text returns the rules as a rule file, in the canonical form.
func (s *Sightings) Text(rules []Rule) string {
	var b strings.Builder
	if len(rules) == 0 {
		b.WriteString("# Nothing to suggest.\n\nversion: 1\n")
		return b.String()
	}
	fmt.Fprintf(&b, "# Suggested from %s, %s to %s.\n", times(s.Taken, "record"), s.first.UTC().Format(time.RFC3339), s.last.UTC().Format(time.RFC3339))
	b.WriteString("# Each rule allows what was seen. Whether it should be is for you to say.\n\nversion: 1\n\nrules:\n")
	for i := range rules {
		if i > 0 {
			b.WriteByte('\n')
		}
		rules[i].write(&b, s.options.Shadow)
	}
	return b.String()
}

func (r *Rule) write(b *strings.Builder, shadow bool) {
	fmt.Fprintf(b, "  # %s\n  - id: %s\n    effect: allow\n", r.About(), scalar(r.ID))
	if shadow {
		b.WriteString("    shadow: true\n")
	}
	writeList(b, 4, "on", []string{r.On})
	fmt.Fprintf(b, "    at: %s\n", r.At)
	writeList(b, 4, "from", r.From)
	writeList(b, 4, "to", []string{r.To})
	if r.Methods == nil {
		return
	}
	line := "{methods: " + flow(r.Methods) + ", paths: " + flow(r.Paths) + "}"
	if fits(4, "http", line) {
		fmt.Fprintf(b, "    http: %s\n", line)
		return
	}
	b.WriteString("    http:\n")
	writeList(b, 6, "methods", r.Methods)
	writeList(b, 6, "paths", r.Paths)
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

// lineWidth is how many characters a line of a rule file has at most, if it
// can be broken.
const lineWidth = 100

func fits(indent int, key, value string) bool {
	return indent+len(key)+2+utf8.RuneCountInString(value) <= lineWidth
}

// writeList writes a key with a list, in brackets where there is room.
func writeList(b *strings.Builder, indent int, key string, items []string) {
	lead := strings.Repeat(" ", indent)
	if line := flow(items); fits(indent, key, line) {
		fmt.Fprintf(b, "%s%s: %s\n", lead, key, line)
		return
	}
	fmt.Fprintf(b, "%s%s:\n", lead, key)
	for _, item := range items {
		fmt.Fprintf(b, "%s  - %s\n", lead, scalar(item))
	}
}

func flow(items []string) string {
	out := make([]string, len(items))
	for i, item := range items {
		out[i] = scalar(item)
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// words are plain text to YAML 1.2 and something else to YAML 1.1.
var words = []string{"y", "n", "yes", "no", "on", "off", "true", "false", "null"}

// scalar writes text as it is where every YAML reader takes it for text, and
// else in quotes. Nothing that comes here needs an escape: SPIFFE IDs, names of
// listeners, methods, and paths in their canonical form.
func scalar(s string) string {
	first := s[0] | 0x20
	plain := first >= 'a' && first <= 'z' && !slices.Contains(words, strings.ToLower(s)) &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./") == ""
	if plain {
		return s
	}
	return `"` + s + `"`
}
