package mesh

import "testing"

// Pair is a service behind two proxies: a caller speaks plaintext to the
// outbound one, which speaks mutual TLS to the inbound one.
type Pair struct {
	CA            *Authority
	Client        *SVID // the outbound proxy's, and good for clients of their own
	Out, In       *Node
	Entry, Secure string // addresses of the outbound listener, and of the inbound one
}

// NewPair starts both before the service at target. More is further YAML of
// both listeners.
func NewPair(t *testing.T, target string, more ...string) *Pair {
	t.Helper()
	p := &Pair{CA: NewAuthority(t)}
	p.Client = p.CA.Leaf("/client")
	server := p.CA.Leaf("/server")
	p.In, p.Out = NewNode(t, "in", server), NewNode(t, "out", p.Client)
	p.Secure = p.In.Inbound("in", target, more...)
	p.Entry = p.Out.Outbound("out", p.Secure, server.ID, more...)
	for _, n := range []*Node{p.In, p.Out} {
		n.Rules(Allow("client-may", p.Client.ID))
		n.Start()
	}
	return p
}
