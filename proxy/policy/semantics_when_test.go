package policy

import (
	"strings"
	"testing"
)

// whenConditions says of each text of slowWhens when it is true, false and
// fails. What fails: an allow does not match, a deny does.
var whenConditions = []conditionTest{
	{"", `from.trust_domain == to.trust_domain`, []conditionCase{
		{tcp(), both},
		{tcp().outbound(), both},
		{tcp().from(other), neither},
		{tcp().plaintext(), neither},
		{tcp().nobody(), neither},
		{tcp().nobody().toNobody(), denies}, // "" of both
		{get("/"), both},
	}},
	{"", `from.id.startsWith("spiffe://a.org/ns")`, []conditionCase{
		{tcp(), neither},
		{tcp().from("spiffe://a.org/ns/x"), both},
	}},
	{"", `from.id == ""`, []conditionCase{
		{tcp(), neither},
		{tcp().plaintext(), both},
		{tcp().nobody(), denies}, // true, but no allow is for nobody
	}},
	{"", `from.path == "/web" || to.path.endsWith("/sa")`, []conditionCase{
		{tcp(), neither},
		{tcp().from("spiffe://a.org/web"), both},
		{tcp().from("spiffe://a.org/x/web"), neither},
		{tcp().to("spiffe://a.org/x/sa"), both},
		{tcp().to("spiffe://a.org"), neither},
	}},
	{"", `from.authenticated`, []conditionCase{
		{tcp(), both},
		{tcp().plaintext(), neither},
		{tcp().nobody(), neither},
	}},
	{"", `!to.authenticated || from.path != to.path`, []conditionCase{
		{tcp(), both},
		{tcp().to(web), neither},
		{tcp().toNobody(), both},
	}},
	{"", `int(from.serial) > 9`, []conditionCase{
		{tcp().serial("10"), both},
		{tcp().serial("5"), neither},
		{tcp().serial("1f"), denies}, // fails
		{tcp().serial("").outbound(), denies},
		{tcp().plaintext(), denies},
		{get("/").serial("10"), both},
		{get("/").serial("5"), neither},
		{get("/").serial("1f"), denies},
	}},
	{"", `to.serial in ["1f", "2", "10"]`, []conditionCase{
		{tcp(), both},
		{tcp().serial("3"), neither},
		{tcp().toNobody(), neither},
	}},
	{"", `inNetwork(source.ip, "10.0.0.0/8")`, []conditionCase{
		{tcp(), both},
		{tcp().source("::ffff:10.1.2.3"), both},
		{tcp().outbound(), both}, // unlike source_ip
		{tcp().source("11.0.0.1"), neither},
		{tcp().noSource(), denies}, // fails: nobody knows
	}},
	{"", `!inNetwork(source.ip, '10.1.0.0/16')`, []conditionCase{
		{tcp(), neither},
		{tcp().source("10.2.0.1"), both},
		{tcp().source("fd00::1"), both},
		{tcp().noSource(), denies},
	}},
	{"", `source.ip == "" || source.ip.startsWith("10.")`, []conditionCase{
		{tcp(), both},
		{tcp().source("::ffff:10.1.2.3"), both},
		{tcp().noSource(), both},
		{tcp().source("192.0.2.7"), neither},
	}},
	{"", `source.port > 1023`, []conditionCase{
		{tcp(), both},
		{tcp().sourcePort(1023), neither},
		{tcp().noSource(), neither},
	}},
	{"", `connection.listener in ["l1", "l3"]`, []conditionCase{
		{tcp().on("l1"), both},
		{tcp(), neither},
	}},
	{"", `connection.direction == "inbound"`, []conditionCase{
		{tcp(), both},
		{tcp().outbound(), neither},
	}},
	{"", `connection.sni == "" || connection.sni.endsWith(".shop.example")`, []conditionCase{
		{tcp(), neither},
		{tcp().sni(""), both}, // unlike sni
		{tcp().sni("a.shop.example"), both},
	}},
	{"", `1000 / connection.port == 0`, []conditionCase{
		{tcp(), both},
		{tcp().port(80), neither},
		{tcp().port(0), denies}, // fails
		{tcp().port(0).outbound(), denies},
	}},
	{"", `request.time.getHours("UTC") < 6`, []conditionCase{
		{tcp(), neither},
		{tcp().at("2026-01-01T05:59:59Z"), both},
		{tcp().at("2026-01-01T06:00:00Z"), neither},
		{tcp().at("2026-01-01T07:00:00+03:00").outbound(), both},
		{get("/"), neither},
		{get("/").at("2026-01-01T00:00:00Z"), both},
	}},
	{"", `time >= timestamp("2026-01-02T00:00:00Z")`, []conditionCase{
		{tcp(), neither},
		{tcp().at("2026-01-01T23:59:59Z"), neither},
		{tcp().at("2026-01-02T00:00:00Z"), both},
		{tcp().at("2026-01-02T01:00:00+02:00"), neither},
	}},
	{"", `time.getDayOfWeek() in [0, 6]`, []conditionCase{
		{tcp(), neither},
		{tcp().at("2026-01-03T12:00:00Z"), both},
		{tcp().at("2026-01-04T23:59:59Z"), both},
		{tcp().at("2026-01-05T00:00:00Z"), neither},
	}},
	{"", `request.time.getMinutes() % 2 == 0 && from.authenticated`, []conditionCase{
		{tcp(), both},
		{tcp().at("2026-01-01T12:01:00Z"), neither},
		{tcp().plaintext(), neither},
	}},
	{"", `request.method == "GET"`, []conditionCase{
		{get("/"), both},
		{do("HEAD", "/"), neither},
		{do("HEAD", "/").outbound(), neither},
		{tcp(), denies}, // not visible: as the other conditions on HTTP
		{tcp().outbound(), both},
	}},
	{"", `request.method in ["GET", "HEAD"] && request.path.startsWith("/v1/")`, []conditionCase{
		{get("/v1/orders"), both},
		{do("HEAD", "/v1/"), both},
		{do("POST", "/v1/orders"), neither},
		{get("/v2/orders"), neither},
		{tcp(), denies},
		{tcp().outbound(), both},
	}},
	{"", `request.host == "shop.example" || request.host.endsWith(":8443")`, []conditionCase{
		{get("/"), both},
		{get("/").host("shop.example:80"), neither},
		{get("/").host("x:8443"), both},
	}},
	{"", `size(request.path) > 10`, []conditionCase{
		{get("/v1/orders"), neither},
		{get("/v1/orders/7"), both},
		{do("OPTIONS", "*"), neither},
	}},
	{"", `"x-env" in request.headers && request.headers["x-env"].all(v, v == "prod")`, []conditionCase{
		{get("/").header("x-env", "prod"), both},
		{get("/").header("x-env", "prod").header("x-env", "prod"), both},
		{get("/").header("x-env", "prod").header("x-env", "test"), neither},
		{get("/"), neither},
		{tcp(), denies},
	}},
	{"", `has(request.headers.trace)`, []conditionCase{
		{get("/").header("trace", ""), both},
		{get("/").header("x-tag", "trace"), neither},
	}},
	{"", `request.headers["x-env"][0] == "prod"`, []conditionCase{
		{get("/").header("x-env", "prod").header("x-env", "test"), both},
		{get("/").header("x-env", "test").header("x-env", "prod"), neither},
		{get("/"), denies}, // fails
		{get("/").outbound(), denies},
		{tcp().outbound(), both},
	}},
	{"", `request.headers["x-tag"][1] != "blue"`, []conditionCase{
		{get("/").header("x-tag", "blue").header("x-tag", "green"), both},
		{get("/").header("x-tag", "green").header("x-tag", "blue"), neither},
		{get("/").header("x-tag", "green"), denies},
		{get("/"), denies},
	}},
	{"", `request.headers["x-env"].exists(v, v == "prod") || request.method == "GET"`, []conditionCase{
		{get("/"), both}, // the left fails, the right is true
		{do("POST", "/"), denies},
		{do("POST", "/").header("x-env", "test"), neither},
		{do("POST", "/").header("x-env", "test").header("x-env", "prod"), both},
	}},
	{"", `int(request.headers["x-count"][0]) > 5`, []conditionCase{
		{get("/").header("x-count", "7"), both},
		{get("/").header("x-count", "3"), neither},
		{get("/").header("x-count", "many"), denies},
		{get("/"), denies},
	}},
	{"", `request.method == "POST" && from.path.startsWith("/ns/")`, []conditionCase{
		{do("POST", "/"), both},
		{get("/"), neither},
		{do("POST", "/").plaintext(), neither},
		{tcp().outbound(), both},
		{tcp().plaintext(), denies}, // as a whole, also what is known of it
	}},
	{"", `!(request.method == "GET" && 1 / connection.port >= 0)`, []conditionCase{
		{do("POST", "/"), both},
		{do("POST", "/").port(0), both}, // the left decides
		{get("/"), neither},
		{get("/").port(0), denies},
		{tcp().outbound(), both},
	}},
	{"", `time.getHours() >= 9 && time.getHours() < 17 && request.method != "GET"`, []conditionCase{
		{do("POST", "/"), both},
		{do("POST", "/").at("2026-01-01T17:00:00Z"), neither},
		{get("/"), neither},
		{tcp(), denies},
		{tcp().outbound(), both},
		{tcp().at("2026-01-01T17:00:00Z").outbound(), both}, // as a whole
	}},

	// An allow without subjects is for the peer alone, whatever its when says.
	{"", `request.subject == from.id`, []conditionCase{
		{get("/").speaking(web), both},
		{get("/").speaking(anna), neither},
		{get("/"), neither},
		{get("/").plaintext(), both}, // "" of both
		{get("/").unproven(), denies},
		{get("/").outbound(), both},
		{tcp(), denies},
		{tcp().outbound(), both},
	}},
	{"", `request.subject != "" && request.subject_trust_domain != from.trust_domain`, []conditionCase{
		{get("/").speaking(other), denies},
		{get("/").speaking(anna), neither},
		{get("/"), neither},
		{get("/").unproven(), denies},
	}},
	{"", `request.subject_path.startsWith("/ns") || request.method == "GET"`, []conditionCase{
		{get("/"), both},
		{do("PUT", "/").speaking(web), both},
		{do("PUT", "/"), neither},
		{do("PUT", "/").outbound(), both}, // as a whole
	}},
	{"", `request.headers["x-env"][0] == "prod" || request.subject == ""`, []conditionCase{
		{get("/"), both},
		{get("/").speaking(web).header("x-env", "prod"), both},
		{get("/").speaking(web).header("x-env", "test"), neither},
		{get("/").speaking(web), denies}, // fails
		{get("/").unproven(), denies},
	}},
}

