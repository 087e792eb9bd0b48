package config

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// The comments in this file are the documentation of the keys: docs/configuration.md
// and docs/narthex.schema.json are made from them. The struct tags are read by the
// decoder and by both generators:
//
//	yaml      the key
//	default   the value of a key left out, in YAML
//	required  "true": the key must be there
//	enum      the allowed values, separated by |
//	min, max  bounds of a number or duration, inclusive
//	oneof     "true": exactly one of the block's keys must be there
//	empty     "true": the list may be empty where it is given
//	example   a value for the reference

// Config is narthex.yaml. Relative paths in it are relative to the directory
// of the file itself.
type Config struct {
	// The SPIFFE trust domain this node belongs to. The agent needs it; a proxy alone takes it from its SVID.
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain" example:"example.org"`
	// Where the agent keeps its own key, its SVID and the bundle, and the proxy, in `proxy` beneath it, the rules that were last in force. Made with mode 0700 when it is not there; only one agent may use it. A proxy alone keeps something only where this is written.
	DataDir File `yaml:"data_dir" default:"/var/lib/narthex"`
	// Runs both halves on Go's FIPS 140-3 module: TLS offers approved algorithms only (no ChaCha20, no plain X25519), and nothing starts where the module cannot be had. `narthex version` names it.
	FIPS bool `yaml:"fips" default:"false"`
	// The agent: it attests this node to SPIRE Server and serves the SPIFFE Workload API.
	Agent *Agent `yaml:"agent"`
	// The proxy: it ends and begins mTLS for local services and decides by SPIFFE ID.
	Proxy *Proxy `yaml:"proxy"`
	// What is shown over HTTP: metrics, status and health.
	Telemetry Telemetry `yaml:"telemetry"`
	// One record for each connection.
	AccessLog AccessLog `yaml:"access_log"`
	// What the program says of itself, on standard error.
	Log Log `yaml:"log"`

	// Warnings are what is allowed and still worth a second look. They are to
	// be logged once at start; none of them keeps the program from running.
	Warnings []Finding `yaml:"-"`

	file string
	pos  positions
}

// Agent is the agent's half.
type Agent struct {
	// The SPIRE Server this agent pairs with.
	Server Server `yaml:"server" required:"true"`
	// How this node proves what it is, once, before it has an SVID. Exactly one kind.
	NodeAttestor NodeAttestor `yaml:"node_attestor" required:"true" oneof:"true"`
	// Where the private key of the agent's own SVID lives. Exactly one kind. Workload keys are never written anywhere.
	KeyManager KeyManager `yaml:"key_manager" default:"{disk: {}}" oneof:"true"`
	// Goes on as the spire-agent that was here before, without attesting anew: its SVID, key and bundle are taken over once, while data_dir has no state of our own yet. Left out: they are not looked for.
	TakeOver *TakeOver `yaml:"take_over"`
	// What is found out about a process that asks for its identity.
	WorkloadAttestors WorkloadAttestors `yaml:"workload_attestors" default:"{unix: {}}"`
	// The socket on which workloads ask.
	WorkloadAPI ServedWorkloadAPI `yaml:"workload_api"`
	// How Envoys are served, which ask on the same socket.
	SDS SDS `yaml:"sds"`
	// The socket on which `narthex explain` and `narthex logger` ask, and processes that may have the identities of others. Left out: there is none.
	Admin *Admin `yaml:"admin"`
	// The SPIFFE Broker API, on which those named here have the identities of other processes of the node. Left out: there is none.
	Broker *Broker `yaml:"broker"`
	// The SVIDs the agent fetches for workloads.
	SVID SVID `yaml:"svid"`
	// How entries are kept up to date.
	Sync Sync `yaml:"sync"`
}

// Server is the SPIRE Server and how it is trusted the first time.
type Server struct {
	// host:port of the server. A name is resolved again when the connection breaks; several addresses are used in turn.
	Address Address `yaml:"address" required:"true" example:"spire-server:8081"`
	// The certificates that authenticate the server the first time. Later the bundle in data_dir is used, which the server keeps current.
	Bundle *ServerBundle `yaml:"bundle"`
	// What to do about a server that the bundle in data_dir does not authenticate any more.
	Rebootstrap Rebootstrap `yaml:"rebootstrap"`
	// Trusts whoever answers the first time. For trying things out: an attacker on the path becomes the server.
	InsecureBootstrap bool `yaml:"insecure_bootstrap" default:"false"`
	// Refuses a server that does not offer a post-quantum key exchange (X25519MLKEM768).
	RequirePQKEM bool `yaml:"require_pq_kem" default:"false"`
}

// ServerBundle says where the bootstrap bundle is: file, url or unix_socket. It
// is read at each attempt, 1 MiB at most, within 10 s.
type ServerBundle struct {
	// A file of CA certificates. An agent that waits for a good one goes on when it is replaced.
	File File `yaml:"file" example:"/run/spire/bundle.crt"`
	// An https:// address to download it from, whose certificate the system's authorities must have signed. With unix_socket: an http:// address that is asked for there.
	URL string `yaml:"url" example:"https://trust.example.org/bundle.crt"`
	// A Unix socket on which HTTP is spoken. Who answers is told by parameters of the address what the bundle is for, as by spire-agent.
	UnixSocket Socket `yaml:"unix_socket" example:"/run/spire/bundle.sock"`
	// What it is: pem (as `spire-server bundle show` prints it) or spiffe (a JWK set: `-format spiffe`).
	Format string `yaml:"format" default:"pem" enum:"pem|spiffe"`
}

