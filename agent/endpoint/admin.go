package endpoint

import (
	"crypto/x509"
	"errors"
	"net"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/socket"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// AdminAgent is what the admin socket needs of the agent.
type AdminAgent interface {
	Agent
	// WatchBundles watches the bundles of all trust domains.
	WatchBundles() *registry.Watch
	// Matching returns the entries that a process with these selectors
	// matches, and Nearest those that it fails to match by least.
	Matching(selectors []attestor.Selector) []registry.Match
	Nearest(selectors []attestor.Selector, n int) []registry.Near
	// SVID returns the agent's own, leaf first; none until it is attested.
	SVID() []*x509.Certificate
	Status() *telemetry.AgentStatus
	// JWTSVIDs returns how many JWT-SVIDs are held.
	JWTSVIDs() int
}

// AdminConfig is what ListenAdmin needs. Agent, TrustDomain, Log and one of
// Socket and Listener are required.
type AdminConfig struct {
	// Socket is the path of the Unix socket, as Config has it. A missing parent
	// directory is made, mode 0700; one that others than its group may write to
	// is refused. The socket has mode 0770: whoever may reach it may ask for
	// what the agent is doing and change the level of its log.
	Socket string
	// Apart is the path of the Workload API's socket, in whose directory, or
	// below, the admin socket is not made: that is mounted into pods.
	Apart string
	// Listener is as in Config.
	Listener net.Listener

	Agent       AdminAgent
	TrustDomain spiffeid.TrustDomain
	Attestors   []attestor.Workload
	// Delegates are the SPIFFE IDs of processes that may ask for the identities
	// of others. With none, nobody may.
	Delegates []spiffeid.ID

	Metrics *telemetry.Metrics
	Log     hclog.Logger // whose level the logger service changes, for all that are made of it
}

// ListenAdmin makes the server of the admin socket, as Listen does that of the
// Workload API.
func ListenAdmin(cfg AdminConfig) (*Server, error) {
	if cfg.Log == nil {
		return nil, errors.New("listen: no log given")
	}
	s, err := newServer(&Config{
		Socket: cfg.Socket, Listener: cfg.Listener, Agent: cfg.Agent, Attestors: cfg.Attestors,
		Limits: adminLimits(), Log: cfg.Log.Named("admin"),
	}, func(addr string) (*socket.Listener, error) { return listenPrivate(addr, cfg.Apart) })
	if err != nil {
		return nil, err
	}
	services := registrar{s.grpc, s}
	delegatedidentityv1.RegisterDelegatedIdentityServer(services, newDelegatedIdentity(s, &cfg))
	debugv1.RegisterDebugServer(services, newDebugInfo(&cfg))
	loggerv1.RegisterLoggerServer(services, newLevels(cfg.Log))
	services.RegisterService(&explainService, &explainer{server: s, agent: cfg.Agent})
	s.complete(services, cfg.Metrics, adminMetrics, delegatedidentityv1.DelegatedIdentity_ServiceDesc.ServiceName,
		debugv1.Debug_ServiceDesc.ServiceName, loggerv1.Logger_ServiceDesc.ServiceName, explainService.ServiceName)
	return s, nil
}

// adminLimits are for few processes, which the operator chose, of which one may
// hold a stream for each workload of the node. A stream can take a file.
func adminLimits() Limits {
	streams := min(8192, openFiles()/8)
	return Limits{
		Connections: 256, ConnectionsPerUID: 256, Streams: streams, StreamsPerUID: streams, StreamsPerConnection: streams,
		HouseShare: 1,
	}
}

var adminMetrics = meterNames{
	streams: func(m *telemetry.Metrics) *telemetry.Family[telemetry.Gauge] {
		return m.Gauge("narthex_admin_streams", "Open streams of delegates.", "method")
	},
	requests: func(m *telemetry.Metrics) *telemetry.Family[telemetry.Counter] {
		return m.Counter("narthex_admin_requests_total", "Calls on the admin socket that have ended.", "method", "code")
	},
}
