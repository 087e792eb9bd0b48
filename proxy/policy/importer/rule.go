package importer

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// rule is one rule of the file that is written.
type rule struct {
	source place  // of what it comes from
	object string // for the comment
	path   string

	id      string
	allow   bool
	shadow  bool
	at      string
	on      []string
	from    []string
	to      []string
	methods []string
	hosts   []string
	paths   []string
	headers []headerPresence
	inside  []string // source_ip
	outside []string // not_source_ip
	ports   []string
	sni     []string
	when    string
}

// headerPresence asks whether a header is there. Values are compared in CEL:
// lists of values mean something else here than in Envoy.
type headerPresence struct {
	name   string
	absent bool
}

const unauthenticated = "unauthenticated"

// text writes the file.
func (d *draft) text(product string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "# Imported from %s.\n", product)
	for _, note := range d.notes {
		b.WriteString("#\n")
		comment(&b, "", note)
	}
	if len(d.refusals) > 0 {
		b.WriteString("#\n")
		comment(&b, "", "Not imported:")
		for i := range d.refusals {
			fmt.Fprintf(&b, "#   %s\n", clipLine(d.refusals[i].String()))
		}
	}
	b.WriteString("version: 1\n")
	if len(d.groups) > 0 {
		b.WriteString("groups:\n")
		for _, g := range d.groups {
			fmt.Fprintf(&b, "  %s: %s\n", g.name, flow(g.patterns))
		}
	}
	if len(d.rules) > 0 {
		b.WriteString("rules:\n")
	}
	for i := range d.rules {
		d.rules[i].write(&b)
	}
	return []byte(b.String())
}

func (r *rule) write(b *strings.Builder) {
	source := r.object
	if r.source.file != "" {
		source = fmt.Sprintf("%s:%d: %s", r.source.file, r.source.line, r.object)
	}
	if r.path != "" {
		source += ", " + r.path
	}
	id := r.id
	if !plainID(id) {
		id = quote(id)
	}
	fmt.Fprintf(b, "  # %s\n  - id: %s\n", clipLine(source), id)
	effect := "deny"
	if r.allow {
		effect = "allow"
	}
	line := func(key, value string) { fmt.Fprintf(b, "    %s: %s\n", key, value) }
	list := func(key string, values []string) {
		if len(values) > 0 {
			line(key, flow(values))
		}
	}
	line("effect", effect)
	if r.shadow {
		line("shadow", "true")
	}
	list("on", r.on)
	line("at", r.at)
	list("from", r.from)
	list("to", r.to)
	if http := r.http(); http != "" {
		line("http", http)
	}
	list("source_ip", r.inside)
	list("not_source_ip", r.outside)
	list("ports", r.ports)
	list("sni", r.sni)
	if r.when != "" {
		line("when", "'"+strings.ReplaceAll(r.when, "'", "''")+"'")
	}
}

// asksHTTP reports whether the rule asks for a request, in http or in when.
func (r *rule) asksHTTP() bool {
	return r.http() != "" || strings.Contains(r.when, "request.")
}

func (r *rule) http() string {
	var parts []string
	for _, part := range []struct {
		key    string
		values []string
	}{{"methods", r.methods}, {"hosts", r.hosts}, {"paths", r.paths}} {
		if len(part.values) > 0 {
			parts = append(parts, part.key+": "+flow(part.values))
		}
	}
	if len(r.headers) > 0 {
		var headers []string
		for _, h := range r.headers {
			presence := "present"
			if h.absent {
				presence = "absent"
			}
			headers = append(headers, scalar(h.name)+": "+presence)
		}
		parts = append(parts, "headers: {"+strings.Join(headers, ", ")+"}")
	}
	if len(parts) == 0 {
		return ""
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

// flow writes a list in one line.
func flow(values []string) string {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = scalar(v)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// plainID reports whether an id needs no quotes: with a slash in it, no YAML
// reader takes it for anything but text.
func plainID(s string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyz"
	return strings.Contains(s, "/") && strings.ContainsAny(s[:1], letters) && strings.Trim(s, letters+"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789./_-") == ""
}

// plain reports whether a text of a list needs no quotes.
func plain(s string) bool {
	if s == unauthenticated {
		return true
	}
	upper, digits := s != "", s != "" && s[0] != '0'
	for i := range len(s) {
		upper = upper && s[i] >= 'A' && s[i] <= 'Z'
		digits = digits && s[i] >= '0' && s[i] <= '9'
	}
	return digits || upper && len(s) > 2 && s != "NULL" && s != "TRUE" && s != "FALSE" && s != "YES" && s != "OFF"
}

// scalar writes a text for YAML.
func scalar(s string) string {
	if plain(s) {
		return s
	}
	return quote(s)
}

// quote writes a text in double quotes, in the subset of escapes that YAML and
// CEL share.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			b.WriteByte('\\')
			b.WriteRune(c)
		case c < ' ' || c >= 0x7f && c < 0xa0 || c == 0xfeff || c == 0x2028 || c == 0x2029:
			fmt.Fprintf(&b, "\\u%04x", c)
		default:
			b.WriteRune(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// celList writes texts as a list of CEL.
func celList(values []string) string {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = quote(v)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// comment writes text as comment lines of at most 80 columns.
func comment(b *strings.Builder, indent, text string) {
	line := indent + "#"
	for word := range strings.FieldsSeq(text) {
		if len(line)+1+len(word) > 80 && line != indent+"#" {
			b.WriteString(line + "\n")
			line = indent + "#"
		}
		line += " " + word
	}
	b.WriteString(line + "\n")
}

// clipLine bounds a comment to one line, whatever file names hold.
func clipLine(s string) string {
	const most = 1000
	s = strings.ToValidUTF8(s[:min(len(s), most)], "\ufffd")
	return strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 || c == 0x2028 || c == 0x2029 || c == 0xfeff {
			return '\ufffd'
		}
		return c
	}, s)
}

// shortID bounds an id to what a rule may have. The names of Kubernetes are
// longer than that in the worst case.
func shortID(id string) string {
	const most = 128
	if len(id) <= most {
		return id
	}
	sum := sha256.Sum256([]byte(id))
	return id[:most-17] + "-" + hex.EncodeToString(sum[:8])
}