// Rebootstrap says when the agent forgets the bundle in data_dir and its SVID,
// and begins again with agent.server.bundle.
type Rebootstrap struct {
	// never; auto: where the node can attest again; always: as auto, and the agent ends where it cannot.
	Mode string `yaml:"mode" default:"never" enum:"never|auto|always"`
	// For how long no server must have been authenticated by the bundle in data_dir. Whoever can be in the server's place for so long, and can change what agent.server.bundle names, becomes the server.
	Delay Duration `yaml:"delay" default:"10m" min:"0s" max:"8760h"`
}

// NodeAttestor holds exactly one kind.
type NodeAttestor struct {
	// A token of `spire-server token generate`; good once, so a node that loses its data_dir needs a new one.
	JoinToken *JoinToken `yaml:"join_token"`
	// A certificate that the server was told to trust, and its key. The node can attest again at any time.
	X509PoP *X509PoP `yaml:"x509pop"`
	// The service account token of the agent's pod, which the server has reviewed by the cluster. The node can attest again at any time.
	K8sPSAT *K8sPSAT `yaml:"k8s_psat"`
}

// JoinToken holds one of its two keys.
type JoinToken struct {
	// A file with the token. It is read when the agent attests, and not needed afterwards.
	TokenFile File `yaml:"token_file" example:"/run/spire/join-token"`
	// The token itself. Prefer token_file: whoever can read this file can be this node.
	Token Secret `yaml:"token"`
}

// X509PoP names PEM files.
type X509PoP struct {
	// The private key, PEM.
	Key File `yaml:"key" required:"true" example:"/etc/narthex/node.key"`
	// The certificate, PEM; intermediates may follow it.
	Certificate File `yaml:"certificate" required:"true" example:"/etc/narthex/node.crt"`
	// Intermediate certificates, PEM, where they are in a file of their own.
	Intermediates File `yaml:"intermediates" example:"/etc/narthex/intermediates.crt"`
}

// K8sPSAT names the cluster and the token.
type K8sPSAT struct {
	// The cluster's name in the configuration of the server's k8s_psat plugin.
	Cluster string `yaml:"cluster" required:"true" example:"demo"`
	// The file of a projected serviceAccountToken, whose audience is one the server asks for (spire-server unless it is told otherwise). It is read each time the agent attests.
	Token File `yaml:"token" default:"/var/run/secrets/tokens/spire-agent"`
}

// KeyManager holds exactly one kind.
type KeyManager struct {
	// In data_dir, mode 0600: a restarted agent goes on with the SVID it has.
	Disk *Empty `yaml:"disk"`
	// In memory only: a restarted agent attests again, so not with join_token.
	Memory *Empty `yaml:"memory"`
}

// TakeOver names what a spire-agent has left. It is read and never changed.
// While that agent runs, ours does not start: two with one identity evict each
// other.
type TakeOver struct {
	// Its data_dir, with agent-data.json. One that is not there, or empty, is a node that never had a spire-agent.
	DataDir File `yaml:"data_dir" required:"true" example:"/opt/spire/data/agent"`
	// The directory of its KeyManager "disk", with keys.json. Left out: data_dir.
	Keys File `yaml:"keys" example:"/opt/spire/keys"`
}

// Empty is a block without keys: {}.
type Empty struct{}

// WorkloadAttestors holds the attestors that are on. All of them look at each
// caller, side by side.
type WorkloadAttestors struct {
	// Selectors unix:uid, unix:user, unix:gid, unix:group, unix:supplementary_gid and unix:supplementary_group, from the kernel.
	Unix *UnixAttestor `yaml:"unix"`
	// Selectors k8s:ns, k8s:sa, k8s:pod-label and others of the caller's pod and container, from the kubelet of this node. Callers outside of pods have none.
	K8s *K8sAttestor `yaml:"k8s"`
}

// UnixAttestor configures the unix workload attestor.
type UnixAttestor struct {
	// Adds unix:sha256 of the caller's executable, and unix:path where that path names the same file on the host.
	DiscoverWorkloadPath bool `yaml:"discover_workload_path" default:"false"`
	// The largest executable to hash, in bytes; attestation of a larger one fails. 0: 512 MiB. -1: no unix:sha256 at all.
	WorkloadSizeLimit int64 `yaml:"workload_size_limit" default:"0" min:"-1"`
}

// K8sAttestor configures the k8s workload attestor.
type K8sAttestor struct {
	// The environment variable with this node's name (spec.nodeName). Pods that the kubelet lists for another node are not believed, and the name is where the kubelet is reached when no host is said. Left out: it is not compared. A variable that is not set is an error.
	NodeNameEnv string `yaml:"node_name_env" example:"NODE_NAME"`
	// Where the kubelet is, and how both sides prove who they are.
	Kubelet Kubelet `yaml:"kubelet"`
	// Also gives the selectors of the container (k8s:container-name, k8s:container-image), for which callers wait until the kubelet has seen it run. false: those of the pod alone, at once.
	Containers bool `yaml:"containers" default:"true"`
	// Verifies who signed the image of the caller's container with cosign, for the selectors k8s:image-signature and k8s:image-attestations. With it, a caller whose image has no valid signature gets nothing from this attestor. Left out: images are not looked at.
	Sigstore *Sigstore `yaml:"sigstore"`
}

