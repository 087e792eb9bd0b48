package endpoint

import (
	"strconv"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// stateOfTheWorld is the kind of stream whose requests name all that the client
// wants, and whose answers hold all there is of it.
type stateOfTheWorld struct{}

func (stateOfTheWorld) newRequest() request { return &discovery.DiscoveryRequest{} }

// subscribe heeds no request with a nonce before the last: the client repeats
// what it wants when it answers the last. Without names a first request is a
// wildcard, and a later one is where the one before was.
func (stateOfTheWorld) subscribe(s *subscription, r request, first, current bool) error {
	req := r.(*discovery.DiscoveryRequest)
	if len(req.ResourceLocators) > 0 {
		return errLocators
	}
	if !current {
		return nil
	}
	names := req.ResourceNames
	unnamed := !hasNames(names)
	if unnamed && !first && s.unnamed {
		return nil
	}
	if err := s.replace(names); err != nil {
		return err
	}
	s.unnamed = unnamed && first
	s.wildcard = s.wildcard || s.unnamed
	return nil
}

// Field numbers of DiscoveryResponse in service/discovery/v3/discovery.proto.
const (
	worldVersion   protowire.Number = 1
	worldResources protowire.Number = 2
	worldTypeURL   protowire.Number = 4
	worldNonce     protowire.Number = 5
)

// answer makes a DiscoveryResponse.
func (stateOfTheWorld) answer(c *secretCall, set *secretSet, _ []*secret, _ []string) mem.BufferSlice {
	var w wire
	w.text(worldVersion, c.version.String())
	for _, x := range c.subscription.wanted(set) {
		w.secret(worldResources, c.server.secrets.message(set, x))
	}
	w.text(worldTypeURL, secretType)
	w.text(worldNonce, strconv.FormatUint(c.sent, 10))
	return w.done()
}

// secret appends a field with a Secret in a google.protobuf.Any.
func (w *wire) secret(field protowire.Number, message mem.BufferSlice) {
	w.open(field, secretSize(message))
	w.text(anyType, secretType)
	w.open(anyValue, message.Len())
	w.flush()
	w.parts = append(w.parts, message...)
}

func secretSize(message mem.BufferSlice) int {
	return fieldSize(anyType, len(secretType)) + fieldSize(anyValue, message.Len())
}
