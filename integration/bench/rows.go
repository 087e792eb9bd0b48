package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
	"github.com/narthex-id/narthex/integration/internal/figures"
)

// row is one line of the table.
type row struct {
	id, title, unit string
	higher          bool // is better
	target          target
	did             string // what each side did
	goes            string // where our time goes, by the profiles of `make profile`
}

// target is what a row is to reach. The zero target is none.
type target struct {
	bound    float64
	absolute bool   // bound is in the row's unit, and not a ratio
	against  string // the side a ratio is taken to; bestPeer for the best of them
}

// The sides.
const (
	ours       = "narthex"
	nginx      = "nginx"
	haproxy    = "haproxy"
	ghostunnel = "ghostunnel"
	spireAgent = "spire-agent"
	opa        = "opa"
	cedarGo    = "cedar-go"
	casbin     = "casbin"
	grpcGo     = "grpc-go"

	bestPeer = "best"
)

var allSides = []string{ours, nginx, haproxy, ghostunnel, grpcGo, spireAgent, opa, cedarGo, casbin}

// results are the values by row and side.
type results map[string]map[string]figures.Series

func (r results) add(row *row, side string, value float64) {
	if r[row.id] == nil {
		r[row.id] = map[string]figures.Series{}
	}
	r[row.id][side] = append(r[row.id][side], value)
}

// notes are what a run has to say of a row beside its values, by row.
type notes map[string][]string

func (n notes) add(row *row, format string, values ...any) {
	n[row.id] = append(n[row.id], fmt.Sprintf(format, values...))
}

// experiment measures some rows together.
type experiment struct {
	name string
	rows []*row
	run  func(context.Context, *bench) error
}

// The rows of the proxy. Each is CPU time of the proxy, or its memory.
var (
	rowHandshake = &row{
		goes: "profile: crypto/tls's handshake is two thirds (X25519 16 %, verifying the client's signature 15 %, signing 10 %, the key schedule, parsing the client's certificate; the chain's own verification is cached), system calls a quarter, the dial 9 %. crypto/tls has no hook to make the first part less.",
		id:   "handshake", title: "mTLS handshake, dial, 1 byte there and back, close", unit: "µs CPU",
		target: target{bound: 0.5, against: nginx},
		did: "8 clients, each connection new: full TLS 1.3 handshake, ECDSA P-256 on both sides, X25519, TLS_AES_128_GCM_SHA256, no tickets. " +
			"nginx, haproxy and ghostunnel log nothing; narthex cannot but format a record of each connection, which goes to /dev/null.",
	}
	rowHandshakeLogged = &row{
		id: "handshake-logged", title: "the same, connections logged to a file", unit: "µs CPU",
		target: target{bound: 0.5, against: nginx},
		did: "As above; each side writes who connected to a file: nginx, haproxy and narthex one record a connection (not buffered by nginx and haproxy, " +
			"batched off the path by narthex), ghostunnel its two lines.",
	}
	rowHandshakeTickets = &row{
		id: "handshake-tickets", title: "the same, session tickets as each has them by default", unit: "µs CPU",
		target: target{bound: 0.5, against: nginx},
		did: "As the first row, but nobody's tickets are turned off: nginx, haproxy and ghostunnel issue them, narthex has none. The client takes none up, as one that connects " +
			"for the first time cannot.",
	}
	rowHandshakePQ = &row{
		id: "handshake-pq", title: "the same, narthex with X25519MLKEM768", unit: "µs CPU",
		target: target{bound: 0.9, against: ghostunnel},
		did:    "As the first row, narthex with the post-quantum key exchange. The peers do not have it (nginx and haproxy for their OpenSSL, ghostunnel by its own choice), so ghostunnel stays with X25519.",
	}
	rowEcho = &row{
		goes: "profile: 77 % in read(2) and write(2), of which the peers make as many; 10 % in Go's poller and scheduler, 4 % in AES.",
		id:   "echo", title: "echo of 128 bytes, 16 connections", unit: "µs CPU",
		target: target{bound: 0.9, against: bestPeer},
		did:    "Each connection sends 128 bytes and waits for them before the next. Handshakes are not counted.",
	}
	rowBulkUp = &row{
		goes: "profile: more than half in read(2) and write(2), 64 KiB each; a third in AES-GCM; 5 % in copies between our buffers and those of crypto/tls. Rounds differ by a fifth.",
		id:   "bulk-up", title: "bulk, client to service, 4 connections", unit: "s CPU per GB",
		target: target{bound: 0.8, against: bestPeer},
		did:    "1 GB over 4 connections at once, in writes of 64 KiB. nginx and haproxy have their default buffers of 16 KiB. Handshakes are not counted.",
	}
	rowBulkDown = &row{
		id: "bulk-down", title: "bulk, service to client, 4 connections", unit: "s CPU per GB",
		target: target{bound: 0.8, against: bestPeer},
		did:    "The same the other way.",
	}
	rowProxyRest = &row{
		id: "proxy-rest", title: "memory without connections", unit: "MiB",
		did: "PSS of the process and its children, half a second after a fresh start and two connections.",
	}
	rowIdle = &row{
		id: "idle", title: "idle connection", unit: "KiB",
		target: target{bound: 16, absolute: true},
		did:    "PSS with all connections open (handshake and one byte there and back, then 3 s of silence) less that without, by connection. Memory of the kernel for sockets is not counted on either side.",
	}
	rowIdleAfterBulk = &row{
		id: "idle-after-bulk", title: "idle connection after bulk", unit: "KiB",
		target: target{bound: 24, absolute: true},
		did:    "The same connections after 64 KiB each way on each, and 3 s of silence.",
	}
)

