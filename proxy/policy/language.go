package policy

// key is a key of the language: the one list that the reader, the canonical
// order, the schema and the documentation go by.
type key struct{ name, about string }

// The keys of each block, in the order in which they are written.
var (
	topKeys = []key{
		{"version", "Version of the language: 1."},
		{"trust_domains", "Ceilings: the SPIFFE ID paths that identities of a trust domain may have."},
		{"groups", "Named lists of SPIFFE IDs and patterns."},
		{"rules", "Who may speak to whom."},
		{"limits", "How much one that is allowed may do."},
		{"revoked", "Identities and certificates that are refused whatever rules say."},
		{"tests", "Questions with the answers they must have; they run before the policy comes into force."},
	}
	ceilingKeys = []key{
		{"ids", "Paths such as /exports/**."},
	}
	ruleKeys = []key{
		{"id", "Unique name, which logs and metrics show."},
		{"description", "For people."},
		{"effect", "allow or deny."},
		{"shadow", "Reported where it would have decided otherwise, never enforced."},
		{"on", "Names of listeners; left out: every listener."},
		{"at", "inbound or outbound; left out: both ends."},
		{"from", "SPIFFE IDs, patterns, group:NAME, or unauthenticated; an allow needs it."},
		{"to", "SPIFFE IDs, patterns or group:NAME."},
		{"http", "What an HTTP request must be."},
		{"grpc", "What a gRPC call must be."},
		{"source_ip", "Addresses or networks the client is in; inbound."},
		{"not_source_ip", "Addresses or networks the client is not in; inbound."},
		{"ports", "Ports of the mTLS side, or ranges: accepted on at the inbound end, dialled at the outbound one."},
		{"sni", "TLS server names; *.suffix stands for one label or more."},
		{"when", "A CEL expression that must be true."},
	}
	httpKeys = []key{
		{"methods", "Methods, compared letter by letter."},
		{"hosts", "Hosts, with or without port; *.suffix stands for one label or more."},
		{"paths", "Paths; {name} is one segment, ** at the end all that is below."},
		{"headers", "Names of headers with their values, present or absent."},
	}
	grpcKeys = []key{
		{"services", "Full names of services, such as shop.v1.Orders."},
		{"methods", "Names of methods."},
	}
	limitKeys = []key{
		{"id", "Unique name, which logs and metrics show."},
		{"on", "Names of listeners; left out: every listener."},
		{"from", "Whom it limits; left out: everybody."},
		{"to", "Identities that are spoken to."},
		{"per", "identity (each its own) or all (one together)."},
		{"rps", "Requests a second; on a tcp listener new connections."},
		{"burst", "How many at once; left out: those of a second."},
		{"connections", "Live connections."},
	}
	revokedKeys = []key{
		{"issuer", "Authority key identifier of the certificate, hexadecimal."},
		{"serial", "Serial number of the certificate, hexadecimal."},
	}
	testKeys = []key{
		{"name", "For people."},
		{"as", "Who it comes from: a SPIFFE ID or unauthenticated."},
		{"to", "The SPIFFE ID it goes to."},
		{"on", "Name of the listener."},
		{"at", "inbound (left out) or outbound."},
		{"source_ip", "Address of the client."},
		{"port", "Port of the mTLS side."},
		{"sni", "TLS server name."},
		{"do", "An HTTP request: method and target, like GET /v1/orders/7."},
		{"host", "Host of the request."},
		{"grpc", "A gRPC call, like shop.v1.Orders/Get, in place of do."},
		{"headers", "Headers of the request: a value or a list of them each."},
		{"time", "When it is asked, RFC 3339; left out: 2000-01-01T00:00:00Z."},
		{"expect", "allow or deny."},
		{"rule", "Id of the rule that must decide."},
		{"reason", "revoked, ceiling, rule or no_rule."},
		{"shadow", "Ids of the shadow rules that must have decided otherwise."},
	}
)

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