// Sigstore configures the verification of image signatures. They are read
// from the registry that the image was pulled from.
type Sigstore struct {
	// The certificates of Fulcio and the keys of Rekor and the CT logs: a trusted_root.json, which `cosign trusted-root create` writes. Read again when it changes.
	TrustedRoot File `yaml:"trusted_root" required:"true" example:"/etc/narthex/trusted_root.json"`
	// Who may sign. Left out: anybody that the trusted root's authorities have given a certificate, which for the public ones is everybody. A text with one of `*+?^${}[]|()` is a regular expression (RE2), which matches anywhere in the name unless it has ^ and $.
	AllowedIdentities []SigstoreIdentity `yaml:"allowed_identities"`
	// Image IDs, as the kubelet has them (name@sha256:…), that are not verified and have no selectors of signatures.
	SkippedImages []string `yaml:"skipped_images" example:"[registry.k8s.io/pause@sha256:7031c1b283388d2c2e09b57badb803c05ebed362dc88d84b480cc47f72a21097]"`
	// Gives callers whose image has no valid signature the other selectors of this attestor. Entries that want one then have to name it: k8s:image-signature:verified.
	AllowUnsigned bool `yaml:"allow_unsigned" default:"false"`
	// Accepts certificates that no CT log has promised to publish.
	IgnoreSCT bool `yaml:"ignore_sct" default:"false"`
	// Accepts signatures that no transparency log has recorded. They count as long as their certificate is valid, which for Fulcio's is ten minutes.
	IgnoreTlog bool `yaml:"ignore_tlog" default:"false"`
	// Does not look for attestations; k8s:image-attestations:verified is never there.
	IgnoreAttestations bool `yaml:"ignore_attestations" default:"false"`
	// Registries that need more than their name.
	Registries []SigstoreRegistry `yaml:"registries"`
}

// SigstoreIdentity is an issuer and those of its subjects who may sign.
type SigstoreIdentity struct {
	// The OIDC issuer.
	Issuer string `yaml:"issuer" required:"true" example:"https://token.actions.githubusercontent.com"`
	// Mail addresses or URIs.
	Subjects []string `yaml:"subjects" required:"true" example:"[^https://github\\.com/example/app/\\.github/workflows/release\\.yml@refs/heads/main$]"`
}

// SigstoreRegistry is how one registry is asked.
type SigstoreRegistry struct {
	// Its name as images have it: host or host:port.
	Host string `yaml:"host" required:"true" example:"ghcr.io"`
	// The user to ask as. With password; left out: nobody.
	Username string `yaml:"username" example:"robot"`
	// A file with the password or token. Read at each verification.
	Password File `yaml:"password" example:"/run/secrets/ghcr"`
	// The host, or host:port, of the server that gives out its tokens, where that is not the registry itself. The password is sent nowhere else. Docker Hub's and GitLab's are known.
	TokenHost string `yaml:"token_host" example:"auth.example.org"`
	// The CAs that may have signed its certificate, PEM, instead of the system's.
	CA File `yaml:"ca" example:"/etc/narthex/registry-ca.crt"`
	// Asks without TLS. Whoever is on the path can withhold signatures and cannot make any.
	PlainHTTP bool `yaml:"plain_http" default:"false"`
}

// Kubelet is the kubelet of this node. Credentials are read again each minute,
// and at once when the kubelet refuses them.
type Kubelet struct {
	// Its name or address. Left out: that of host_env, else the node's name, else 127.0.0.1. On a loopback address the certificate is verified, and not the name in it.
	Host string `yaml:"host" example:"127.0.0.1"`
	// The environment variable with its name or address (status.hostIP). One that is not set is an error.
	HostEnv string `yaml:"host_env" example:"NODE_IP"`
	// Its port. 0: 10250, or 10255 with read_only.
	Port int `yaml:"port" default:"0" min:"0" max:"65535"`
	// The read-only port: plain HTTP, where nobody proves anything. Few kubelets have it open.
	ReadOnly bool `yaml:"read_only" default:"false"`
	// The certificates that may have signed the kubelet's, PEM. A kubelet signs its own unless serverTLSBootstrap is set.
	CA File `yaml:"ca" default:"/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"`
	// Believes whoever answers there. What the kubelet says decides who gets which identity.
	SkipVerification bool `yaml:"skip_verification" default:"false"`
	// The bearer token it is asked with, for the API server's audience. Not used with certificate.
	Token File `yaml:"token" default:"/var/run/secrets/kubernetes.io/serviceaccount/token"`
	// A client certificate instead, PEM.
	Certificate File `yaml:"certificate" example:"/etc/narthex/kubelet-client.crt"`
	// The key of certificate, PEM.
	Key File `yaml:"key" example:"/etc/narthex/kubelet-client.key"`
}