// Further rows of the proxy: of narthex alone but for the first.
var (
	rowLatency = &row{
		goes: "the proxies share two cores with the client and the service, and what is measured at p99 is who waits for a core; rounds differ by more than tenfold.",
		id:   "latency", title: "p99 added to a message there and back, 2,000 a second", unit: "µs",
		target: target{bound: 1, against: bestPeer},
		did: "16 connections send 128 bytes each at fixed times, whether the message before was answered or not; 99th percentile of the time from sending to the whole answer, " +
			"less that of messages straight to the backend in the same round. The client, the proxy and the backend share the cores.",
	}
	rowHandshakeBeside = &row{
		id: "handshake-9000", title: "handshake as above, beside 9,000 silent connections", unit: "µs CPU",
		did: "As the first row. What is in use is more, and what is collected.",
	}
	rowEchoBeside = &row{
		id: "echo-9000", title: "echo as above, beside 9,000 silent connections", unit: "µs CPU",
		did: "As the row of echoes.",
	}
	rowIdle100 = &row{
		id: "idle-100", title: "idle connection, of 100", unit: "KiB",
		did: "As the rows of idle connections. What the process takes once it works at all (code that was not used before, threads, pools), some 3 MiB, is in it, and is most of it here.",
	}
	rowIdle1000 = &row{
		id: "idle-1000", title: "idle connection, of 1,000", unit: "KiB",
		did: "The same process with 900 more.",
	}
	rowIdle9000 = &row{
		id: "idle-9000", title: "idle connection, of 9,000", unit: "KiB",
		target: target{bound: 16, absolute: true},
		did:    "The same process with 8,000 more.",
	}
	rowRefuse = &row{
		id: "refuse", title: "new rules: 9,000 connections asked, 1,000 closed", unit: "ms",
		target: target{bound: 100, absolute: true},
		did: "From the moment before the rules' file is written and SIGHUP sent (reading, compiling and testing it included) to the moment the last of 1,000 clients whom the new rules refuse has read its RST. " +
			"The other 8,000 go on.",
	}
)

// The rows of the demo.
var (
	rowDemo = &row{
		id: "demo", title: "demo: start to first allowed call", unit: "s",
		did: "What `narthex demo --once` says: development server, agent and three proxies started, SVIDs signed, one HTTP request through two proxies answered.",
	}
	rowDemoWhole = &row{
		id: "demo-whole", title: "demo: `narthex demo --once`, start to end", unit: "s",
		did: "Wall time of the whole command: the above, a refused call, and the end of all processes.",
	}
)

