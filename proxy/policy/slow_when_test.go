package policy

import (
	"slices"
	"strconv"
	"strings"
	"time"
)

// slowWhen says by hand what a CEL text means.
type slowWhen struct {
	http bool // asks for request.* other than the time
	time bool // asks for the time

	subject bool // asks whom the request speaks for
	eval    func(*Request) (value, failed bool)
}

// sure makes an eval of an expression that cannot fail.
func sure(f func(*Request) bool) func(*Request) (bool, bool) {
	return func(q *Request) (bool, bool) { return f(q), false }
}

func slowID(p Peer) string {
	if p.Unauthenticated {
		return ""
	}
	return p.ID.String()
}

func slowTrustDomain(p Peer) string {
	domain, _, _ := strings.Cut(strings.TrimPrefix(slowID(p), "spiffe://"), "/")
	return domain
}

func slowIDPath(p Peer) string {
	return strings.TrimPrefix(strings.TrimPrefix(slowID(p), "spiffe://"), slowTrustDomain(p))
}

func slowSerial(p Peer) string {
	if p.Unauthenticated {
		return ""
	}
	return p.Serial
}

func slowHour(q *Request) int { return int(q.Time.Unix() / 3600 % 24) } // after 1970

// slowWhens are the CEL texts that the tests know the meaning of.
var slowWhens = map[string]slowWhen{
	// Of the peers.
	`from.trust_domain == to.trust_domain`:    {eval: sure(func(q *Request) bool { return slowTrustDomain(q.From) == slowTrustDomain(q.To) })},
	`from.id.startsWith("spiffe://a.org/ns")`: {eval: sure(func(q *Request) bool { return strings.HasPrefix(slowID(q.From), "spiffe://a.org/ns") })},
	`from.id == ""`: {eval: sure(func(q *Request) bool { return slowID(q.From) == "" })},
	`from.path == "/web" || to.path.endsWith("/sa")`: {eval: sure(func(q *Request) bool {
		return slowIDPath(q.From) == "/web" || strings.HasSuffix(slowIDPath(q.To), "/sa")
	})},
	`from.authenticated`: {eval: sure(func(q *Request) bool { return slowID(q.From) != "" })},
	`!to.authenticated || from.path != to.path`: {eval: sure(func(q *Request) bool {
		return slowID(q.To) == "" || slowIDPath(q.From) != slowIDPath(q.To)
	})},
	// Serials are hexadecimal: not each of them is a number to CEL.
	`int(from.serial) > 9`: {eval: func(q *Request) (bool, bool) {
		n, err := strconv.ParseInt(slowSerial(q.From), 10, 64)
		return n > 9, err != nil
	}},
	`to.serial in ["1f", "2", "10"]`: {eval: sure(func(q *Request) bool {
		return slices.Contains([]string{"1f", "2", "10"}, slowSerial(q.To))
	})},

	// Of the connection.
	`inNetwork(source.ip, "10.0.0.0/8")`: {eval: func(q *Request) (bool, bool) {
		return slowContains("10.0.0.0/8", slowAddress(q)), slowAddress(q) == ""
	}},
	`!inNetwork(source.ip, '10.1.0.0/16')`: {eval: func(q *Request) (bool, bool) {
		return !slowContains("10.1.0.0/16", slowAddress(q)), slowAddress(q) == ""
	}},
	`source.ip == "" || source.ip.startsWith("10.")`: {eval: sure(func(q *Request) bool {
		return slowAddress(q) == "" || strings.HasPrefix(slowAddress(q), "10.")
	})},
	`source.port > 1023`:                  {eval: sure(func(q *Request) bool { return q.Source.Port() > 1023 })},
	`connection.listener in ["l1", "l3"]`: {eval: sure(func(q *Request) bool { return q.Listener == "l1" || q.Listener == "l3" })},
	`connection.direction == "inbound"`:   {eval: sure(func(q *Request) bool { return q.Direction == Inbound })},
	`connection.sni == "" || connection.sni.endsWith(".shop.example")`: {eval: sure(func(q *Request) bool {
		return q.SNI == "" || strings.HasSuffix(q.SNI, ".shop.example")
	})},
	`1000 / connection.port == 0`: {eval: func(q *Request) (bool, bool) { return q.Port > 1000, q.Port == 0 }},

	// Of the time.
	`request.time.getHours("UTC") < 6`: {time: true, eval: sure(func(q *Request) bool { return slowHour(q) < 6 })},
	`time >= timestamp("2026-01-02T00:00:00Z")`: {time: true, eval: sure(func(q *Request) bool {
		return q.Time.Unix() >= time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC).Unix()
	})},
	`time.getDayOfWeek() in [0, 6]`: {time: true, eval: sure(func(q *Request) bool {
		return (q.Time.Unix()/86400+4)%7 == 0 || (q.Time.Unix()/86400+4)%7 == 6 // 1 January 1970 was a Thursday
	})},
	`request.time.getMinutes() % 2 == 0 && from.authenticated`: {time: true, eval: sure(func(q *Request) bool {
		return q.Time.Unix()/60%2 == 0 && slowID(q.From) != ""
	})},

	// Of the request.
	`request.method == "GET"`: {http: true, eval: sure(func(q *Request) bool { return q.HTTP.Method == "GET" })},
	`request.method in ["GET", "HEAD"] && request.path.startsWith("/v1/")`: {http: true, eval: sure(func(q *Request) bool {
		return (q.HTTP.Method == "GET" || q.HTTP.Method == "HEAD") && strings.HasPrefix(q.HTTP.Path, "/v1/")
	})},
	`request.host == "shop.example" || request.host.endsWith(":8443")`: {http: true, eval: sure(func(q *Request) bool {
		return q.HTTP.Host == "shop.example" || strings.HasSuffix(q.HTTP.Host, ":8443")
	})},
	`size(request.path) > 10`: {http: true, eval: sure(func(q *Request) bool { return len(q.HTTP.Path) > 10 })},
	`"x-env" in request.headers && request.headers["x-env"].all(v, v == "prod")`: {http: true, eval: sure(func(q *Request) bool {
		values := slowValues(q.HTTP, "x-env")
		return len(values) > 0 && !slices.ContainsFunc(values, func(v string) bool { return v != "prod" })
	})},
	`has(request.headers.trace)`: {http: true, eval: sure(func(q *Request) bool { return len(slowValues(q.HTTP, "trace")) > 0 })},
	// Fail where the header is not there, or not there twice.
	`request.headers["x-env"][0] == "prod"`: {http: true, eval: func(q *Request) (bool, bool) {
		values := slowValues(q.HTTP, "x-env")
		return len(values) > 0 && values[0] == "prod", len(values) == 0
	}},
	`request.headers["x-tag"][1] != "blue"`: {http: true, eval: func(q *Request) (bool, bool) {
		values := slowValues(q.HTTP, "x-tag")
		return len(values) > 1 && values[1] != "blue", len(values) < 2
	}},
	// Either side of || makes up for a failure of the other, where it is true.
	`request.headers["x-env"].exists(v, v == "prod") || request.method == "GET"`: {http: true, eval: func(q *Request) (bool, bool) {
		values := slowValues(q.HTTP, "x-env")
		value := slices.Contains(values, "prod") || q.HTTP.Method == "GET"
		return value, !value && len(values) == 0
	}},
	`int(request.headers["x-count"][0]) > 5`: {http: true, eval: func(q *Request) (bool, bool) {
		values := slowValues(q.HTTP, "x-count")
		if len(values) == 0 {
			return false, true
		}
		n, err := strconv.ParseInt(values[0], 10, 64)
		return n > 5, err != nil
	}},

	// Of whom it speaks for.
	`request.subject == from.id`: {http: true, subject: true, eval: sure(func(q *Request) bool { return speaksFor(q) == slowID(q.From) })},
	`request.subject != "" && request.subject_trust_domain != from.trust_domain`: {http: true, subject: true, eval: sure(func(q *Request) bool {
		return speaksFor(q) != "" && slowTrustDomain(Peer{ID: q.HTTP.Subject}) != slowTrustDomain(q.From)
	})},
	`request.subject_path.startsWith("/ns") || request.method == "GET"`: {http: true, subject: true, eval: sure(func(q *Request) bool {
		return strings.HasPrefix(slowIDPath(Peer{ID: q.HTTP.Subject}), "/ns") || q.HTTP.Method == "GET"
	})},
	`request.headers["x-env"][0] == "prod" || request.subject == ""`: {http: true, subject: true, eval: func(q *Request) (bool, bool) {
		values := slowValues(q.HTTP, "x-env")
		value := speaksFor(q) == "" || len(values) > 0 && values[0] == "prod"
		return value, !value && len(values) == 0
	}},

	// Of several.
	`request.method == "POST" && from.path.startsWith("/ns/")`: {http: true, eval: sure(func(q *Request) bool {
		return q.HTTP.Method == "POST" && strings.HasPrefix(slowIDPath(q.From), "/ns/")
	})},
	`!(request.method == "GET" && 1 / connection.port >= 0)`: {http: true, eval: func(q *Request) (bool, bool) {
		return q.HTTP.Method != "GET", q.HTTP.Method == "GET" && q.Port == 0
	}},
	`time.getHours() >= 9 && time.getHours() < 17 && request.method != "GET"`: {http: true, time: true, eval: sure(func(q *Request) bool {
		return slowHour(q) >= 9 && slowHour(q) < 17 && q.HTTP.Method != "GET"
	})},
}