// ServedWorkloadAPI is the Workload API that the agent serves.
type ServedWorkloadAPI struct {
	// Absolute path of the Unix socket, at most 107 bytes.
	Socket Socket `yaml:"socket" default:"/run/narthex/public/api.sock"`
	// Gives this trust domain's bundles to processes without an identity as well, and validates its JWT-SVIDs for them.
	AllowUnauthenticatedVerifiers bool `yaml:"allow_unauthenticated_verifiers" default:"false"`
	// The claims that ValidateJWTSVID tells of a JWT-SVID of another trust domain, beside sub, exp and aud: what others put into their tokens is theirs to choose.
	AllowedForeignJWTClaims []string `yaml:"allowed_foreign_jwt_claims" example:"[iss, iat]"`
}

// WorkloadAPI is the Workload API that the proxy is a client of.
type WorkloadAPI struct {
	// Absolute path of the Unix socket, at most 107 bytes. The proxy takes the agent's where the file has both halves and this is left out.
	Socket Socket `yaml:"socket" default:"/run/narthex/public/api.sock"`
}

// SDS configures Envoy's secret discovery service. Its keys are those of
// spire-agent.
type SDS struct {
	// The resource name of a caller's first SVID, in the order of entry IDs.
	DefaultSVIDName string `yaml:"default_svid_name" default:"default"`
	// The resource name of the trust domain's own bundle.
	DefaultBundleName string `yaml:"default_bundle_name" default:"ROOTCA"`
	// The resource name of all bundles that the caller may verify peers with: its own and those of federated trust domains.
	DefaultAllBundlesName string `yaml:"default_all_bundles_name" default:"ALL"`
	// Sends bundles as a plain trusted_ca rather than for Envoy's SPIFFE validator. An Envoy may say otherwise in its node's metadata. Then there is no resource of all bundles.
	DisableSPIFFECertValidation bool `yaml:"disable_spiffe_cert_validation" default:"false"`
}

// Admin is the admin socket. Whoever can connect to it may see what the agent is
// doing and change the level of its log.
type Admin struct {
	// Absolute path of the Unix socket, at most 107 bytes, outside of the Workload API's directory, which is shown to workloads. Its mode is 0770. A directory that is missing is made with mode 0700; one that everybody may write to is refused.
	Socket Socket `yaml:"socket" default:"/run/narthex/private/admin.sock"`
	// The SPIFFE IDs of local processes that may have the identity of any process of this node, by the Delegated Identity API. Left out: nobody may.
	AuthorizedDelegates []spiffeid.ID `yaml:"authorized_delegates" empty:"true" example:"[spiffe://example.org/ns/mesh/sa/node-proxy]"`
}

// Broker is the SPIFFE Broker Endpoint: mutual TLS, at which the agent shows its
// own SVID.
type Broker struct {
	// Absolute path of a Unix socket, at most 107 bytes, outside of the Workload API's directory, which is shown to workloads. Its mode is 0770. A directory that is missing is made with mode 0700; one that everybody may write to is refused. socket, listen or both are needed.
	Socket Socket `yaml:"socket" example:"/run/narthex/broker/broker.sock"`
	// host:port to listen at over TCP, where references to what is of this node, as PIDs, are refused.
	Listen Address `yaml:"listen" example:"0.0.0.0:8443"`
	// Who may ask. Everybody else is refused.
	Brokers []AllowedBroker `yaml:"brokers" required:"true"`
}

// AllowedBroker is one who may have the identities of others.
type AllowedBroker struct {
	// Its SPIFFE ID, of this trust domain.
	ID spiffeid.ID `yaml:"id" required:"true" example:"spiffe://example.org/ns/mesh/sa/node-proxy"`
	// The types of references by which it may name a workload.
	References []BrokerReference `yaml:"references" required:"true"`
}

// BrokerReference is a type of references to workloads.
type BrokerReference struct {
	// The type URL of its protobuf message, or `*` for every type that this agent knows.
	TypeURL string `yaml:"type_url" required:"true" example:"type.googleapis.com/spiffe.broker.WorkloadPIDReference"`
	// Allows it over TCP too. A PID is refused there whatever is said: it means another process on every node.
	AllowOverTCP bool `yaml:"allow_over_tcp" default:"false"`
}

// SVID configures the SVIDs that workloads get.
type SVID struct {
	// The kind of key made for each workload SVID.
	KeyType string `yaml:"key_type" default:"ec-p256" enum:"ec-p256|ec-p384|rsa-2048"`
	// Renews SVIDs early enough to outlast an absent server for this long: 0s (off, renewal at half of the lifetime) or at least 24h.
	AvailabilityTarget Duration `yaml:"availability_target" default:"0s" min:"0s" max:"8760h"`
	// How many X.509-SVIDs are signed ahead of anyone asking. What is asked for is always held.
	X509Cache int `yaml:"x509_cache" default:"1000" min:"1" max:"1000000"`
	// How many JWT-SVIDs and WIT-SVIDs are kept for whoever asks for the same next. Those asked for last are.
	JWTCache int `yaml:"jwt_cache" default:"1000" min:"1" max:"1000000"`
}

// Sync configures the loop that asks the server for entries.
type Sync struct {
	// Time between two syncs, give or take some jitter.
	Interval Duration `yaml:"interval" default:"5s" min:"100ms" max:"1h"`
}

