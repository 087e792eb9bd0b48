package policy

// key is a key of the language, with what may stand behind it: the one list
// that the reader, the canonical order, the schema and the documentation go by.
type key struct {
	name, about string
	is          shape
}

// The keys of each block, in the order in which they are written.
var (
	topKeys = []key{
		{"version", "Version of the language: 1.", must(wordOf(1))},
		{"trust_domains", "Ceilings: the SPIFFE ID paths that identities of a trust domain may have.", namedBy(domainText, keysIn(ceilingKeys))},
		{"groups", "Named lists of SPIFFE IDs and patterns.", namedBy(nameText, listOf(like(idText)))},
		{"rules", "Who may speak to whom.", listOf(ruleShape())},
		{"limits", "How much one that is allowed may do.", listOf(limitShape())},
		{"revoked", "Identities and certificates that are refused whatever rules say.", listOf(either(like(idText), keysIn(revokedKeys)))},
		{"tests", "Questions with the answers they must have; they run before the policy comes into force.", listOf(testShape())},
	}
	ceilingKeys = []key{
		{"ids", "Paths such as /exports/**.", must(listOf(like(idPathText)))},
	}
	ruleKeys = []key{
		{"id", "Unique name, which logs and metrics show.", must(nameShape())},
		{"description", "For people.", upTo(maxDescription)},
		{"effect", "allow or deny.", must(wordOf("allow", "deny"))},
		{"shadow", "Reported where it would have decided otherwise, never enforced.", truthShape},
		{"on", "Names of listeners; left out: every listener.", listOf(nameShape())},
		{"at", "inbound or outbound; left out: both ends.", wordOf("inbound", "outbound")},
		{"from", "SPIFFE IDs, patterns, group:NAME, or unauthenticated; an allow needs it.", listOf(like(fromText))},
		{"to", "SPIFFE IDs, patterns or group:NAME.", listOf(like(toText))},
		{"http", "What an HTTP request must be.", atLeastOne(keysIn(httpKeys))},
		{"grpc", "What a gRPC call must be.", atLeastOne(keysIn(grpcKeys))},
		{"source_ip", "Addresses or networks the client is in; inbound.", listOf(like(networkText))},
		{"not_source_ip", "Addresses or networks the client is not in; inbound.", listOf(like(networkText))},
		{"ports", "Ports of the mTLS side, or ranges: accepted on at the inbound end, dialled at the outbound one.", listOf(either(whole(maxPort), like(portsText)))},
		{"sni", "TLS server names; *.suffix stands for one label or more.", listOf(like(serverNameText))},
		{"when", "A CEL expression that must be true.", upTo(maxWhen)},
	}
	httpKeys = []key{
		{"methods", "Methods, compared letter by letter.", listOf(like(methodText))},
		{"hosts", "Hosts, with or without port; *.suffix stands for one label or more.", listOf(like(hostText))},
		{"paths", "Paths; {name} is one segment, ** at the end all that is below.", listOf(like(pathText))},
		{"headers", "Names of headers with their values, present or absent.", atLeastOne(namedBy(headerNameText, either(wordOf(wordPresent, wordAbsent), listOf(anyText))))},
		{"subjects", subjectsAbout, listOf(like(toText))},
	}
	grpcKeys = []key{
		{"services", "Full names of services, such as shop.v1.Orders.", listOf(like(serviceText))},
		{"methods", "Names of methods.", listOf(like(callText))},
		{"subjects", subjectsAbout, listOf(like(toText))},
	}
	limitKeys = []key{
		{"id", "Unique name, which logs and metrics show.", must(nameShape())},
		{"on", "Names of listeners; left out: every listener.", listOf(nameShape())},
		{"from", "Whom it limits; left out: everybody.", listOf(like(fromText))},
		{"to", "Identities that are spoken to.", listOf(like(toText))},
		{"per", "identity (each its own) or all (one together).", wordOf("identity", "all")},
		{"rps", "Requests a second; on a tcp listener new connections.", above0(maxRPS)},
		{"burst", "How many at once; left out: those of a second.", whole(maxBurst)},
		{"connections", "Live connections.", whole(maxConnections)},
	}
	revokedKeys = []key{
		{"issuer", "Authority key identifier of the certificate, hexadecimal.", must(hexShape())},
		{"serial", "Serial number of the certificate, hexadecimal.", must(hexShape())},
	}
	testKeys = []key{
		{"name", "For people.", anyText},
		{"as", "Who it comes from: a SPIFFE ID or unauthenticated.", must(like(peerText))},
		{"to", "The SPIFFE ID it goes to.", like(peerIDText)},
		{"on", "Name of the listener.", anyText},
		{"at", "inbound (left out) or outbound.", wordOf("inbound", "outbound")},
		{"source_ip", "Address of the client.", like(addressText)},
		{"port", "Port of the mTLS side.", whole(maxPort)},
		{"sni", "TLS server name.", anyText},
		{"do", "An HTTP request: method and target, like GET /v1/orders/7.", like(doText)},
		{"host", "Host of the request.", anyText},
		{"grpc", "A gRPC call, like shop.v1.Orders/Get, in place of do.", like(rpcText)},
		{"headers", "Headers of the request: a value or a list of them each.", namedBy(headerNameText, either(scalarShape, shape{Type: array, Items: &scalarShape}))},
		{"subject", "The SPIFFE ID that a JWT-SVID on the request speaks for; left out: it has none. Inbound.", like(peerIDText)},
		{"time", "When it is asked, RFC 3339; left out: 2000-01-01T00:00:00Z.", like(timeText)},
		{"expect", "allow or deny.", must(wordOf("allow", "deny"))},
		{"rule", "Id of the rule that must decide.", anyText},
		{"reason", "revoked, ceiling, rule or no_rule.", wordOf("revoked", "ceiling", "rule", "no_rule")},
		{"shadow", "Ids of the shadow rules that must have decided otherwise.", shape{Type: array, Items: &anyText}},
	}
)

// subjectsAbout is said of http and grpc alike.
const subjectsAbout = "Whom a JWT-SVID on the request must speak for: SPIFFE IDs, patterns or group:NAME."

// keysOf returns the names.
func keysOf(keys []key) []string {
	names := make([]string, len(keys))
	for i := range keys {
		names[i] = keys[i].name
	}
	return names
}

// Names that are asked for with every entry of a list.
var (
	httpKeyNames, grpcKeyNames  = keysOf(httpKeys), keysOf(grpcKeys)
	limitKeyNames, testKeyNames = keysOf(limitKeys), keysOf(testKeys)
)

// otherWords are keys of other languages, with what to write here.
var otherWords = map[string]string{
	"subject":    "inside of http, subjects is a list",
	"not_from":   `everybody but one is written with when: 'from.id != "spiffe://…"'`,
	"not_to":     `everybody but one is written with when: 'to.id != "spiffe://…"'`,
	"principals": "callers are named by from",
	"source":     "callers are named by from, their addresses by source_ip",
	"action":     "say effect: allow or deny",
	"condition":  "a CEL condition is written under when",
	"path":       "inside of http, paths is a list",
	"method":     "inside of http, methods is a list",
}
