package main

// The rows of the agent.
var (
	rowAgentStart = &row{
		id: "agent-start", title: "agent: start to first SVID", unit: "ms",
		target: target{bound: 0.5, against: spireAgent},
		did: "From exec with an empty data directory, a join token and 10 entries on the server, to the first X.509-SVID in a client's hands, " +
			"which asks every 5 ms.",
		goes: "`narthex version`, which does nothing, takes 19 ms there: a program of 33 MB, whose packages (Prometheus, the protocols of Envoy and CSI, CEL) set themselves up. " +
			"It took 12 ms when the program was 20 MB.",
	}
	rowAgentRest = &row{
		id: "agent-rest", title: "agent: memory at rest", unit: "MiB",
		target: target{bound: 0.5, against: spireAgent},
		did:    "PSS 3 s after the first SVID, 10 entries, nobody connected.",
	}
	rowAgentIdle = &row{
		id: "agent-idle", title: "agent: nobody asks", unit: "% of a core",
		target: target{bound: 0.1, absolute: true},
		did:    "CPU time in 20 s after that, in which each asks the server some four times for changes.",
	}
	rowAgentStream = &row{
		id: "agent-stream", title: "agent: held FetchX509SVID stream", unit: "KiB",
		target: target{bound: 0.5, against: spireAgent},
		did:    "PSS with 500 streams, each on a connection of its own, 3 s after the last was answered, less that at rest, by stream.",
	}
	rowAgentFetch = &row{
		id: "agent-fetch", title: "agent: connect, attest, fetch, 8 clients", unit: "per second", higher: true,
		target: target{bound: 2, against: spireAgent},
		did:    "Each time a new connection; unix attestor (uid, gid, user, group, supplementary groups) on both sides; the client is a bare HTTP/2 one that shares the cores with the agent.",
	}
	rowAgentCPU = &row{
		id: "agent-cpu", title: "agent: connect, attest, fetch", unit: "µs CPU",
		did: "CPU time of the agent by fetch in the row above.",
	}
	rowAgentJWT = &row{
		id: "agent-jwt", title: "agent: connect, attest, fetch a JWT-SVID, 8 clients", unit: "per second", higher: true,
		target: target{bound: 2, against: spireAgent},
		did:    "As the fetches above, with FetchJWTSVID for one audience: both sides have the token from the server once and keep it.",
	}
	rowAgentJWTCPU = &row{
		id: "agent-jwt-cpu", title: "agent: connect, attest, fetch a JWT-SVID", unit: "µs CPU",
		did: "CPU time of the agent by fetch in the row above.",
	}
	rowAgentLatency = &row{
		id: "agent-latency", title: "agent: connect, attest, fetch, one client, median", unit: "ms",
		did: "As above with one client at a time.",
	}
	rowAgentRest10000 = &row{
		id: "agent-rest-10000", title: "agent: memory at rest, 10,000 entries", unit: "MiB",
		target: target{bound: 0.5, against: spireAgent},
		did:    "As memory at rest, once 1,000 SVIDs are signed ahead, which is the default of both. The entries have one selector each. Three rounds.",
	}
	rowAgentIdle10000 = &row{
		id: "agent-idle-10000", title: "agent: nobody asks, 10,000 entries", unit: "% of a core",
		target: target{bound: 0.1, absolute: true},
		did:    "CPU time in 20 s after that.",
	}
	rowAgentRest100000 = &row{
		id: "agent-rest-100000", title: "agent: memory with 100,000 entries of which 1,000 were asked for", unit: "MiB",
		target: target{bound: 0.5, against: spireAgent},
		did:    "The same with 100,000 entries, after 1,000 users have fetched the SVIDs of 1,000 entries, none of which was signed ahead. Three rounds.",
	}
	rowAgentIdle100000 = &row{
		id: "agent-idle-100000", title: "agent: nobody asks, 100,000 entries", unit: "% of a core",
		did: "CPU time in 20 s after that.",
	}
	rowAgentSigned = &row{
		id: "agent-sign", title: "agent: start to 10,000 SVIDs signed", unit: "s",
		target: target{bound: 1, against: spireAgent},
		did:    "10,000 entries and room for as many SVIDs; the server signs 500 a second for one address. By the server's own count. Three rounds.",
	}
	rowAgentRest10000SVIDs = &row{
		id: "agent-rest-svids", title: "agent: memory at rest, 10,000 SVIDs", unit: "MiB",
		target: target{bound: 0.5, against: spireAgent},
		did:    "As memory at rest, after that.",
	}
	rowAgentRotate = &row{
		id: "agent-rotate", title: "agent: p99 of fetches while 10,000 SVIDs are rotated, by p99 at rest", unit: "×",
		target: target{bound: 2, absolute: true},
		did: "SVIDs that live three minutes, so that all are replaced within some 20 s; four clients fetch 25 times a second each, for ten seconds before and for as long as the server signs. " +
			"The server that signs shares the cores with the agent and the clients.",
	}
)
