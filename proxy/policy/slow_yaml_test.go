package policy

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The writer and the reader of slow policies.

// What YAML is written from.
type (
	yamlText string // is quoted where it must be, and sometimes where not
	yamlRaw  string // numbers and truths
	yamlList []any
	yamlPair struct {
		key   string
		value any
	}
	yamlBlock []yamlPair
)

// yamlWriter writes in random order and style.
type yamlWriter struct {
	r       *rand.Rand
	respell bool // also write what means the same in other letters
}

// yaml writes the policy into some files, in random order and style.
func (s *slowPolicy) yaml(r *rand.Rand, files int) []string {
	return (&yamlWriter{r: r}).policy(s, files)
}

func (w *yamlWriter) policy(s *slowPolicy, files int) []string {
	parts := make([]map[string][]any, files)
	for i := range parts {
		parts[i] = map[string][]any{}
	}
	put := func(key string, entry any) {
		part := parts[w.r.IntN(files)]
		part[key] = append(part[key], entry)
	}
	for name, members := range s.groups {
		put("groups", yamlPair{name, texts(members)})
	}
	for name, paths := range s.ceilings {
		put("trust_domains", yamlPair{name, yamlBlock{{"ids", texts(paths)}}})
	}
	for _, pattern := range s.revoked {
		put("revoked", yamlText(pattern))
	}
	for _, c := range s.certs {
		put("revoked", yamlBlock{{"issuer", yamlText(c[0])}, {"serial", yamlText(c[1])}})
	}
	for i := range s.rules {
		put("rules", w.rule(&s.rules[i]))
	}
	for i := range s.limits {
		put("limits", w.limit(&s.limits[i]))
	}
	out := make([]string, files)
	for i, part := range parts {
		blocks := []string{"version: 1\n"}
		for key, entries := range part {
			blocks = append(blocks, w.section(key, entries))
		}
		w.r.Shuffle(len(blocks), func(i, j int) { blocks[i], blocks[j] = blocks[j], blocks[i] })
		out[i] = strings.Join(blocks, "")
	}
	return out
}

func (w *yamlWriter) section(key string, entries []any) string {
	var value any = yamlList(entries)
	if _, ok := entries[0].(yamlPair); ok {
		var block yamlBlock
		for _, entry := range entries {
			block = append(block, entry.(yamlPair))
		}
		value = block
	}
	return key + ":" + w.after(value, "  ", w.r.IntN(8) == 0) + "\n"
}

func texts(items []string) yamlList {
	list := make(yamlList, len(items))
	for i, item := range items {
		list[i] = yamlText(item)
	}
	return list
}

func (w *yamlWriter) rule(rule *slowRule) yamlBlock {
	b := yamlBlock{{"id", yamlText(rule.id)}, {"effect", yamlText(rule.effect)}}
	if rule.shadow || rule.http != nil && w.r.IntN(6) == 0 {
		b = append(b, yamlPair{"shadow", yamlRaw(fmt.Sprint(rule.shadow))})
	}
	if rule.at != "" {
		b = append(b, yamlPair{"at", yamlText(rule.at)})
	}
	if rule.when != "" {
		b = append(b, yamlPair{"when", yamlText(rule.when)})
	}
	b = b.lists([]namedList{
		{"on", rule.on, nil},
		{"from", rule.from, nil},
		{"to", rule.to, nil},
		{"sni", rule.sni, w.anyCase},
		{"source_ip", rule.sourceIP, nil},
		{"not_source_ip", rule.notSourceIP, nil},
	})
	if rule.ports != nil {
		ports := texts(rule.ports)
		for i, port := range rule.ports {
			if !strings.Contains(port, "-") {
				ports[i] = yamlRaw(port)
			}
		}
		b = append(b, yamlPair{"ports", ports})
	}
	if g := rule.grpc; g != nil {
		b = append(b, yamlPair{"grpc", yamlBlock{}.lists([]namedList{{"services", g.services, nil}, {"methods", g.methods, nil}, {"subjects", g.subjects, nil}})})
	}
	if h := rule.http; h != nil {
		block := yamlBlock{}.lists([]namedList{{"methods", h.methods, nil}, {"hosts", h.hosts, w.anyCase}, {"paths", h.paths, w.encode}, {"subjects", h.subjects, nil}})
		if h.headers != nil {
			block = append(block, yamlPair{"headers", w.headers(h.headers)})
		}
		b = append(b, yamlPair{"http", block})
	}
	return b
}

func (w *yamlWriter) headers(headers []slowHeader) yamlBlock {
	var b yamlBlock
	for _, h := range headers {
		value := any(texts(h.values))
		if h.word != "" {
			value = yamlText(h.word)
		}
		b = append(b, yamlPair{w.anyCase(h.name), value})
	}
	return b
}

