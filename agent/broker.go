package agent

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/narthex-id/narthex/agent/endpoint"
)

// Broker is the SPIFFE Broker Endpoint: see endpoint.BrokerConfig.
type Broker struct {
	Socket     string       // path; empty: not on a Unix socket
	Inherit    net.Listener // as Config has it
	Listen     string       // host:port; empty: not over TCP
	InheritTCP net.Listener // as Inherit, at Listen
	Brokers    []endpoint.Broker
}

// openBrokers opens the sockets of the broker endpoint. After an error none is
// open.
func (a *Agent) openBrokers() error {
	b := a.cfg.Broker
	for _, place := range []struct {
		socket, address string
		inherit         net.Listener
	}{{socket: b.Socket, inherit: b.Inherit}, {address: b.Listen, inherit: b.InheritTCP}} {
		if place.socket == "" && place.address == "" {
			continue
		}
		s, err := endpoint.ListenBroker(endpoint.BrokerConfig{
			Socket: place.socket, Apart: a.cfg.Socket, Address: place.address, Listener: place.inherit,
			Agent: a, TrustDomain: a.cfg.TrustDomain, Attestors: a.cfg.WorkloadAttestors, Brokers: b.Brokers,
			Metrics: a.cfg.Metrics, Log: a.log.Named("broker"),
		})
		if err != nil {
			for _, open := range a.brokers {
				err = errors.Join(err, open.Close())
			}
			return err
		}
		a.brokers = append(a.brokers, s)
	}
	return nil
}

// servers are those of all sockets.
func (a *Agent) servers() []*endpoint.Server {
	all := []*endpoint.Server{a.server}
	if a.admin != nil {
		all = append(all, a.admin)
	}
	return append(all, a.brokers...)
}

// brokerServers returns the servers of the broker endpoint on its Unix socket and
// over TCP, nil where there is none.
func (a *Agent) brokerServers() (local, tcp *endpoint.Server) {
	rest := a.brokers
	if a.cfg.Broker.Socket != "" {
		local, rest = rest[0], rest[1:]
	}
	if a.cfg.Broker.Listen != "" {
		tcp = rest[0]
	}
	return local, tcp
}

// BrokerSocket returns what Socket does, of the broker endpoint; nil where there
// is none.
func (a *Agent) BrokerSocket() (_ net.Listener, owned bool) {
	if s, _ := a.brokerServers(); s != nil {
		return s.Socket()
	}
	return nil, false
}

// BrokerListener returns that of the broker endpoint over TCP likewise.
func (a *Agent) BrokerListener() net.Listener {
	if _, s := a.brokerServers(); s != nil {
		l, _ := s.Socket()
		return l
	}
	return nil
}

func (a *Agent) pauseBrokers(given Given) {
	local, tcp := a.brokerServers()
	if local != nil {
		local.Pause(given.Broker)
	}
	if tcp != nil {
		tcp.Pause(given.BrokerTCP)
	}
}

// Certificate implements endpoint.BrokerAgent.
func (a *Agent) Certificate() (*tls.Certificate, error) {
	id := a.client.Identity()
	a.mu.Lock()
	expires := a.view.expires
	a.mu.Unlock()
	switch {
	case id == nil:
		return nil, errors.New("the agent has no SVID of its own to show to brokers: its node is not attested")
	case !time.Now().Before(expires):
		return nil, fmt.Errorf("the agent's own SVID has expired at %s: it is shown to nobody", expires)
	}
	return &tls.Certificate{Certificate: id.Chain, PrivateKey: id.Key}, nil
}
