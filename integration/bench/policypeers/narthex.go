package main

import (
	"bytes"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
	"github.com/narthex-id/narthex/proxy/policy"
)

// narthex is the policy as the proxy asks it.
type narthex struct {
	policy   *policy.Policy
	requests []policy.Request
	decision policy.Decision
}

func (n *narthex) write(m *rulemix.Mix) ([]byte, error) {
	var b bytes.Buffer
	err := m.WriteYAML(&b)
	return b.Bytes(), err
}

func (n *narthex) load(text []byte) (err error) {
	n.policy, err = policy.Parse("rules.yaml", text)
	return err
}

func (n *narthex) prepare(requests []rulemix.Request) error {
	n.requests = make([]policy.Request, len(requests))
	for i := range requests {
		if err := question(&requests[i], &n.requests[i]); err != nil {
			return err
		}
	}
	return nil
}

// question writes a request as the proxy asks it.
func question(q *rulemix.Request, to *policy.Request) (err error) {
	*to = policy.Request{
		Listener: q.Listener, Source: netip.MustParseAddrPort("10.1.2.3:4567"), Port: 8443,
		Time: time.Unix(1700000000, 0),
	}
	if q.Outbound {
		to.Direction = policy.Outbound
	}
	if to.From.ID, err = spiffeid.FromString(q.From); err != nil {
		return err
	}
	if to.To.ID, err = spiffeid.FromString(q.To); err != nil {
		return err
	}
	if q.Method == "" {
		return nil
	}
	to.HTTP = &policy.HTTP{Method: q.Method, Host: q.Host, Path: q.Path}
	for _, h := range q.Headers {
		to.HTTP.Headers = append(to.HTTP.Headers, policy.Header{Name: h.Name, Value: h.Value})
	}
	return nil
}

func (n *narthex) allows(i int) (bool, error) {
	n.policy.Decide(&n.requests[i], &n.decision)
	return n.decision.Allow, nil
}