// Proxy is the proxy's half.
type Proxy struct {
	// Where the proxy's own identities come from: a Workload API (this agent's, or a stock spire-agent's) or PEM files.
	Source string `yaml:"source" default:"workload_api" enum:"workload_api|files"`
	// The Workload API, for source: workload_api.
	WorkloadAPI *WorkloadAPI `yaml:"workload_api"`
	// The files, for source: files. They are read again when they change.
	Files *Files `yaml:"files"`
	// Certificate revocation lists, DER or PEM, by the trust domain whose certificates they speak of: files, or patterns of them (*, ? and [a-z] within one directory). They are read again when they change. While those of a domain were never good, nobody of it comes in; past a CRL's nextUpdate, no new connection that it would have to speak of.
	CRLs map[spiffeid.TrustDomain][]File `yaml:"crls" example:"{example.org: [/etc/narthex/crls/*.pem]}"`
	// The user the proxy process becomes when `narthex run` is started by root; not used when it is started by anybody else. It must be able to read this file and the policies, and be another than root.
	User string `yaml:"user" example:"narthex"`
	// Whether the proxy's process gives up what it does not need once it is set up: privileges, files outside the directories named here, and system calls. off is for finding out whether the sandbox is why something fails; it warns.
	Sandbox string `yaml:"sandbox" default:"on" enum:"on|off"`
	// Rule files, or patterns of them (*, ? and [a-z] within one directory). All of them form one policy. What no rule allows is refused.
	Policies []File `yaml:"policies" required:"true" example:"[/etc/narthex/policies/*.yaml]"`
	// Lets a newer process take this one's place without losing a connection. Left out: it cannot. Not needed under `narthex run`.
	Handover *Handover `yaml:"handover"`
	// The most live connections of all listeners together; more wait in the kernel's queue. Each takes two open files of the process. 0: as many as the hard limit of open files leaves room for, which is logged at start.
	MaxConnections int `yaml:"max_connections" default:"0" min:"0" max:"10000000"`
	// What the proxy listens on. [] is a proxy that waits for its first listener, which a reload can bring: for nodes whose listeners come and go. Until then it is ready without an identity, and rule files need not be there.
	Listeners []Listener `yaml:"listeners" required:"true" empty:"true"`
	// Where Envoy asks whether a request may go on (envoy.service.auth.v3.Authorization over gRPC), decided by the same rules.
	ExtAuthz []ExtAuthz `yaml:"ext_authz"`
}

// ExtAuthz is one place at which Envoy asks. What it says of a request is
// believed, so that nobody else may.
type ExtAuthz struct {
	// Its name in rules (`on`), logs and metrics, as that of a listener, and unique among those too.
	Name string `yaml:"name" required:"true" example:"envoy-orders"`
	// Where it listens: unix:/path, or host:port, where mTLS is spoken.
	Bind Address `yaml:"bind" required:"true" example:"unix:/run/narthex/authz.sock"`
	// Who may ask over mTLS: SPIFFE IDs, or patterns of them as in rules. Required with host:port; on a Unix socket mode says who may.
	Clients []IDPattern `yaml:"clients" example:"[\"spiffe://example.org/ns/istio/sa/gateway\"]"`
	// The permissions of the Unix socket, in octal: who may connect may ask. Left out: 0660.
	Mode SocketMode `yaml:"mode" example:"\"0660\""`
	// Which of our SVIDs is presented over mTLS. Left out: the first (the default identity).
	Identity *ListenerIdentity `yaml:"identity" oneof:"true"`
	// enforce: what the rules refuse is refused. audit: it passes, and is logged and counted as would_deny; limits and `revoked` are enforced all the same.
	Enforcement string `yaml:"enforcement" default:"enforce" enum:"enforce|audit"`
}

// Files are PEM files that other tools write: cert-manager, spiffe-helper,
// Vault agent, openssl.
type Files struct {
	// The X.509-SVID, leaf first, then intermediates.
	Cert File `yaml:"cert" required:"true" example:"svid.pem"`
	// Its private key: PKCS#8, SEC 1 or PKCS#1.
	Key File `yaml:"key" required:"true" example:"svid.key"`
	// The bundle of the SVID's own trust domain.
	Bundle File `yaml:"bundle" required:"true" example:"bundle.pem"`
	// The bundles of other trust domains, by their names. A bundle speaks for its own domain alone.
	Bundles map[spiffeid.TrustDomain]File `yaml:"bundles" example:"{partner.example: partner.pem}"`
}

// Handover is how a newer proxy takes the place of the one that runs.
type Handover struct {
	// Absolute path of a Unix socket, at most 107 bytes, which the proxy makes with mode 0600. A proxy that starts with the same path takes over the sockets of the one that listens there; only processes of the same user, and root, can.
	Socket Socket `yaml:"socket" required:"true" example:"/run/narthex/handover/proxy.sock"`
}

