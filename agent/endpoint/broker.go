package endpoint

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/socket"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// BrokerAgent is what a broker endpoint needs of the agent.
type BrokerAgent interface {
	Agent
	// Certificate returns the agent's own SVID with its key, as it is now, for
	// who is told whom it speaks to. The error says why there is none.
	Certificate() (*tls.Certificate, error)
}

// Broker is one who may have the identities of others.
type Broker struct {
	ID         spiffeid.ID     // of the agent's trust domain
	References []ReferenceType // by which it may name whom it asks for
}

// AnyReference stands for every type of reference.
const AnyReference = "*"

// ReferenceType is a type of reference to a workload.
type ReferenceType struct {
	TypeURL string // of the protobuf message, or AnyReference
	// OverTCP allows it on other than Unix sockets too, unless what it names is
	// of the node, as a PID is.
	OverTCP bool
}

// BrokerConfig is what ListenBroker needs. Agent, TrustDomain, Brokers and one of
// Socket, Address and Listener are required.
type BrokerConfig struct {
	// Socket is the path of a Unix socket, as Config has it. A missing parent
	// directory is made, mode 0700; one that others than its group may write to
	// is refused. The socket has mode 0770.
	Socket string
	// Apart is the path of the Workload API's socket, in whose directory, or
	// below, the socket is not made: that is mounted into pods.
	Apart string
	// Address, where there is no Socket, is the host:port to listen at over TCP.
	Address string
	// Listener is as in Config, at Socket or at Address.
	Listener net.Listener

	Agent       BrokerAgent
	TrustDomain spiffeid.TrustDomain
	Attestors   []attestor.Workload
	Brokers     []Broker

	Metrics *telemetry.Metrics
	Log     hclog.Logger // nil: no log
}

// ListenBroker makes a server of the SPIFFE Broker Endpoint, as Listen does that
// of the Workload API. There, whoever proves by mutual TLS that it is one of the
// brokers has the identities of workloads that it names.
func ListenBroker(cfg BrokerConfig) (*Server, error) {
	if cfg.Agent == nil {
		return nil, errors.New("listen: no agent given")
	}
	d, err := newDoor(&cfg)
	if err != nil {
		return nil, err
	}
	if d.local = cfg.Socket != ""; !d.local && cfg.Listener == nil {
		if cfg.Listener, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", cfg.Address); err != nil {
			return nil, fmt.Errorf("listen for brokers: %w", err)
		}
	}
	s, err := newServer(&Config{
		Socket: cfg.Socket, Listener: cfg.Listener, Agent: cfg.Agent, Attestors: cfg.Attestors,
		Limits: brokerLimits(), Log: cfg.Log, door: d,
	}, func(addr string) (*socket.Listener, error) { return listenPrivate(addr, cfg.Apart) })
	if err != nil {
		if cfg.Listener != nil {
			err = errors.Join(err, cfg.Listener.Close())
		}
		return nil, err
	}
	d.open(s)
	services := registrar{s.grpc, s}
	broker.RegisterAPIServer(services, newBrokerAPI(s))
	s.complete(services, cfg.Metrics, brokerMetrics, broker.API_ServiceDesc.ServiceName)
	return s, nil
}

// brokerLimits are for few brokers, which the operator chose, of which one may
// hold streams for each workload of the node on one connection. A stream takes a
// file.
func brokerLimits() Limits {
	streams := min(8192, openFiles()/8)
	return Limits{
		Connections: 256, ConnectionsPerUID: 64, Streams: streams,
		StreamsPerUID: cmp.Or(streams/2, 1), StreamsPerConnection: cmp.Or(streams/2, 1),
	}
}

var brokerMetrics = meterNames{
	streams: func(m *telemetry.Metrics) *telemetry.Family[telemetry.Gauge] {
		return m.Gauge("narthex_broker_streams", "Open streams of brokers.", "method")
	},
	requests: func(m *telemetry.Metrics) *telemetry.Family[telemetry.Counter] {
		return m.Counter("narthex_broker_requests_total", "Calls of brokers that have ended.", "method", "code")
	},
}

func isBrokerAPI(method string) bool {
	return strings.HasPrefix(method, "/"+broker.API_ServiceDesc.ServiceName+"/")
}
