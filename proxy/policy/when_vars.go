package policy

import (
	"fmt"
	"slices"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	celref "cel.dev/cel-go/common/types/ref"
)

// variable is a name that conditions may use.
type variable struct {
	name string
	kind *cel.Type
	most uint64 // characters of a text, entries of a map
	read func(*whenVars) celref.Val
}

const (
	headersVariable = "request.headers"
	subjectVariable = "request.subject"
)

var headersType = cel.MapType(cel.StringType, cel.ListType(cel.StringType))

// variables are all that a condition can read. SPIFFE-ID, section 2.3, bounds
// an ID to 2048 bytes and a trust domain to 255, RFC 5280, section 4.1.2.2, a
// serial number to 20.
var variables = slices.Concat(
	peerVariables("from", func(v *whenVars) *Peer { return &v.request.From }),
	peerVariables("to", func(v *whenVars) *Peer { return &v.request.To }),
	[]variable{
		{"source.ip", cel.StringType, 45, (*whenVars).sourceIP},
		{"source.port", cel.IntType, 0, func(v *whenVars) celref.Val { return types.Int(v.request.Source.Port()) }},
		{"connection.listener", cel.StringType, maxName, func(v *whenVars) celref.Val { return types.String(v.request.Listener) }},
		{"connection.direction", cel.StringType, 8, func(v *whenVars) celref.Val { return types.String(v.request.Direction.String()) }},
		{"connection.sni", cel.StringType, 255, func(v *whenVars) celref.Val { return types.String(v.request.SNI) }},
		{"connection.port", cel.IntType, 0, func(v *whenVars) celref.Val { return types.Int(v.request.Port) }},
		{"time", cel.TimestampType, 0, (*whenVars).time},
		{"request.time", cel.TimestampType, 0, (*whenVars).time},
		{"request.method", cel.StringType, mostMethod, func(v *whenVars) celref.Val { return types.String(v.request.HTTP.Method) }},
		{"request.host", cel.StringType, mostHost, func(v *whenVars) celref.Val { return types.String(v.request.HTTP.Host) }},
		{"request.path", cel.StringType, mostPath, func(v *whenVars) celref.Val { return types.String(v.request.HTTP.Path) }},
		{subjectVariable, cel.StringType, 2048, func(v *whenVars) celref.Val { return types.String(v.request.HTTP.Subject.String()) }},
		{subjectVariable + "_trust_domain", cel.StringType, 255, func(v *whenVars) celref.Val { return types.String(v.request.HTTP.Subject.TrustDomain().Name()) }},
		{subjectVariable + "_path", cel.StringType, 2048, func(v *whenVars) celref.Val { return types.String(v.request.HTTP.Subject.Path()) }},
		{headersVariable, headersType, mostHeaderLines, func(v *whenVars) celref.Val { return &v.headers }},
	},
)

// peerVariables are those of one side. Of a peer that proved no identity every
// text is empty.
func peerVariables(side string, peer func(*whenVars) *Peer) []variable {
	text := func(of func(*Peer) string) func(*whenVars) celref.Val {
		return func(v *whenVars) celref.Val {
			if p := peer(v); p.Authenticated() {
				return types.String(of(p))
			}
			return types.String("")
		}
	}
	return []variable{
		{side + ".id", cel.StringType, 2048, text(func(p *Peer) string { return p.ID.String() })},
		{side + ".trust_domain", cel.StringType, 255, text(func(p *Peer) string { return p.ID.TrustDomain().Name() })},
		{side + ".path", cel.StringType, 2048, text(func(p *Peer) string { return p.ID.Path() })},
		{side + ".serial", cel.StringType, 40, text(func(p *Peer) string { return p.Serial })},
		{side + ".authenticated", cel.BoolType, 0, func(v *whenVars) celref.Val { return types.Bool(peer(v).Authenticated()) }},
	}
}

// variablesByName is variables once more.
var variablesByName = func() map[string]*variable {
	byName := make(map[string]*variable, len(variables))
	for i := range variables {
		byName[variables[i].name] = &variables[i]
	}
	return byName
}()

// whenVars answers for the variables of one request. Nothing is read, or turned
// into text, before it is asked for.
type whenVars struct {
	request *Request
	headers headerMap
	ip      celref.Val // source.ip once it was asked for
}

func (v *whenVars) begin(q *Request) {
	v.request = q
	if q.HTTP != nil {
		v.headers.lines = q.HTTP.Headers
	}
}

func (v *whenVars) end() { *v = whenVars{} }

// ResolveName returns the value of a variable, as the library asks for it.
func (v *whenVars) ResolveName(name string) (any, bool) {
	if known, ok := variablesByName[name]; ok {
		return known.read(v), true
	}
	return nil, false
}

// Parent returns nil: there is no other place to look for a name.
func (v *whenVars) Parent() cel.Activation { return nil }

func (v *whenVars) time() celref.Val { return types.Timestamp{Time: v.request.Time} }

func (v *whenVars) sourceIP() celref.Val {
	if v.ip == nil {
		v.ip = types.String("")
		if ip := v.request.Source.Addr(); ip.IsValid() {
			v.ip = types.String(ip.Unmap().WithZone("").String())
		}
	}
	return v.ip
}

// The bounds of a request that conditions are asked about. What a condition
// can cost is estimated with them, so one beyond them is not evaluated.
const (
	mostMethod      = 64       // bytes of a method
	mostHost        = 512      // bytes of a host with its port
	mostPath        = 8 << 10  // bytes of a path
	mostHeaderLines = 128      // header lines
	mostHeaderValue = 16 << 10 // bytes of one value
	mostHeaderBytes = 64 << 10 // bytes of all names and values
)

// withinBounds returns an error for a request beyond them. Headers count only
// for a condition that reads them.
func withinBounds(h *HTTP, headers bool) error {
	switch {
	case len(h.Method) > mostMethod:
		return fmt.Errorf("the method has more than %d bytes", mostMethod)
	case len(h.Host) > mostHost:
		return fmt.Errorf("the host has more than %d bytes", mostHost)
	case len(h.Path) > mostPath:
		return fmt.Errorf("the path has more than %d bytes", mostPath)
	case !headers:
		return nil
	case len(h.Headers) > mostHeaderLines:
		return fmt.Errorf("more than %d header lines", mostHeaderLines)
	}
	total := 0
	for i := range h.Headers {
		value := len(h.Headers[i].Value)
		if value > mostHeaderValue {
			return fmt.Errorf("a header has more than %d bytes", mostHeaderValue)
		}
		total += len(h.Headers[i].Name) + value
	}
	if total > mostHeaderBytes {
		return fmt.Errorf("the headers have more than %d bytes", mostHeaderBytes)
	}
	return nil
}