func TestWhenConditions(t *testing.T) {
	t.Parallel()
	named := map[string]bool{}
	for _, c := range whenConditions {
		named[c.keys] = true
		c.name, c.keys = c.keys, "when: '"+strings.ReplaceAll(c.keys, "'", "''")+"'"
		t.Run(c.name, c.run)
	}
	for text := range slowWhens {
		if !named[text] {
			t.Errorf("no case for %s", text)
		}
	}
}

// TestWhenBesideTheRest: where HTTP is not visible, the rest of the rule still
// counts.
func TestWhenBesideTheRest(t *testing.T) {
	t.Parallel()
	for _, c := range []conditionTest{
		{"on", "on: [orders]\nwhen: 'request.method == \"GET\"'", []conditionCase{
			{tcp(), denies},
			{tcp().outbound(), both},
			{tcp().on("carts"), neither},
			{tcp().on("carts").outbound(), neither},
			{get("/"), both},
			{get("/").on("carts"), neither},
		}},
		{"http", "http: {paths: [/v1/orders]}\nwhen: '1000 / connection.port == 0'", []conditionCase{
			{get("/v1/orders"), both},
			{get("/v1/orders").port(80), neither},
			{get("/v1/orders").port(0), denies},
			{get("/v2").port(0), neither},
			{tcp(), denies},
			{tcp().port(80), neither}, // asks for no HTTP, so it is asked
			{tcp().port(0).outbound(), denies},
			{tcp().port(80).outbound(), neither},
			{tcp().outbound(), both},
		}},
		{"time", "http: {methods: [GET]}\nwhen: 'request.time.getHours(\"UTC\") < 6'", []conditionCase{
			{tcp().outbound(), neither},
			{tcp(), neither},
			{tcp().at("2026-01-01T05:00:00Z").outbound(), both},
			{tcp().at("2026-01-01T05:00:00Z"), denies},
			{get("/").at("2026-01-01T05:00:00Z"), both},
			{do("PUT", "/").at("2026-01-01T05:00:00Z"), neither},
		}},
	} {
		t.Run(c.name, c.run)
	}
}
