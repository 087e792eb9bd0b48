package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown/cache"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// opa is a prepared query over the policy in opa.rego and the rules as its
// data. The store keeps them as the evaluator reads them, globs are compiled
// once (both as the server of OPA does), and requests are parsed before.
type opa struct {
	query    rego.PreparedEvalQuery
	requests []rego.EvalOption
	globs    rego.EvalOption
}

//go:embed opa.rego
var opaPolicy string

// opaData is what opa.rego looks at.
type opaData struct {
	Allow    *opaIndex                  `json:"allow"`
	Deny     *opaIndex                  `json:"deny"`
	Groups   map[string]map[string]bool `json:"groups"`
	Revoked  map[string]bool            `json:"revoked"`
	Ceilings map[string]string          `json:"ceilings"`
}

type opaIndex struct {
	To      map[string][]opaRule `json:"to"`
	From    map[string][]opaRule `json:"from"`
	Beneath map[string][]opaRule `json:"beneath,omitempty"`
}

type opaRule struct {
	ID   string      `json:"id"`
	On   string      `json:"on"` // empty: whichever; so is at
	At   string      `json:"at"`
	From *opaSubject `json:"from,omitempty"`
	To   *opaSubject `json:"to,omitempty"`
	HTTP *opaHTTP    `json:"http,omitempty"`
}

type opaSubject struct {
	ID    string `json:"id,omitempty"`
	Group string `json:"group,omitempty"`
	Glob  string `json:"glob,omitempty"`
}

type opaHTTP struct {
	Methods   []string `json:"methods"`
	Paths     []string `json:"paths,omitempty"`
	PathGlobs []string `json:"path_globs,omitempty"`
	Host      string   `json:"host,omitempty"`
	Header    string   `json:"header,omitempty"`
	Values    []string `json:"values,omitempty"`
}

func (o *opa) write(m *rulemix.Mix) ([]byte, error) {
	data := opaData{
		Allow: newOPAIndex(), Deny: newOPAIndex(), Groups: map[string]map[string]bool{}, Revoked: map[string]bool{},
		Ceilings: map[string]string{m.Ceiling.Domain: "spiffe://" + m.Ceiling.Domain + m.Ceiling.Path},
	}
	for _, g := range m.Groups {
		data.Groups[g.Name] = map[string]bool{}
		for _, id := range g.IDs {
			data.Groups[g.Name][id] = true
		}
	}
	for _, id := range m.Revoked {
		data.Revoked[id] = true
	}
	for i := range m.Rules {
		index := data.Deny
		if m.Rules[i].Allow {
			index = data.Allow
		}
		index.add(&m.Rules[i])
	}
	return json.Marshal(data)
}

func newOPAIndex() *opaIndex {
	return &opaIndex{map[string][]opaRule{}, map[string][]opaRule{}, map[string][]opaRule{}}
}

// add files a rule. What it is filed under is not asked again.
func (x *opaIndex) add(r *rulemix.Rule) {
	rule := opaRule{ID: r.ID, On: r.On, At: r.At, From: subjectOPA(r.From), To: subjectOPA(r.To), HTTP: httpOPA(r)}
	switch {
	case rule.To != nil && rule.To.ID != "":
		rule.To = nil
		x.To[r.To] = append(x.To[r.To], rule)
	case rule.From.ID != "":
		rule.From = nil
		x.From[r.From] = append(x.From[r.From], rule)
	default:
		before, _, _ := strings.Cut(r.From, "/*")
		x.Beneath[before] = append(x.Beneath[before], rule)
	}
}

func subjectOPA(pattern string) *opaSubject {
	group, isGroup := strings.CutPrefix(pattern, "group:")
	switch {
	case pattern == "":
		return nil
	case isGroup:
		return &opaSubject{Group: group}
	case strings.Contains(pattern, "*"):
		return &opaSubject{Glob: pattern}
	}
	return &opaSubject{ID: pattern}
}

// httpOPA parts paths that are patterns from those that are not.
func httpOPA(r *rulemix.Rule) *opaHTTP {
	if !r.Conditions() {
		return nil
	}
	h := &opaHTTP{Methods: r.Methods, Header: r.Header, Values: r.Values}
	for _, path := range r.Paths {
		if path = strings.ReplaceAll(path, "{id}", "*"); strings.Contains(path, "*") {
			h.PathGlobs = append(h.PathGlobs, path)
		} else {
			h.Paths = append(h.Paths, path)
		}
	}
	if len(r.Hosts) > 0 {
		h.Host = r.Hosts[0] // a rule of the mix has no more
	}
	return h
}

func (o *opa) load(text []byte) error {
	caching, err := cache.ParseCachingConfig(nil)
	if err != nil {
		return err
	}
	o.globs = rego.EvalInterQueryBuiltinValueCache(cache.NewInterQueryValueCache(context.Background(), caching))
	store := inmem.NewFromReaderWithOpts(bytes.NewReader(text), inmem.OptRoundTripOnWrite(false), inmem.OptReturnASTValuesOnRead(true))
	o.query, err = rego.New(rego.Query("data.mesh.allow"), rego.Module("opa.rego", opaPolicy), rego.Store(store)).PrepareForEval(context.Background())
	return err
}

func (o *opa) prepare(requests []rulemix.Request) error {
	for i := range requests {
		q := &requests[i]
		input := map[string]any{"from": q.From, "to": q.To, "listener": q.Listener, "direction": q.Direction()}
		if q.Method != "" {
			headers := map[string]any{}
			for _, h := range q.Headers {
				headers[h.Name] = h.Value
			}
			input["method"], input["host"], input["path"], input["headers"] = q.Method, q.Host, q.Path, headers
		}
		value, err := ast.InterfaceToValue(input)
		if err != nil {
			return err
		}
		o.requests = append(o.requests, rego.EvalParsedInput(value))
	}
	return nil
}

func (o *opa) allows(i int) (bool, error) {
	results, err := o.query.Eval(context.Background(), o.requests[i], o.globs)
	return results.Allowed(), err
}
