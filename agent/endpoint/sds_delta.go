package endpoint

import (
	"strconv"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// incremental is the kind of stream whose requests say what the client wants
// from now on, or no more, and whose answers hold what changed.
type incremental struct{}

func (incremental) newRequest() request { return &discovery.DeltaDiscoveryRequest{} }

// subscribe heeds each request, whatever its nonce: none repeats what another
// says. A first one that names nothing is a wildcard.
func (incremental) subscribe(s *subscription, r request, first, _ bool) error {
	req := r.(*discovery.DeltaDiscoveryRequest)
	if len(req.ResourceLocatorsSubscribe)+len(req.ResourceLocatorsUnsubscribe) > 0 {
		return errLocators
	}
	s.remove(req.ResourceNamesUnsubscribe)
	if err := s.add(req.ResourceNamesSubscribe); err != nil || !first {
		return err
	}
	s.wildcard = s.wildcard || !hasNames(req.ResourceNamesSubscribe)
	s.resume(req.InitialResourceVersions)
	return nil
}

// Field numbers of DeltaDiscoveryResponse and of its Resource in
// service/discovery/v3/discovery.proto.
const (
	deltaVersion   protowire.Number = 1
	deltaResources protowire.Number = 2
	deltaTypeURL   protowire.Number = 4
	deltaNonce     protowire.Number = 5
	deltaRemoved   protowire.Number = 6

	resourceVersion protowire.Number = 1
	resourceBody    protowire.Number = 2
	resourceName    protowire.Number = 3
)

// answer makes a DeltaDiscoveryResponse.
func (incremental) answer(c *secretCall, set *secretSet, news []*secret, gone []string) mem.BufferSlice {
	var w wire
	w.text(deltaVersion, c.version.String())
	for _, x := range news {
		version, message := x.version.String(), c.server.secrets.message(set, x)
		w.open(deltaResources, fieldSize(resourceVersion, len(version))+
			fieldSize(resourceBody, secretSize(message))+fieldSize(resourceName, len(x.name)))
		w.text(resourceVersion, version)
		w.secret(resourceBody, message)
		w.text(resourceName, x.name)
	}
	w.text(deltaTypeURL, secretType)
	w.text(deltaNonce, strconv.FormatUint(c.sent, 10))
	for _, name := range gone {
		w.text(deltaRemoved, name)
	}
	return w.done()
}