// The rows of rules: identityRules of the mix whose rules name identities,
// listeners and ends alone, httpRules of that in which half of them ask for
// HTTP.
var (
	identityRules = decisions{
		mix: rulemix.Identity,
		decide: []*row{
			{id: "decide-10", title: "decision by identities, 10 rules", unit: "ns CPU", target: target{bound: 150, absolute: true}, did: didDecide},
			{id: "decide-1000", title: "the same, 1,000 rules", unit: "ns CPU", target: target{bound: 150, absolute: true}, did: didDecideMore},
			{id: "decide-100000", title: "the same, 100,000 rules", unit: "ns CPU", target: target{bound: 150, absolute: true}, did: didDecideMost},
		},
		growth: &row{id: "decide-growth", title: "the same, 100,000 rules by 10", unit: "×", target: target{bound: 2, absolute: true}, did: didGrowth},
		load:   &row{id: "rules-load", title: "load 100,000 rules", unit: "s CPU", target: target{bound: 1, absolute: true}, did: didLoad},
		memory: &row{id: "rules-memory", title: "memory while 100,000 rules are loaded", unit: "MB", target: target{bound: 200, absolute: true}, did: didMemory},
	}
	httpRules = decisions{
		mix: rulemix.HTTP,
		decide: []*row{
			{id: "decide-http-10", title: "decision by HTTP, 10 rules", unit: "ns CPU", target: target{bound: 500, absolute: true}, did: didDecide},
			{id: "decide-http-1000", title: "the same, 1,000 rules", unit: "ns CPU", target: target{bound: 500, absolute: true}, did: didDecideMore},
			{id: "decide-http-100000", title: "the same, 100,000 rules", unit: "ns CPU", target: target{bound: 500, absolute: true}, did: didDecideMost},
		},
		growth: &row{id: "decide-http-growth", title: "the same, 100,000 rules by 10", unit: "×", target: target{bound: 2, absolute: true}, did: didGrowth},
		load:   &row{id: "rules-http-load", title: "load 100,000 rules with HTTP", unit: "s CPU", target: target{bound: 1, absolute: true}, did: didLoad},
		memory: &row{id: "rules-http-memory", title: "memory while 100,000 rules with HTTP are loaded", unit: "MB", target: target{bound: 200, absolute: true}, did: didMemory},
	}
	rowReload = &row{
		id: "rules-reload", title: "p99 of decisions while 10,000 rules are loaded, by p99 in quiet", unit: "×",
		target: target{bound: 10, absolute: true},
		did:    "Two goroutines on two cores: one decides and reads the clock for each decision, the other loads the rules over and over.",
	}
	rowWhen = &row{
		id: "decide-when", title: "decision by a condition in CEL", unit: "ns CPU",
		did: "One rule between two workloads whose `when` compares the method with a list, the path with a prefix and the client's address with a network.",
	}
)

const (
	didDecide     = "1,024 requests in turn, each in the program's own form before the clock starts; the CPU time of the process by decision, with GOMAXPROCS=1, what collecting garbage takes included. Every answer is compared with ours."
	didDecideMore = "As above."
	didDecideMost = "As above. Who asks rule after rule answers only some of the requests in the second that is measured, eight at least."
	didGrowth     = "The two rows above, one by the other: how much slower many rules are."
	didLoad       = "From the text of the rules in memory to the first decision that could be made; CPU time of the process with GOMAXPROCS=1."
	didMemory     = "How much the heap grew at most meanwhile, sampled every 2 ms, the text itself apart."
)

// experiments are all there are, in the order of the table.
var experiments []experiment

func init() {
	add := func(name string, run func(context.Context, *bench) error, rows ...*row) {
		experiments = append(experiments, experiment{name, rows, run})
	}
	for _, t := range throughputs {
		add(t.row.id, t.run, t.row)
	}
	add("idle connections", measureIdle, rowProxyRest, rowIdle, rowIdleAfterBulk)
	add("many connections", measureMany, rowIdle100, rowIdle1000, rowIdle9000, rowHandshakeBeside, rowEchoBeside, rowRefuse)
	add("latency", measureLatency, rowLatency)
	for _, t := range requests {
		add(t.row.id, t.run, t.row)
	}
	add("idle keep-alive connections", measureIdleHTTP, rowIdleHTTP)
	add("latency of requests", measureLatencyHTTP, rowLatencyHTTP)
	for _, t := range slices.Concat(h2Throughputs, h2cThroughputs) {
		add(t.row.id, t.run, t.row)
	}
	add("gRPC", measureGRPC, rowGRPC)
	add("gRPC through two proxies", measureGRPCBoth, rowGRPCBoth, rowGRPCProxies)
	add("idle connections of HTTP/2", measureIdleH2, rowH2Idle)
	add("open streams", measureStreams, rowH2Stream)
	add("agents", fewEntries.run, rowAgentStart, rowAgentRest, rowAgentIdle, rowAgentStream, rowAgentFetch, rowAgentCPU, rowAgentJWT, rowAgentJWTCPU, rowAgentLatency)
	add("agents with 10,000 entries", manyEntries.run, rowAgentRest10000, rowAgentIdle10000)
	add("agents with 100,000 entries", mostEntries.run, rowAgentRest100000, rowAgentIdle100000)
	add("agents that rotate", rotation.run, rowAgentSigned, rowAgentRest10000SVIDs, rowAgentRotate)
	add("rules by identities", identityRules.run, identityRules.rows()...)
	add("rules with HTTP", httpRules.run, httpRules.rows()...)
	add("rules while they are loaded", measureReload, rowReload)
	add("rules in CEL", measureWhen, rowWhen)
	add("demo", measureDemo, rowDemo, rowDemoWhole)
}

// rowIDs names all rows, in the order of the table.
func rowIDs() []string {
	var ids []string
	for _, e := range experiments {
		for _, r := range e.rows {
			ids = append(ids, r.id)
		}
	}
	return ids
}