func (w *yamlWriter) limit(l *slowLimit) yamlBlock {
	b := yamlBlock{{"id", yamlText(l.id)}}.lists([]namedList{{"on", l.on, nil}, {"from", l.from, nil}, {"to", l.to, nil}})
	if l.per != "" {
		b = append(b, yamlPair{"per", yamlText(l.per)})
	}
	if l.rps != "" {
		b = append(b, yamlPair{"rps", yamlRaw(l.rps)})
	}
	if l.burst > 0 {
		b = append(b, yamlPair{"burst", yamlRaw(fmt.Sprint(l.burst))})
	}
	if l.connections > 0 {
		b = append(b, yamlPair{"connections", yamlRaw(fmt.Sprint(l.connections))})
	}
	return b
}

type namedList struct {
	key     string
	items   []string
	respell func(string) string
}

// lists appends those that are there.
func (b yamlBlock) lists(lists []namedList) yamlBlock {
	for _, l := range lists {
		if l.items == nil {
			continue
		}
		list := texts(l.items)
		for i, item := range l.items {
			if l.respell != nil {
				list[i] = yamlText(l.respell(item))
			}
		}
		b = append(b, yamlPair{l.key, list})
	}
	return b
}

// anyCase sometimes writes a name in capitals, where case does not matter.
func (w *yamlWriter) anyCase(s string) string {
	if w.respell && w.r.IntN(6) == 0 {
		return strings.ToUpper(s)
	}
	return s
}

// encode sometimes writes a path in another spelling of the same path.
func (w *yamlWriter) encode(path string) string {
	if !w.respell || w.r.IntN(6) > 0 {
		return path
	}
	path = strings.ReplaceAll(path, "%C3%A9", pick(w.r, []string{"é", "%c3%a9", "%c3%A9"}))
	return strings.NewReplacer("orders", pick(w.r, []string{"%6Frders", "o%72ders", "%6frders"}), "7", "%37").Replace(path)
}

// after is what follows a key and its colon.
func (w *yamlWriter) after(v any, indent string, flow bool) string {
	text, isText := v.(yamlText)
	switch {
	case isText && strings.Contains(string(text), " ") && w.r.IntN(4) == 0:
		return " |-\n" + indent + string(text)
	case flow || isScalar(v):
		return " " + w.flow(v) + w.remark()
	}
	return "\n" + indent + w.lines(v, indent)
}

// remark is a comment, or none.
func (w *yamlWriter) remark() string {
	return pick(w.r, []string{"", "", "", "", "", "", " # so it is"})
}

func isScalar(v any) bool {
	switch v.(type) {
	case yamlText, yamlRaw:
		return true
	}
	return false
}

// lines writes a list or block in lines of its own, the first of which is
// indented already.
func (w *yamlWriter) lines(v any, indent string) string {
	var lines []string
	switch v := v.(type) {
	case yamlList:
		for _, item := range v {
			if isScalar(item) || w.r.IntN(6) == 0 {
				lines = append(lines, "- "+w.flow(item))
			} else {
				lines = append(lines, "- "+w.lines(item, indent+"  "))
			}
		}
	case yamlBlock:
		for _, p := range v {
			lines = append(lines, p.key+":"+w.after(p.value, indent+"  ", w.r.IntN(2) == 0))
		}
	}
	w.shuffle(lines)
	return strings.Join(lines, "\n"+indent)
}

func (w *yamlWriter) shuffle(lines []string) {
	w.r.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
}

// flow writes a value within one line.
func (w *yamlWriter) flow(v any) string {
	var words []string
	switch v := v.(type) {
	case yamlText:
		return w.scalar(string(v))
	case yamlRaw:
		return string(v)
	case yamlList:
		for _, item := range v {
			words = append(words, w.flow(item))
		}
		w.shuffle(words)
		return "[" + strings.Join(words, ", ") + "]"
	case yamlBlock:
		for _, p := range v {
			words = append(words, p.key+": "+w.flow(p.value))
		}
		w.shuffle(words)
	}
	return "{" + strings.Join(words, ", ") + "}"
}