// Listener is one way in or out.
type Listener struct {
	// Its name in rules (`on`), logs and metrics: letters, digits, dot, dash and underscore, at most 63. Unique.
	Name string `yaml:"name" required:"true" example:"inventory"`
	// inbound: mTLS in, plaintext to the local service. outbound: plaintext in from a local caller, mTLS out.
	Direction string `yaml:"direction" required:"true" enum:"inbound|outbound"`
	// Where it listens: host:port, :port or unix:/path. Port 0 takes a free one.
	Bind Address `yaml:"bind" required:"true" example:"0.0.0.0:8443"`
	// Where it connects to: host:port or unix:/path, or a list of at most 64 of them. Inbound, prefer a socket that nobody else can dial. Required where there are no routes.
	Target Targets `yaml:"target" example:"127.0.0.1:8080"`
	// Inbound only: other targets, by what the client asks for. The first route that matches wins; what none matches goes to target, or is refused where there is none.
	Routes []Route `yaml:"routes"`
	// Protocols of TLS's ALPN, the preferred first. Inbound those that are accepted, before those of routes; a client that offers only others is refused, one that offers none is not. Outbound those that are offered. With protocol: http inbound alone, and only what http.versions names (http/1.0 with http/1.1); left out: all of it.
	ALPN []string `yaml:"alpn" example:"[h2, http/1.1]"`
	// Outbound only: the server name (SNI) that is asked for. Left out: the host of target, if it is a name.
	ServerName ServerName `yaml:"server_name" example:"inventory.example.org"`
	// What is carried. tcp: bytes, decided once a connection and asked again when the policy changes. http: HTTP/1.1 and HTTP/2, of which each request is decided by method, host, path and headers too, gRPC calls among them; WebSocket and other upgrades are decided by the request that begins them.
	Protocol string `yaml:"protocol" default:"tcp" enum:"tcp|http" meant:"grpc=http|h2=http|h2c=http|tls=tcp"`
	// With protocol: http and inbound, what the service is told of who calls. Left out: nothing, and what clients say of it is stripped all the same.
	IdentityHeader *IdentityHeader `yaml:"identity_header"`
	// With protocol: http, how requests are read and what goes with them.
	HTTP HTTP `yaml:"http"`
	// Which of our SVIDs is presented. Left out: the first (the default identity).
	Identity *ListenerIdentity `yaml:"identity" oneof:"true"`
	// Outbound only, and required there: the SPIFFE IDs the peer may have. The address is never the proof.
	Expect []spiffeid.ID `yaml:"expect" example:"[\"spiffe://example.org/ns/shop/sa/inventory\"]"`
	// Whose connection it is, where other proxies stand before or behind the listener.
	ProxyProtocol ProxyProtocol `yaml:"proxy_protocol"`
	// Inbound only. strict: mTLS alone. permissive: plaintext too, which rules know as `unauthenticated`, counted by its source; for moving a service over. A client that speaks TLS is held to it either way.
	Mode string `yaml:"mode" default:"strict" enum:"strict|permissive"`
	// enforce: what the rules refuse is refused. audit: it passes, and is logged and counted as would_deny; TLS, `expect`, limits and `revoked` are enforced all the same.
	Enforcement string `yaml:"enforcement" default:"enforce" enum:"enforce|audit"`
	// How one of the targets' addresses is chosen, and which of them are left out.
	Upstream Upstream `yaml:"upstream"`
	// How long things may take.
	Timeouts Timeouts `yaml:"timeouts"`
	// What happens to live connections that a new policy refuses: closed at once, given the drain timeout, or kept. Revoked identities are always closed.
	OnPolicyChange string `yaml:"on_policy_change" default:"close" enum:"close|drain|keep"`
	// What happens to live connections when the peer's SVID ends: closed at once, given the drain timeout, or kept. Left out: keep, with protocol: http drain.
	OnPeerExpiry string `yaml:"on_peer_expiry" enum:"close|drain|keep"`
	// The longest life of a connection, after which it is closed. 0s: no limit.
	MaxAge Duration `yaml:"max_age" default:"0s" min:"0s" max:"8760h"`
	// The most live connections at a time; more wait in the kernel's queue. 0: the default. Each takes two open files of the process.
	MaxConnections int `yaml:"max_connections" default:"10000" min:"0" max:"10000000"`
	// The most live connections of one peer here: of one SPIFFE ID, or, in plaintext, of one address (one IPv6 network of 64 bits). What is beyond is refused. 0: no limit.
	MaxConnectionsPerIdentity int `yaml:"max_connections_per_identity" default:"0" min:"0" max:"10000000"`
}

// IdentityHeader tells a service who calls. Every copy of these headers that a
// client sends goes, in any case, with _ for -, listed in Connection, or as a
// trailer.
type IdentityHeader struct {
	// The header that holds the peer's SPIFFE ID. A client in plaintext has none, and it is left out.
	Name string `yaml:"name" default:"x-spiffe-id" example:"x-spiffe-id"`
	// Envoy's x-forwarded-client-cert. off: none. sanitize: ours alone. append: ours behind the client's, forward: the client's as it is; both for peers in trusted only, and sanitize for all others.
	XFCC string `yaml:"xfcc" default:"off" enum:"off|sanitize|append|forward"`
	// Peers whose x-forwarded-client-cert is believed: proxies that have authenticated their own clients.
	Trusted []spiffeid.ID `yaml:"trusted" example:"[\"spiffe://example.org/ns/edge/sa/gateway\"]"`
}

