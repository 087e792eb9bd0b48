package devserver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

// Bounds of an entry file. The YAML library parses by recursion, and a stack
// that overflows cannot be recovered: columns bound how deep blocks nest, open
// brackets how deep lists in brackets do.
const (
	maxFile     = 4 << 20 // bytes
	maxColumns  = 4096
	maxBrackets = 1000
)

// File is what `narthex dev-server -f` reads:
//
//	trust_domain: example.org
//	listen: 127.0.0.1:8081
//	svid_ttl: 5m
//	agent_ttl: 1h
//	entries:
//	  - spiffe_id: spiffe://example.org/orders
//	    selectors: ["unix:uid:1000"]
//	    ttl: 60s
//	    hint: internal
//	    dns_names: [orders.internal]
//
// Only trust_domain, and spiffe_id and selectors of each entry, must be there.
type File struct {
	TrustDomain Text        `yaml:"trust_domain"`
	Listen      Text        `yaml:"listen"`
	SVIDTTL     Text        `yaml:"svid_ttl"`
	AgentTTL    Text        `yaml:"agent_ttl"`
	Entries     []FileEntry `yaml:"entries"`
}

// FileEntry is one entry of a File.
type FileEntry struct {
	SPIFFEID  Text   `yaml:"spiffe_id"`
	Selectors []Text `yaml:"selectors"`
	TTL       Text   `yaml:"ttl"`
	Hint      Text   `yaml:"hint"`
	DNSNames  []Text `yaml:"dns_names"`
}

// Text is a string that knows where in the file it stands. Line and Column
// begin at 1; a Text that is not in the file has neither.
type Text struct {
	Value        string
	Line, Column int
}

// UnmarshalYAML takes strings only: 1000 or true, unquoted, would read back
// as something else than what was typed.
func (t *Text) UnmarshalYAML(node ast.Node) error {
	s, ok := node.(*ast.StringNode)
	if !ok {
		return at(node.GetToken(), "want a string here, in quotes if it looks like something else")
	}
	t.Value = s.Value
	if p := s.GetToken().Position; p != nil {
		t.Line, t.Column = p.Line, p.Column
	}
	return nil
}

// fileError is an error at a place in a file.
type fileError struct {
	line, column int
	err          error
}

func (e *fileError) Error() string { return fmt.Sprintf("%d:%d: %v", e.line, e.column, e.err) }
func (e *fileError) Unwrap() error { return e.err }

func at(tok *token.Token, format string, args ...any) error {
	e := &fileError{line: 1, column: 1, err: fmt.Errorf(format, args...)}
	if tok != nil && tok.Position != nil {
		e.line, e.column = tok.Position.Line, tok.Position.Column
	}
	return e
}

func (t Text) wrong(key string, err error) error {
	return &fileError{line: max(t.Line, 1), column: max(t.Column, 1), err: fmt.Errorf("%s: %w", key, err)}
}

// or is t, or where t is not in the file, other.
func (t Text) or(other Text) Text {
	if t.Line == 0 {
		return other
	}
	return t
}

// LoadFile reads a File and returns the Config it asks for. Unknown keys,
// wrong types and values that cannot be meant are errors of the form
// file:line:column: what is wrong.
func LoadFile(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return Config{}, fmt.Errorf("read entry file: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return Config{}, fmt.Errorf("read entry file: %w", err)
	}
	if len(data) > maxFile {
		return Config{}, fmt.Errorf("%s: larger than %d bytes", path, maxFile)
	}
	cfg, err := parseFile(data)
	if err != nil {
		return Config{}, fmt.Errorf("%s:%w", path, err)
	}
	return cfg, nil
}

// parseFile returns errors that begin with line:column.
func parseFile(data []byte) (Config, error) {
	if err := checkShape(data); err != nil {
		return Config{}, err
	}
	var file File
	if err := file.decode(data); err != nil {
		return Config{}, placed(err)
	}
	return file.config()
}

// checkShape refuses what no person writes and a recursive parser drowns in.
// Brackets within strings count too, which is harmless: they come in pairs, or
// are few.
func checkShape(data []byte) error {
	open, line := 0, 0
	for text := range bytes.Lines(data) {
		line++
		if len(text) > maxColumns {
			return &fileError{line, maxColumns, fmt.Errorf("the line is longer than %d bytes", maxColumns)}
		}
		for i, b := range text {
			switch b {
			case '[', '{':
				open++
			case ']', '}':
				open--
			}
			if open > maxBrackets {
				return &fileError{line, i + 1, fmt.Errorf("more than %d brackets are open", maxBrackets)}
			}
		}
	}
	return nil
}

// decode fills f from the one document in data.
func (f *File) decode(data []byte) (err error) {
	// On some malformed input, such as a tag before an empty list, the YAML
	// library dereferences nil; to a person that is one more syntax error.
	defer func() {
		if r := recover(); r != nil {
			err = at(nil, "the file is not YAML that makes sense here (%v)", r)
		}
	}()
	tree, err := parser.ParseBytes(data, 0)
	if err != nil {
		return err
	}
	if len(tree.Docs) > 1 {
		return at(tree.Docs[1].Start, "a second document begins here; the file must hold one")
	}
	if len(tree.Docs) == 0 || tree.Docs[0].Body == nil {
		return at(nil, "the file is empty; it needs at least trust_domain")
	}
	return yaml.NodeToValue(tree.Docs[0].Body, f, yaml.DisallowUnknownField())
}

