package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// Schema returns the JSON Schema of a rule file, for editors. Whatever the
// schema accepts the reader may still refuse, for its words are coarser; what it
// refuses the reader refuses too.
func Schema() ([]byte, error) {
	s := keysIn(topKeys)
	s.Version = "https://json-schema.org/draft/2020-12/schema"
	s.Title = "Rules of Narthex"
	s.Description = "Who may speak to whom, by SPIFFE ID."
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(&s); err != nil {
		return nil, fmt.Errorf("encode schema: %w", err)
	}
	return out.Bytes(), nil
}

// shape is what may stand behind a key, in the words of JSON Schema.
type shape struct {
	Version     string `json:"$schema,omitempty"`
	Title       string `json:"title,omitempty"`
	Description string `json:"description,omitempty"`

	Type  any    `json:"type,omitempty"` // a word or several
	Enum  []any  `json:"enum,omitempty"`
	AnyOf []any  `json:"anyOf,omitempty"`
	Not   any    `json:"not,omitempty"`
	If    any    `json:"if,omitempty"`
	Then  any    `json:"then,omitempty"`
	Items *shape `json:"items,omitempty"`

	Pattern          string  `json:"pattern,omitempty"`
	MaxLength        int     `json:"maxLength,omitempty"` // characters, where the reader counts bytes
	Minimum          int     `json:"minimum,omitempty"`
	ExclusiveMinimum *int    `json:"exclusiveMinimum,omitempty"`
	Maximum          float64 `json:"maximum,omitempty"`
	MinItems         int     `json:"minItems,omitempty"`
	MinProperties    int     `json:"minProperties,omitempty"`

	Properties        properties          `json:"properties,omitempty"`
	PropertyNames     *shape              `json:"propertyNames,omitempty"`
	Others            any                 `json:"additionalProperties,omitempty"` // a shape, or false
	Required          []string            `json:"required,omitempty"`
	DependentRequired map[string][]string `json:"dependentRequired,omitempty"`
	DependentSchemas  map[string]any      `json:"dependentSchemas,omitempty"`

	must bool // a block without the key is an error
}

// properties are keys that come out in their order.
type properties []key

// MarshalJSON returns a block of the keys' shapes, each with what it is about.
func (p properties) MarshalJSON() ([]byte, error) {
	var out bytes.Buffer
	for i := range p {
		s := p[i].is
		s.Description = p[i].about
		text, err := marshalPlainly(&s)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&out, ",%q:%s", p[i].name, text)
	}
	return []byte("{" + strings.TrimPrefix(out.String(), ",") + "}"), nil
}

// marshalPlainly leaves < and > as they are.
func marshalPlainly(v any) ([]byte, error) {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return bytes.TrimSpace(out.Bytes()), err
}

// The patterns of texts. They say what a text looks like, so that an editor
// marks what cannot be; the reader parses.
const (
	segments       = `(/([A-Za-z0-9._-]+|\*))*/([A-Za-z0-9._-]+|\*\*?)`
	segmentsOfID   = `(/[A-Za-z0-9._-]+)*`
	schemeAndTD    = `spiffe://[a-z0-9._-]+`
	domainText     = `^[a-z0-9._-]{1,255}$`
	nameText       = `^[^\x00-\x20\x7f]+$`
	idText         = `^` + schemeAndTD + segments + `$`
	idPathText     = `^` + segments + `$`
	toText         = `^(` + schemeAndTD + segments + `|group:.+)$`
	fromText       = `^(` + schemeAndTD + segments + `|group:.+|unauthenticated)$`
	peerIDText     = `^` + schemeAndTD + segmentsOfID + `$`
	peerText       = `^(` + schemeAndTD + segmentsOfID + `|unauthenticated)$`
	addressText    = `^[0-9A-Fa-f:.]+(%.+)?$`
	networkText    = `^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$`
	portsText      = `^[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?$`
	serverNameText = `^((\*\.)?[^\s/*@:]+|\[[0-9A-Fa-f:.]+\])$`
	hostText       = `^(\*\.)?[^\s/*@]+$`
	methodText     = "^[!#$%&'*+.^_`|~0-9A-Z-]+$"
	pathText       = `^/[^?]*$`
	headerNameText = "^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"
	serviceText    = `^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`
	callText       = `^[A-Za-z_][A-Za-z0-9_]*$`
	rpcText        = `^/?[A-Za-z_][A-Za-z0-9_.]*/[A-Za-z_][A-Za-z0-9_]*$`
	doText         = `^[!-~]+ \s*[!-~]+\s*$`
	timeText       = `^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.,][0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})$`
	hexText        = `^\s*(0[xX])?[0-9A-Fa-f]+(:[0-9A-Fa-f]+)*\s*$`
)

const maxPort = 1<<16 - 1

// Types of JSON Schema.
const (
	object = "object"
	array  = "array"
	str    = "string"
)

var (
	anyText     = shape{Type: str}
	truthShape  = shape{Type: "boolean"}
	scalarShape = shape{Type: []string{str, "number", "boolean"}}
)

func like(pattern string) shape { return shape{Type: str, Pattern: pattern} }

func upTo(most int) shape { return shape{Type: str, MaxLength: most} }

func nameShape() shape { return shape{Type: str, Pattern: nameText, MaxLength: maxName} }

// hexShape is hexadecimal text; of digits alone it reads as a number.
func hexShape() shape { return shape{Type: []string{str, "number"}, Pattern: hexText} }

func wordOf(words ...any) shape { return shape{Enum: words} }

func whole(most int) shape { return shape{Type: "integer", Minimum: 1, Maximum: float64(most)} }

func above0(most float64) shape {
	return shape{Type: "number", ExclusiveMinimum: new(int), Maximum: most}
}

func listOf(s shape) shape { return shape{Type: array, Items: &s, MinItems: 1} }

func either(shapes ...shape) shape {
	var s shape
	for _, one := range shapes {
		s.AnyOf = append(s.AnyOf, one)
	}
	return s
}

// keysIn is a block of these keys and no others.
func keysIn(keys []key) shape {
	s := shape{Type: object, Properties: keys, Others: false}
	for i := range keys {
		if keys[i].is.must {
			s.Required = append(s.Required, keys[i].name)
		}
	}
	return s
}

// namedBy is a block whose keys are names.
func namedBy(names string, values shape) shape {
	return shape{Type: object, PropertyNames: &shape{Pattern: names}, Others: values}
}

func atLeastOne(s shape) shape {
	s.MinProperties = 1
	return s
}

func must(s shape) shape {
	s.must = true
	return s
}

// Blocks in which one key goes with another.

func has(keys ...string) shape { return shape{Required: keys} }

func isWord(key, word string) shape {
	return shape{Properties: properties{{name: key, is: wordOf(word)}}, Required: []string{key}}
}

func ruleShape() shape {
	s := keysIn(ruleKeys)
	s.If, s.Then = isWord("effect", "allow"), has("from")
	s.Not = has("http", "grpc")
	inbound := shape{Not: isWord("at", "outbound")}
	s.DependentSchemas = map[string]any{"source_ip": inbound, "not_source_ip": inbound}
	return s
}

func limitShape() shape {
	s := keysIn(limitKeys)
	s.AnyOf = []any{has("rps"), has("connections")}
	s.DependentRequired = map[string][]string{"burst": {"rps"}}
	return s
}

func testShape() shape {
	s := keysIn(testKeys)
	s.Not = has("do", "grpc")
	request := either(has("do"), has("grpc"))
	s.DependentSchemas = map[string]any{"host": request, "headers": request, "subject": request}
	return s
}