// HTTP is how requests are read and what goes with them.
type HTTP struct {
	// What the services behind take literally in a path, and so may stand in one: encoded_slash (%2F within a segment), empty_segments (//). Safe only where no service decodes or merges them.
	Literal []PathLiteral `yaml:"literal" example:"[encoded_slash]"`
	// What becomes of x-forwarded-for, -proto, -host, -port and forwarded. replace: what the client sends goes, ours are set. append: ours come behind the client's. off: they are passed on as they are.
	Forwarded string `yaml:"forwarded" default:"replace" enum:"replace|append|off"`
	// The header with the request's id, which log and refusals name too. One is made where the client sends none that can stand in a log.
	RequestID string `yaml:"request_id" default:"x-request-id" example:"x-request-id"`
	// JWT-SVIDs: inbound they are validated as a second proof, outbound attached.
	JWT *JWT `yaml:"jwt"`
	// What clients may speak, the preferred first: h2 (HTTP/2, and gRPC with it) and http/1.1, with which goes HTTP/1.0. Over mTLS it is negotiated by ALPN, and a client that offers nothing there speaks HTTP/1.1; in plaintext HTTP/2 is recognised by its first bytes (prior knowledge).
	Versions []HTTPVersion `yaml:"versions" default:"[h2, http/1.1]" example:"[http/1.1]"`
	// The most requests of one connection of HTTP/2 at a time; a client keeps further ones back.
	MaxStreams int `yaml:"max_streams" default:"250" min:"1" max:"1000"`
	// The largest body of a request in bytes, its chunks included. 413 beyond. 0: no bound; bodies are never held in memory.
	MaxBody int `yaml:"max_body" default:"0" min:"0" max:"9007199254740992"`
	// Requests that no service has answered are sent to another endpoint, where they are idempotent (GET, HEAD, OPTIONS, PUT, DELETE), their whole body is there, and not too many are.
	Retries Retries `yaml:"retries"`
}

// JWT says what JWT-SVIDs are for.
type JWT struct {
	// Inbound: whom the token must be for; one of these must be in its aud. Outbound: the one audience of the token that is attached, in authorization: Bearer.
	Audience []string `yaml:"audience" required:"true" example:"[spiffe://example.org/ns/shop/sa/orders]"`
	// Inbound: whether a request without one is refused (401) whatever the rules say. A token that is sent is validated either way.
	Required bool `yaml:"required" default:"false"`
}

// Retries bound what is sent again.
type Retries struct {
	// How many more endpoints a request is sent to. 0: none.
	Attempts int `yaml:"attempts" default:"2" min:"0" max:"10"`
	// The most retries, in percent of the requests of the last seconds; three a second are always allowed.
	Budget int `yaml:"budget" default:"20" min:"0" max:"100"`
}

// ListenerIdentity picks an SVID.
type ListenerIdentity struct {
	// By its SPIFFE ID.
	SPIFFEID spiffeid.ID `yaml:"spiffe_id" example:"spiffe://example.org/ns/shop/sa/inventory"`
	// By the hint of its registration entry. Not with source: files, where there are no hints.
	Hint string `yaml:"hint" example:"internal"`
}

// Route leads some of an inbound listener's connections, or with protocol: http
// its requests, to targets of their own. It needs one of sni, alpn, hosts and
// paths.
type Route struct {
	// Server names the client asks for: exact, or *.suffix for all below it. Left out: any, also none.
	SNI []ServerName `yaml:"sni" example:"[db.example.org, \"*.shop.example\"]"`
	// Protocols of which one was negotiated, with protocol: http as those of the listener. Left out: any, also none.
	ALPN []string `yaml:"alpn" example:"[postgresql]"`
	// With protocol: http, hosts of requests, as those of rules. Left out: any.
	Hosts []string `yaml:"hosts" example:"[orders.shop.svc, \"*.example.org\"]"`
	// With protocol: http, paths of requests, as those of rules. Left out: any.
	Paths []string `yaml:"paths" example:"[\"/v1/reports/**\"]"`
	// With protocol: http, in place of the listener's timeouts.response. 0s: that.
	Response Duration `yaml:"response" default:"0s" min:"0s" max:"24h"`
	// Where it leads, as the listener's own target.
	Target Targets `yaml:"target" required:"true" example:"127.0.0.1:5432"`
}

// ProxyProtocol is the header that proxies put before a connection's bytes to
// say whose it is.
type ProxyProtocol struct {
	// The header the target is sent before anything else: none, version 1 (addresses) or version 2 (inbound also SNI, ALPN, TLS version and both SPIFFE IDs). Outbound it goes before TLS.
	Send string `yaml:"send" default:"off" enum:"off|v1|v2"`
	// The proxies before the listener: networks, addresses, or unix for every client of a Unix socket. They must send a header, of either version, and are believed; nobody else may.
	AcceptFrom []Network `yaml:"accept_from" example:"[10.0.0.0/8, \"fd00::/8\"]"`
}

