package config

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Types of references that the agent knows (SPIFFE Broker API §3.1.3), and what
// stands for all of them.
const (
	anyReference = "*"
	pidReference = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"
	podReference = "type.googleapis.com/spiffe.broker.KubernetesObjectReference"
)

// validate checks the broker endpoint of an agent of this trust domain.
func (b *Broker) validate(f *findings, td spiffeid.TrustDomain, workloadAPI Socket) {
	if b.Socket == "" && b.Listen == "" && !f.isBad("agent.broker.socket") && !f.isBad("agent.broker.listen") {
		f.addf("agent.broker", "needs socket, listen or both")
	}
	if b.Listen.Network() == "unix" {
		f.addf("agent.broker.listen", "%q is a Unix socket; say it as agent.broker.socket", b.Listen)
	}
	public := filepath.Dir(filepath.Clean(string(workloadAPI)))
	if dir := filepath.Dir(filepath.Clean(string(b.Socket))); b.Socket != "" && workloadAPI != "" && (dir == public || strings.HasPrefix(dir, strings.TrimSuffix(public, "/")+"/")) {
		f.addf("agent.broker.socket", "%s is in the directory of agent.workload_api.socket, which is shown to workloads; choose another directory, such as /run/narthex/broker", b.Socket)
	}
	for i, one := range b.Brokers {
		key := fmt.Sprintf("agent.broker.brokers[%d]", i)
		switch {
		case one.ID.IsZero(): // said already
		case !td.IsZero() && !one.ID.MemberOf(td):
			f.addf(key+".id", "%s is not of trust domain %s, whose brokers alone are trusted", one.ID, td)
		case slices.ContainsFunc(b.Brokers[:i], func(o AllowedBroker) bool { return o.ID == one.ID }):
			f.addf(key+".id", "%s is in the list already", one.ID)
		}
		one.validate(f, key)
	}
}

func (b *AllowedBroker) validate(f *findings, key string) {
	for i, r := range b.References {
		at := fmt.Sprintf("%s.references[%d]", key, i)
		switch {
		case r.TypeURL == "": // said already
		case r.TypeURL == anyReference && len(b.References) > 1:
			f.addf(at+".type_url", "%q stands for every type; it must be alone", anyReference)
		case r.TypeURL != anyReference && r.TypeURL != pidReference && r.TypeURL != podReference:
			f.addf(at+".type_url", "%q is no type of reference that this agent knows; write %s, %s or %q", clip(r.TypeURL), pidReference, podReference, anyReference)
		case slices.ContainsFunc(b.References[:i], func(o BrokerReference) bool { return o.TypeURL == r.TypeURL }):
			f.addf(at+".type_url", "%s is in the list already", r.TypeURL)
		case r.TypeURL == pidReference && r.AllowOverTCP:
			f.addf(at+".allow_over_tcp", "cannot be true for a PID, which is another process's on every node; leave it out")
		}
	}
}