// placed gives an error of the YAML library the form of ours.
func placed(err error) error {
	if _, ok := errors.AsType[*fileError](err); ok {
		return err
	}
	if unknown, ok := errors.AsType[*yaml.UnknownFieldError](err); ok {
		return at(unknown.Token, "%s; known keys are trust_domain, listen, svid_ttl, agent_ttl and entries, and in an entry spiffe_id, selectors, ttl, hint and dns_names", unknown.Message)
	}
	if wrong, ok := errors.AsType[*yaml.UnexpectedNodeTypeError](err); ok {
		return at(wrong.Token, "want %s here, not %s", nodeWords(wrong.Expected), nodeWords(wrong.Actual))
	}
	if y, ok := errors.AsType[yaml.Error](err); ok {
		return at(y.GetToken(), "not YAML: %s", y.GetMessage())
	}
	return at(nil, "%w", err)
}

// nodeWords says what a node is, for a person.
func nodeWords(t ast.NodeType) string {
	switch t {
	case ast.SequenceType:
		return "a list (each element after a dash)"
	case ast.MappingType, ast.MappingValueType:
		return "a block of keys"
	case ast.StringType, ast.LiteralType:
		return "text"
	case ast.IntegerType, ast.FloatType, ast.InfinityType, ast.NanType:
		return "a number"
	case ast.BoolType:
		return "true or false"
	case ast.NullType:
		return "nothing"
	}
	return t.YAMLName()
}

func (f *File) config() (Config, error) {
	var cfg Config
	var err error
	if f.TrustDomain.Value == "" {
		return Config{}, f.TrustDomain.wrong("trust_domain", errors.New("is missing; name one, such as example.org"))
	}
	if cfg.TrustDomain, err = spiffeid.TrustDomainFromString(f.TrustDomain.Value); err != nil {
		return Config{}, f.TrustDomain.wrong("trust_domain", fmt.Errorf("%q is not the name of a trust domain, such as example.org: %w", clip(f.TrustDomain.Value), err))
	}
	if cfg.Listen = f.Listen.Value; cfg.Listen != "" {
		if _, err := loopback(cfg.Listen); err != nil {
			return Config{}, f.Listen.wrong("listen", err)
		}
	}
	if cfg.SVIDTTL, err = f.SVIDTTL.duration("svid_ttl"); err != nil {
		return Config{}, err
	}
	if cfg.AgentTTL, err = f.AgentTTL.duration("agent_ttl"); err != nil {
		return Config{}, err
	}
	ids := make(map[string]Text)
	for i := range f.Entries {
		e, err := f.Entries[i].entry(cfg.TrustDomain, i)
		if err != nil {
			return Config{}, err
		}
		id, here := e.madeID(), f.Entries[i].SPIFFEID
		if first, twice := ids[id]; twice {
			return Config{}, here.wrong("spiffe_id", fmt.Errorf("the entry on line %d has the same SPIFFE ID and selectors", first.Line))
		}
		ids[id] = here
		cfg.Entries = append(cfg.Entries, e)
	}
	return cfg, nil
}

// duration is zero where the key is not in the file.
func (t Text) duration(key string) (time.Duration, error) {
	if t.Line == 0 {
		return 0, nil
	}
	d, err := time.ParseDuration(t.Value)
	if err != nil {
		return 0, t.wrong(key, fmt.Errorf("%q is not a duration, such as 60s or 1h30m", t.Value))
	}
	if err := checkTTL(d); err != nil {
		return 0, t.wrong(key, err)
	}
	return d, nil
}

// entry is the i-th entry of the file, from 0.
func (f *FileEntry) entry(td spiffeid.TrustDomain, i int) (Entry, error) {
	e := Entry{Hint: f.Hint.Value}
	var err error
	if f.SPIFFEID.Value == "" {
		where := f.SPIFFEID
		for _, t := range f.Selectors {
			where = where.or(t)
		}
		return e, where.wrong(fmt.Sprintf("entries[%d].spiffe_id", i), errors.New("is missing; every entry needs one"))
	}
	if e.SPIFFEID, err = spiffeid.FromString(f.SPIFFEID.Value); err != nil {
		err = fmt.Errorf("%q is not a SPIFFE ID, such as spiffe://%s/web: %w", clip(f.SPIFFEID.Value), td.Name(), err)
	} else {
		err = checkWorkloadID(td, e.SPIFFEID)
	}
	if err != nil {
		return e, f.SPIFFEID.wrong("spiffe_id", err)
	}
	for _, t := range f.Selectors {
		kind, value, _ := strings.Cut(t.Value, ":")
		s := attestor.Selector{Type: kind, Value: value}
		if err := checkSelector(s); err != nil {
			return e, t.or(f.SPIFFEID).wrong("selectors", err)
		}
		e.Selectors = append(e.Selectors, s)
	}
	if e.TTL, err = f.TTL.duration("ttl"); err != nil {
		return e, err
	}
	for _, t := range f.DNSNames {
		if err := checkDNSName(t.Value); err != nil {
			return e, t.or(f.SPIFFEID).wrong("dns_names", err)
		}
		e.DNSNames = append(e.DNSNames, t.Value)
	}
	if err := e.check(td); err != nil {
		return e, f.SPIFFEID.wrong("entry "+f.SPIFFEID.Value, err)
	}
	return e, nil
}

// clip shortens what a file can make as long as it likes.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