// scalar quotes what would be no text without, and some of the rest.
func (w *yamlWriter) scalar(s string) string {
	plain := s != "" && s[0] >= 'a' && s[0] <= 'z' && !strings.ContainsFunc(s, func(c rune) bool {
		return c <= ' ' || strings.ContainsRune("{}[],&*#?|<>=!%@\"'`", c)
	}) && !slices.Contains([]string{"true", "false", "null", "yes", "no", "on", "off"}, s)
	switch {
	case plain && w.r.IntN(2) == 0:
		return s
	case w.r.IntN(2) == 0:
		return "'" + strings.ReplaceAll(s, "'", "''") + "'"
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// slowRead reads files for the slow evaluator. It checks nothing.
func slowRead(t *testing.T, files ...string) *slowPolicy {
	t.Helper()
	s := &slowPolicy{groups: map[string][]string{}, ceilings: map[string][]string{}}
	for _, text := range files {
		n, problem := readNode("slow.yaml", 0, []byte(text))
		if problem != nil {
			t.Fatalf("%v\n%s", problem, text)
		}
		doc, _ := slowValue(&n).(map[string]any)
		s.take(t, doc)
	}
	return s
}

// slowValue is a node as plain Go: texts, lists and maps.
func slowValue(n *node) any {
	switch n.kind {
	case list:
		items := []any{}
		for i := range n.items {
			items = append(items, slowValue(&n.items[i]))
		}
		return items
	case block:
		m := map[string]any{}
		for i := range n.pairs {
			m[n.pairs[i].key] = slowValue(&n.pairs[i].value)
		}
		return m
	}
	return n.text
}

// take adds what one file says.
func (s *slowPolicy) take(t *testing.T, doc map[string]any) {
	entries := func(key string) (all []map[string]any) {
		items, _ := doc[key].([]any)
		for _, item := range items {
			if entry, ok := item.(map[string]any); ok {
				all = append(all, entry)
			}
		}
		return all
	}
	for _, rule := range entries("rules") {
		s.rules = append(s.rules, slowReadRule(t, rule))
	}
	for _, l := range entries("limits") {
		number := func(key string) int {
			n, _ := strconv.Atoi(slowText(l[key]))
			return n
		}
		s.limits = append(s.limits, slowLimit{
			id: slowText(l["id"]), per: slowText(l["per"]), on: slowList(l["on"]), from: slowList(l["from"]), to: slowList(l["to"]),
			rps: slowText(l["rps"]), burst: number("burst"), connections: number("connections"),
		})
	}
	for _, c := range entries("revoked") {
		issuer, _ := normalHex(slowText(c["issuer"]))
		serial, _ := normalHex(slowText(c["serial"]))
		s.certs = append(s.certs, [2]string{issuer, serial})
	}
	revoked, _ := doc["revoked"].([]any)
	for _, item := range revoked {
		if pattern, ok := item.(string); ok {
			s.revoked = append(s.revoked, pattern)
		}
	}
	groups, _ := doc["groups"].(map[string]any)
	for name, members := range groups {
		s.groups[name] = slowList(members)
	}
	domains, _ := doc["trust_domains"].(map[string]any)
	for name, ceiling := range domains {
		s.ceilings[name] = slowList(ceiling.(map[string]any)["ids"])
	}
}

func slowReadRule(t *testing.T, n map[string]any) slowRule {
	rule := slowRule{
		id: slowText(n["id"]), effect: slowText(n["effect"]), at: slowText(n["at"]), shadow: n["shadow"] == "true",
		on: slowList(n["on"]), from: slowList(n["from"]), to: slowList(n["to"]),
		sourceIP: slowList(n["source_ip"]), notSourceIP: slowList(n["not_source_ip"]),
		ports: slowList(n["ports"]), sni: slowList(n["sni"]), when: slowText(n["when"]),
	}
	if _, known := slowWhens[rule.when]; rule.when != "" && !known {
		t.Fatalf("slowWhens does not say what %s means", rule.when)
	}
	if g, ok := n["grpc"].(map[string]any); ok {
		rule.grpc = &slowGRPC{services: slowList(g["services"]), methods: slowList(g["methods"]), subjects: slowList(g["subjects"])}
	}
	h, ok := n["http"].(map[string]any)
	if !ok {
		return rule
	}
	rule.http = &slowHTTP{methods: slowList(h["methods"]), hosts: slowList(h["hosts"]), paths: slowList(h["paths"]), subjects: slowList(h["subjects"])}
	headers, _ := h["headers"].(map[string]any)
	for name, value := range headers {
		want := slowHeader{name: name, values: slowList(value)}
		if want.values == nil {
			want.word = slowText(value)
		}
		rule.http.headers = append(rule.http.headers, want)
	}
	return rule
}

func slowText(v any) string {
	text, _ := v.(string)
	return text
}

func slowList(v any) []string {
	items, _ := v.([]any)
	var list []string
	for _, item := range items {
		list = append(list, slowText(item))
	}
	return list
}

// TestSlowPoliciesReadBack: the writer says what the policy says, and its other
// spellings mean the same.
func TestSlowPoliciesReadBack(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 5))
		s := worldPolicy(r)
		texts := (&yamlWriter{r: r, respell: true}).policy(s, 1+r.IntN(3))
		again := slowRead(t, texts...)
		if len(again.rules) != len(s.rules) || len(again.limits) != len(s.limits) || len(again.revoked) != len(s.revoked) || len(again.certs) != len(s.certs) || len(again.groups) != len(s.groups) {
			t.Fatalf("seed %d: something is lost\n%s", seed, strings.Join(texts, "\n---\n"))
		}
		for range 60 {
			q := s.likelyConnection(r)
			if r.IntN(4) > 0 {
				q.HTTP = s.likelyHTTP(r, &q, s.rules)
			}
			if a, b := s.answer(&q), again.answer(&q); !reflect.DeepEqual(a, b) {
				t.Fatalf("seed %d: %+v: %+v, read back %+v\n%s", seed, q, a, b, strings.Join(texts, "\n---\n"))
			}
			if a, b := s.limitsOf(&q), again.limitsOf(&q); !reflect.DeepEqual(a, b) {
				t.Fatalf("seed %d: %+v: limits %+v, read back %+v", seed, q, a, b)
			}
		}
	}
}
