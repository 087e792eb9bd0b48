package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/invopop/jsonschema"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/config"
)

const (
	trustDomainPattern = `^[a-z0-9._-]{1,255}$`
	idPattern          = `^spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*$`
	durationPattern    = `^(0|([0-9]+(\.[0-9]*)?(ns|us|µs|ms|s|m|h))+)$`
	addressPattern     = `^(unix:/.*[^/]|.*:[0-9]{1,5})$`
	serverNamePattern  = `^(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?$`
	patternPattern     = `^spiffe://[a-z0-9._-]+(/([A-Za-z0-9._-]+|\*))*(/\*\*)?$`
	modePattern        = `^0*[67][0-7]{2}$`
	networkPattern     = `^(unix|[0-9a-fA-F.:]+(/[0-9]{1,3})?)$`
	socketPattern      = `^/.*[^/]$`
	namePattern        = `^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`
)

// scalars are the types that are more than their kind tells.
var scalars = map[reflect.Type]jsonschema.Schema{
	reflect.TypeFor[spiffeid.TrustDomain](): {Type: "string", Pattern: trustDomainPattern},
	reflect.TypeFor[spiffeid.ID]():          {Type: "string", Pattern: idPattern},
	reflect.TypeFor[config.Duration]():      {Type: "string", Pattern: durationPattern},
	reflect.TypeFor[config.Address]():       {Type: "string", Pattern: addressPattern},
	reflect.TypeFor[config.ServerName]():    {Type: "string", Pattern: serverNamePattern},
	reflect.TypeFor[config.IDPattern]():     {Type: "string", Pattern: patternPattern},
	reflect.TypeFor[config.SocketMode]():    {Type: "string", Pattern: modePattern},
	reflect.TypeFor[config.Network]():       {Type: "string", Pattern: networkPattern},
	reflect.TypeFor[config.Socket]():        {Type: "string", Pattern: socketPattern},
	reflect.TypeFor[config.File]():          {Type: "string"},
	reflect.TypeFor[config.Secret]():        {Type: "string"},
	reflect.TypeFor[config.HTTPVersion]():   {Type: "string", Enum: []any{config.HTTP2, config.HTTP1}},
	reflect.TypeFor[config.Targets](): {OneOf: []*jsonschema.Schema{
		{Type: "string", Pattern: addressPattern},
		{Type: "array", Items: &jsonschema.Schema{Type: "string", Pattern: addressPattern}, MinItems: new(uint64(1)), MaxItems: new(uint64(64)), UniqueItems: true},
	}},
	reflect.TypeFor[map[spiffeid.TrustDomain]config.File](): {
		Type:                 "object",
		PropertyNames:        &jsonschema.Schema{Pattern: trustDomainPattern},
		AdditionalProperties: &jsonschema.Schema{Type: "string"},
	},
}

// jsonSchema reflects the types and adds what stands in our own tags.
func jsonSchema(root *key) ([]byte, error) {
	r := &jsonschema.Reflector{
		FieldNameTag:               "yaml",
		DoNotReference:             true,
		Anonymous:                  true,
		RequiredFromJSONSchemaTags: true,
		Mapper: func(t reflect.Type) *jsonschema.Schema {
			if s, ok := scalars[t]; ok {
				return &s
			}
			return nil
		},
	}
	s := r.ReflectFromType(root.typ)
	s.Title = "narthex.yaml"
	s.Description = "Configuration of Narthex: a SPIFFE agent and an mTLS proxy that decides by SPIFFE ID."
	s.AnyOf = []*jsonschema.Schema{{Required: []string{"agent"}}, {Required: []string{"proxy"}}}
	if err := annotate(s, root); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(s); err != nil {
		return nil, fmt.Errorf("encode schema: %w", err)
	}
	return out.Bytes(), nil
}

func annotate(s *jsonschema.Schema, block *key) error {
	for _, k := range block.keys {
		sub, ok := s.Properties.Get(k.name)
		if !ok {
			return fmt.Errorf("%s is not in the schema", k.path)
		}
		sub.Description = k.doc
		if k.tag.Get("required") != "" {
			s.Required = append(s.Required, k.name)
		}
		if k.tag.Get("oneof") != "" {
			one := uint64(1)
			sub.MinProperties, sub.MaxProperties = &one, &one
		}
		for _, word := range strings.FieldsFunc(k.tag.Get("enum"), func(r rune) bool { return r == '|' }) {
			sub.Enum = append(sub.Enum, word)
		}
		if sub.Type == "integer" {
			sub.Minimum, sub.Maximum = json.Number(k.tag.Get("min")), json.Number(k.tag.Get("max"))
		}
		if k.path == "proxy.listeners[].name" || k.path == "proxy.ext_authz[].name" {
			sub.Pattern = namePattern
		}
		if text := k.tag.Get("default"); text != "" {
			if err := yaml.Unmarshal([]byte(text), &sub.Default); err != nil {
				return fmt.Errorf("default of %s: %w", k.path, err)
			}
			if n, ok := sub.Default.(uint64); ok && n <= math.MaxInt64 {
				sub.Default = json.Number(strconv.FormatUint(n, 10))
			}
		}
		if k.typ.Kind() == reflect.Slice && sub.Items != nil {
			if k.tag.Get("empty") == "" {
				sub.MinItems = new(uint64(1))
			}
			sub = sub.Items
		}
		if k.path == "proxy.listeners[]" {
			sub.AnyOf = []*jsonschema.Schema{{Required: []string{"target"}}, {Required: []string{"routes"}}}
		}
		if len(k.keys) > 0 {
			if err := annotate(sub, k); err != nil {
				return err
			}
		}
	}
	return nil
}
