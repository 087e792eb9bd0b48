package main

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/config"
)

const preamble = `# Configuration

<!-- Made from internal/config/types.go by "go generate ./internal/config/gen". Do not edit. -->

Narthex reads one YAML file, ` + "`narthex.yaml`" + `, named with ` + "`-c`" + `. It may hold an ` + "`agent`" + `, a ` + "`proxy`" + ` or both;
` + "`narthex agent`" + `, ` + "`narthex proxy`" + ` and ` + "`narthex run`" + ` (both) say what they miss.

- Unknown keys, wrong types and combinations that cannot be are errors with file, line, column and the nearest known key. ` + "`narthex check -c narthex.yaml`" + ` shows them without starting anything, and [gates a change](ci.md) on them.
- Keys that a later version brings are refused too: nothing is ignored.
- Relative paths are relative to the directory of the file. ` + "`${ENV}`" + ` is not expanded; secrets stand in files of their own.
- Durations are written as in Go: ` + "`300ms`, `10s`, `1h30m`" + `. Addresses are ` + "`host:port`, `:port`, `[ipv6]:port` or `unix:/path`" + `.
- The file may have 1 MiB. Anchors and aliases work; merge keys and tags are refused.
- Editors complete and check the file by [narthex.schema.json](narthex.schema.json); for yaml-language-server, put this line first:
  ` + "`# yaml-language-server: $schema=narthex.schema.json`" + `

`

// example is one whole file that works, shown before the keys.
type example struct{ title, text, yaml string }

var examples = []example{
	{"Both halves on one host", "`narthex run`: the agent pairs with SPIRE Server, the proxy stands before a local service and in the way of its calls.", `trust_domain: example.org
data_dir: /var/lib/narthex

agent:
  server:
    address: spire-server:8081
    bundle: {file: /etc/narthex/bundle.crt}
  node_attestor:
    join_token: {token_file: /etc/narthex/join-token}
  workload_attestors:
    unix: {discover_workload_path: true}

proxy:
  user: narthex
  policies: [/etc/narthex/policies/*.yaml]
  listeners:
    - name: inventory
      direction: inbound
      bind: 0.0.0.0:8443
      target: unix:/run/inventory/app.sock
    - name: to-orders
      direction: outbound
      bind: 127.0.0.1:15001
      target: orders.shop.svc:8443
      expect: ["spiffe://example.org/ns/shop/sa/orders"]

telemetry: {listen: "127.0.0.1:9901", health: ":9902"}
`},
	{"An agent alone", "`narthex agent`, on a host with a certificate that the server trusts.", `trust_domain: example.org
agent:
  server:
    address: spire-server:8081
    bundle: {file: bundle.crt}
    require_pq_kem: true
  node_attestor:
    x509pop:
      key: node.key
      certificate: node.crt
      intermediates: intermediates.crt
  key_manager: {memory: {}}
  workload_api: {socket: /run/narthex/public/api.sock}
  svid: {key_type: ec-p384, availability_target: 24h}
log: {level: debug, format: json}
`},
	{"A proxy beside another SPIFFE agent", "`narthex proxy`, with identities from a stock spire-agent.", `proxy:
  source: workload_api
  workload_api: {socket: /run/spire/agent/public/api.sock}
  policies: [policy.yaml]
  listeners:
    - name: inventory
      direction: inbound
      bind: ":8443"
      target: 127.0.0.1:8080
      identity: {spiffe_id: "spiffe://example.org/ns/shop/sa/inventory"}
      timeouts: {idle: 1h, drain: 10s}
      on_policy_change: drain
      on_peer_expiry: close
      max_age: 24h
      max_connections: 1000
access_log: {path: /var/log/narthex/access.log, format: json}
`},
	{"A proxy on certificate files", "`narthex proxy`, with files that cert-manager, spiffe-helper or a script writes.", `proxy:
  source: files
  files:
    cert: svid.pem
    key: svid.key
    bundle: bundle.pem
    bundles: {partner.example: partner.pem}
  policies: [policy.yaml]
  listeners:
    - name: to-partner
      direction: outbound
      bind: unix:/run/narthex/partner.sock
      target: api.partner.example:443
      expect: ["spiffe://partner.example/exports/api"]
`},
	{"gRPC and HTTP/2", "`upstream.protocol: auto` suits services that speak HTTP/1.1, and gRPC servers that are sent nothing but gRPC. " +
		"Set `h2c` (outbound: `h2`) where the target speaks HTTP/2 alone and is sent other requests too, and `http1` where it has no HTTP/2.", `proxy:
  policies: [policy.yaml]
  listeners:
    - name: orders
      direction: inbound
      bind: ":8443"
      target: 127.0.0.1:50051
      protocol: http
      http:
        max_streams: 100
      upstream:
        protocol: h2c
        health: {grpc: {service: shop.v1.Orders}}
`},
}