// Upstream says how a target is chosen.
type Upstream struct {
	// With protocol: http, what requests are sent in. auto: inbound, gRPC calls go by HTTP/2 in plaintext (h2c, with prior knowledge) and all else by HTTP/1.1; outbound, the far end is offered h2 and http/1.1 where the caller speaks HTTP/2, and http/1.1 alone where it does not. http1: everything goes by HTTP/1.1. h2c (inbound), h2 (outbound): everything goes by HTTP/2; set it where the target speaks nothing else.
	Protocol string `yaml:"protocol" default:"auto" enum:"auto|http1|h2c|h2"`
	// How one of the healthy addresses is chosen: one after the other, or the one with the fewest connections (with protocol: http, requests) from this listener. least_requests is another word for the same.
	Balance string `yaml:"balance" default:"round_robin" enum:"round_robin|least_connections|least_requests"`
	// Active checks: each address is connected to now and then. Left out: none. {}: with the defaults.
	Health *Health `yaml:"health"`
	// What is done about an address on which connections fail. When all are left out, all are tried.
	Ejection Ejection `yaml:"ejection"`
	// With protocol: http, the most requests an address is sent at once; more wait. 0: no limit.
	MaxRequests int `yaml:"max_requests" default:"0" min:"0" max:"1000000"`
	// With protocol: http, the most connections to an address, idle ones too; requests wait for one. 0: no limit.
	MaxConnections int `yaml:"max_connections" default:"0" min:"0" max:"1000000"`
	// With protocol: http, the most requests that wait for max_requests and max_connections; further ones are answered 503 at once.
	MaxPending int `yaml:"max_pending" default:"1024" min:"0" max:"1000000"`
}

// Health is how addresses are checked.
type Health struct {
	// Time between two checks of an address, give or take a tenth.
	Interval Duration `yaml:"interval" default:"10s" min:"100ms" max:"1h"`
	// How long the connect of a check may take; at most the interval.
	Timeout Duration `yaml:"timeout" default:"2s" min:"1ms" max:"1m"`
	// After how many failed checks in a row an address is left out.
	UnhealthyAfter int `yaml:"unhealthy_after" default:"3" min:"1" max:"1000"`
	// After how many good checks in a row it is chosen again.
	HealthyAfter int `yaml:"healthy_after" default:"2" min:"1" max:"1000"`
	// With protocol: http and inbound, a path that is asked for with GET and must answer 2xx or 3xx: over HTTP/2 where upstream.protocol is h2c, else over HTTP/1.1. Left out: a connection is enough.
	Path string `yaml:"path" example:"/healthz"`
	// With protocol: http and inbound, in place of path: the service's own gRPC health service (grpc.health.v1.Health), whose Check must answer SERVING, over h2c. {}: of the server as a whole.
	GRPC *GRPCHealth `yaml:"grpc"`
}

// GRPCHealth is what a gRPC health service is asked.
type GRPCHealth struct {
	// Of which of its services, by the name that it goes by there, at most 255 visible ASCII characters. Left out, or "": the server as a whole.
	Service string `yaml:"service" empty:"true" example:"shop.v1.Orders"`
}

// Ejection leaves an address out for a while.
type Ejection struct {
	// After how many failed connections in a row; outbound, a failed handshake counts too. 0: never.
	After int `yaml:"after" default:"5" min:"0" max:"1000"`
	// For how long, the first time. It doubles each time after that without a good connection between, up to ten times this.
	For Duration `yaml:"for" default:"30s" min:"100ms" max:"1h"`
	// With protocol: http, whether the answers 502, 503 and 504 count as failed connections.
	On5xx bool `yaml:"on_5xx" default:"false"`
}

// Timeouts bound the steps of a connection.
type Timeouts struct {
	// From accept (inbound) or dial (outbound) to the end of the TLS handshake.
	Handshake Duration `yaml:"handshake" default:"10s" min:"1ms" max:"10m"`
	// To connect to the target.
	Connect Duration `yaml:"connect" default:"5s" min:"1ms" max:"10m"`
	// A connection on which nothing moves either way for this long is closed. 0s: never.
	Idle Duration `yaml:"idle" default:"5m" min:"0s" max:"8760h"`
	// How long a connection that has to go may still finish.
	Drain Duration `yaml:"drain" default:"30s" min:"0s" max:"24h"`
	// With protocol: http, how long the first request of a connection may take to come, and the head of each from its first byte on. 408 after that.
	Head Duration `yaml:"head" default:"10s" min:"1ms" max:"10m"`
	// With protocol: http, from the last of a request to the head of the response. 504 after that.
	Response Duration `yaml:"response" default:"1m" min:"1ms" max:"24h"`
	// With protocol: http, how long nothing of a request's body may come, and either side may take nothing of what it is sent.
	Stall Duration `yaml:"stall" default:"30s" min:"1ms" max:"1h"`
}

// Telemetry says what listens for people and monitoring. It has no
// authentication: keep it on loopback, a Unix socket or a network you trust.
type Telemetry struct {
	// host:port or unix:/path of /metrics, the status page, /api/v1/status, /livez and /readyz. Left out: none.
	Listen Address `yaml:"listen" example:"127.0.0.1:9901"`
	// host:port or unix:/path of /livez and /readyz alone, for probes that come from elsewhere. Left out: none.
	Health Address `yaml:"health" example:":9902"`
}

// AccessLog says where the records go.
type AccessLog struct {
	// stdout, stderr or a file, which is appended to.
	Path string `yaml:"path" default:"stdout"`
	// json (field names of the Elastic Common Schema) or text.
	Format string `yaml:"format" default:"json" enum:"json|text"`
}

// Log configures the program's own log.
type Log struct {
	// The least level that is shown.
	Level string `yaml:"level" default:"info" enum:"trace|debug|info|warn|error"`
	// text or json.
	Format string `yaml:"format" default:"text" enum:"text|json"`
}
