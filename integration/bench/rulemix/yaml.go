package rulemix

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// WriteYAML writes the policy as Narthex reads it.
func (m *Mix) WriteYAML(to io.Writer) error {
	w := bufio.NewWriter(to)
	fmt.Fprintf(w, "version: 1\ntrust_domains:\n  %s: {ids: [%s]}\ngroups:\n", m.Ceiling.Domain, m.Ceiling.Path)
	for i := range m.Groups {
		fmt.Fprintf(w, "  %s:\n", m.Groups[i].Name)
		for _, id := range m.Groups[i].IDs {
			fmt.Fprintf(w, "    - %s\n", id)
		}
	}
	fmt.Fprintf(w, "revoked:\n")
	for _, id := range m.Revoked {
		fmt.Fprintf(w, "  - %s\n", id)
	}
	fmt.Fprintf(w, "rules:\n")
	for i := range m.Rules {
		m.Rules[i].writeYAML(w)
	}
	return w.Flush()
}

func (r *Rule) writeYAML(w io.Writer) {
	effect := "deny"
	if r.Allow {
		effect = "allow"
	}
	fmt.Fprintf(w, "  - id: %s\n    effect: %s\n", r.ID, effect)
	if r.On != "" {
		fmt.Fprintf(w, "    on: [%s]\n", r.On)
	}
	if r.At != "" {
		fmt.Fprintf(w, "    at: %s\n", r.At)
	}
	fmt.Fprintf(w, "    from: [%s]\n", r.From)
	if r.To != "" {
		fmt.Fprintf(w, "    to: [%s]\n", r.To)
	}
	if !r.Conditions() {
		return
	}
	fmt.Fprintf(w, "    http:\n      methods: [%s]\n      paths: [%s]\n", strings.Join(r.Methods, ", "), quoted(r.Paths))
	if r.Hosts != nil {
		fmt.Fprintf(w, "      hosts: [%s]\n", quoted(r.Hosts))
	}
	if r.Header != "" {
		fmt.Fprintf(w, "      headers: {%s: [%s]}\n", r.Header, strings.Join(r.Values, ", "))
	}
}

func quoted(list []string) string { return `"` + strings.Join(list, `", "`) + `"` }