// reference returns configuration.md.
func reference(root *key) []byte {
	var b bytes.Buffer
	b.WriteString(preamble)
	b.WriteString("## Examples\n\n")
	for _, e := range examples {
		fmt.Fprintf(&b, "### %s\n\n%s\n\n```yaml\n%s```\n\n", e.title, e.text, e.yaml)
	}
	b.WriteString("## Keys\n\n")
	writeTable(&b, root)
	writeBlocks(&b, root)
	return append(bytes.TrimRight(b.Bytes(), "\n"), '\n')
}

func writeBlocks(b *bytes.Buffer, block *key) {
	for _, k := range block.keys {
		if len(k.keys) == 0 {
			continue
		}
		fmt.Fprintf(b, "### %s\n\n%s\n\n", k.path, k.doc)
		writeTable(b, k)
		writeBlocks(b, k)
	}
}

func writeTable(b *bytes.Buffer, block *key) {
	b.WriteString("| key | value | left out | |\n|---|---|---|---|\n")
	for _, k := range block.keys {
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", k.name, cell(valueOf(k)), cell(leftOut(k)), cell(meaning(k)))
	}
	b.WriteString("\n")
}

func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

func meaning(k *key) string {
	if e := k.tag.Get("example"); e != "" {
		return fmt.Sprintf("%s Example: `%s`", k.doc, e)
	}
	return k.doc
}

func leftOut(k *key) string {
	switch d := k.tag.Get("default"); {
	case d != "":
		return "`" + d + "`"
	case k.tag.Get("required") != "":
		return "**required**"
	case len(k.keys) > 0 && !k.optional:
		return "as its keys say"
	}
	return "–"
}

// names of the types that a person writes.
var names = map[reflect.Type]string{
	reflect.TypeFor[spiffeid.TrustDomain]():                 "trust domain",
	reflect.TypeFor[spiffeid.ID]():                          "SPIFFE ID",
	reflect.TypeFor[config.Duration]():                      "duration",
	reflect.TypeFor[config.Address]():                       "address",
	reflect.TypeFor[config.IDPattern]():                     "SPIFFE ID pattern",
	reflect.TypeFor[config.SocketMode]():                    "mode in octal",
	reflect.TypeFor[config.Network]():                       "network",
	reflect.TypeFor[config.ServerName]():                    "server name",
	reflect.TypeFor[config.Socket]():                        "path of a socket",
	reflect.TypeFor[config.File]():                          "file",
	reflect.TypeFor[config.Secret]():                        "text",
	reflect.TypeFor[config.Empty]():                         "`{}`",
	reflect.TypeFor[map[spiffeid.TrustDomain]config.File](): "files by trust domain",
}

func valueOf(k *key) string {
	if enum := k.tag.Get("enum"); enum != "" {
		return "`" + strings.ReplaceAll(enum, "|", "`, `") + "`"
	}
	name := names[k.elem()]
	if len(k.keys) > 0 {
		name = fmt.Sprintf("[block](#%s)", anchor(k.path))
	}
	if name == "" {
		name = map[reflect.Kind]string{
			reflect.String: "text", reflect.Bool: "`true`, `false`", reflect.Int: "number", reflect.Int64: "number",
		}[k.elem().Kind()]
	}
	if k.typ == reflect.TypeFor[config.Targets]() {
		name += ", or a list of them"
	} else if k.typ.Kind() == reflect.Slice {
		name = "list of: " + name
	}
	return name + boundsOf(k.tag)
}

func boundsOf(tag reflect.StructTag) string {
	low, high := tag.Get("min"), tag.Get("max")
	switch {
	case low != "" && high != "":
		return fmt.Sprintf(", %s to %s", low, high)
	case low != "":
		return ", at least " + low
	}
	return ""
}

// anchor is the fragment that GitHub gives to a heading.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch r {
		case '.', '[', ']':
			return -1
		case ' ':
			return '-'
		}
		return r
	}, strings.ToLower(heading))
}
