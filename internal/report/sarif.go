package report

import (
	"io"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
)

const (
	sarifSchema = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
	homepage    = "https://github.com/narthex-id/narthex"

	// sourceRoot is what relative names start from; consumers know the name
	// for the top of the repository (SARIF 2.1.0 §3.14.14).
	sourceRoot = "%SRCROOT%"
)

// What of SARIF 2.1.0 is written, by the names it has there.
type (
	sarifLog struct {
		Schema  string     `json:"$schema"`
		Version string     `json:"version"`
		Runs    []sarifRun `json:"runs"`
	}
	sarifRun struct {
		Tool       sarifTool     `json:"tool"`
		ColumnKind string        `json:"columnKind"`
		Results    []sarifResult `json:"results"`
	}
	sarifTool struct {
		Driver sarifDriver `json:"driver"`
	}
	sarifDriver struct {
		Name           string      `json:"name"`
		Version        string      `json:"version,omitempty"`
		InformationURI string      `json:"informationUri"`
		Rules          []sarifRule `json:"rules"`
	}
	sarifRule struct {
		ID               string       `json:"id"`
		ShortDescription sarifMessage `json:"shortDescription"`
	}
	sarifResult struct {
		RuleID           string          `json:"ruleId"`
		RuleIndex        int             `json:"ruleIndex"`
		Level            string          `json:"level"`
		Message          sarifMessage    `json:"message"`
		Locations        []sarifLocation `json:"locations"`
		RelatedLocations []sarifLocation `json:"relatedLocations,omitempty"`
	}
	sarifMessage struct {
		Text string `json:"text"`
	}
	sarifLocation struct {
		ID               int            `json:"id,omitempty"`
		PhysicalLocation *sarifPhysical `json:"physicalLocation,omitempty"`
		LogicalLocations []sarifLogical `json:"logicalLocations,omitempty"`
		Message          *sarifMessage  `json:"message,omitempty"`
	}
	sarifPhysical struct {
		ArtifactLocation sarifArtifact `json:"artifactLocation"`
		Region           sarifRegion   `json:"region"`
	}
	sarifArtifact struct {
		URI       string `json:"uri"`
		URIBaseID string `json:"uriBaseId,omitempty"`
	}
	sarifRegion struct {
		StartLine   int `json:"startLine"`
		StartColumn int `json:"startColumn,omitempty"`
	}
	sarifLogical struct {
		FullyQualifiedName string `json:"fullyQualifiedName"`
	}
)

// sarif writes SARIF 2.1.0, as code scanning takes it.
func (f *Findings) sarif(w io.Writer) error {
	rules := slices.Clone(f.Rules)
	results := make([]sarifResult, len(f.List))
	for i := range f.List {
		one := &f.List[i]
		rule := slices.IndexFunc(rules, func(r Rule) bool { return r.ID == one.Rule })
		if rule < 0 {
			rule = len(rules)
			rules = append(rules, Rule{ID: one.Rule, Text: one.Rule})
		}
		results[i] = f.result(one, rule)
	}
	run := sarifRun{ColumnKind: "unicodeCodePoints", Results: results}
	run.Tool.Driver = sarifDriver{Name: "narthex", Version: f.Version, InformationURI: homepage, Rules: make([]sarifRule, len(rules))}
	for i, r := range rules {
		run.Tool.Driver.Rules[i] = sarifRule{ID: r.ID, ShortDescription: sarifText(r.Text)}
	}
	return writeJSON(w, sarifLog{Schema: sarifSchema, Version: "2.1.0", Runs: []sarifRun{run}})
}

func (f *Findings) result(one *Finding, rule int) sarifResult {
	r := sarifResult{
		RuleID: one.Rule, RuleIndex: rule, Level: sarifLevel(one.Level), Message: sarifText(one.message()),
		Locations: []sarifLocation{}, // none is an empty array: the key must be there for code scanning
	}
	at := sarifLocation{PhysicalLocation: f.physical(one.File, one.Line, one.Column)}
	if one.Path != "" {
		at.LogicalLocations = []sarifLogical{{printable(one.Path)}}
	}
	if at.PhysicalLocation != nil || at.LogicalLocations != nil {
		r.Locations = append(r.Locations, at)
	}
	for i, p := range one.Related {
		text := sarifText(p.Text)
		// The id keeps two alike apart: the array is a set.
		r.RelatedLocations = append(r.RelatedLocations, sarifLocation{ID: i + 1, PhysicalLocation: f.physical(p.File, p.Line, p.Column), Message: &text})
	}
	return r
}

// physical returns a place in a file; nil where no file is meant. Code
// scanning refuses a place without a line, so the whole file is its first one.
func (f *Findings) physical(file string, line, column int) *sarifPhysical {
	if file == "" {
		return nil
	}
	at := sarifRegion{StartLine: max(line, 1)}
	if line > 0 && column > 0 {
		at.StartColumn = column
	}
	return &sarifPhysical{ArtifactLocation: f.artifact(file), Region: at}
}

// artifact names a file relative to the working directory, which in CI is the
// repository's, and by its full path where it is elsewhere (RFC 8089).
func (f *Findings) artifact(file string) sarifArtifact {
	full := file
	if !filepath.IsAbs(file) && f.Dir != "" {
		full = filepath.Join(f.Dir, file)
	}
	full = filepath.Clean(full)
	if !filepath.IsAbs(full) {
		return sarifArtifact{URI: relativeURI(full), URIBaseID: sourceRoot}
	}
	if f.Dir != "" {
		if inside, err := filepath.Rel(f.Dir, full); err == nil && filepath.IsLocal(inside) {
			return sarifArtifact{URI: relativeURI(inside), URIBaseID: sourceRoot}
		}
	}
	return sarifArtifact{URI: (&url.URL{Scheme: "file", Path: filepath.ToSlash(full)}).String()}
}

// relativeURI escapes a name as a relative reference, whose first segment has
// no colon (RFC 3986 §4.2).
func relativeURI(file string) string {
	escaped := (&url.URL{Path: filepath.ToSlash(file)}).EscapedPath()
	return strings.ReplaceAll(escaped, ":", "%3A")
}

// sarifLevel returns the level by a name that SARIF knows.
func sarifLevel(l Level) string {
	if l == Note || l == Warning {
		return string(l)
	}
	return string(Error)
}

// sarifText keeps what stands in a file from being read as a link, which in a
// message is [text](where) (SARIF 2.1.0 §3.11.6).
func sarifText(s string) sarifMessage {
	return sarifMessage{strings.ReplaceAll(printable(s), "](", "] (")}
}
