package policy

import (
	"slices"
	"testing"
)

// connectionConditions are those that are met, or not, before there is a
// request: seeing HTTP changes nothing.
var connectionConditions = []conditionTest{
	{"nothing but from", "description: who may come", []conditionCase{
		{tcp(), both},
		{tcp().outbound(), both},
		{tcp().on("elsewhere"), both},
		{tcp().plaintext(), both},
		{tcp().nobody(), denies}, // a deny without from is for everyone
		{tcp().toNobody(), both},
		{tcp().from("spiffe://example.com/x"), denies},
		{get("/"), both},
	}},
	{"on", "on: [orders, carts]", []conditionCase{
		{tcp(), both},
		{tcp().on("carts"), both},
		{tcp().on("carts").outbound(), both},
		{tcp().on("order"), neither},
		{tcp().on("Orders"), neither},
		{tcp().on(""), neither},
		{tcp().nobody(), denies},
	}},
	{"at inbound", "at: inbound", []conditionCase{
		{tcp(), both},
		{tcp().outbound(), neither},
	}},
	{"at outbound", "at: outbound\nfrom: ['spiffe://example.org/**']", []conditionCase{
		{tcp(), neither},
		{tcp().outbound(), both},
	}},
	{"from", "from: ['spiffe://example.org/ns/*/sa/web', 'group:partners']", []conditionCase{
		{tcp(), both},
		{tcp().outbound(), both},
		{tcp().from("spiffe://example.org/ns/x/sa/web"), both},
		{tcp().from(other), both},
		{tcp().from(orders), neither},
		{tcp().from("spiffe://example.org/ns/x/y/sa/web"), neither},
		{tcp().from("spiffe://example.org/ns/x/sa/web2"), neither},
		{tcp().from("spiffe://a.org/ns/x/sa/web"), neither},
		{tcp().plaintext(), neither},
		{tcp().nobody(), neither},
	}},
	{"from plaintext", "from: [unauthenticated]", []conditionCase{
		{tcp().plaintext(), both},
		{tcp(), neither},
		{tcp().nobody(), neither},
	}},
	{"a ** at the top leaves out what is reserved", "from: ['spiffe://example.org/**']", []conditionCase{
		{tcp(), both},
		{tcp().from("spiffe://example.org/spire/server"), neither},
	}},
	{"to", "to: ['" + orders + "', 'group:partners']", []conditionCase{
		{tcp(), both},
		{tcp().outbound(), both},
		{tcp().to(other), both},
		{tcp().to(web), neither},
		{tcp().toNobody(), neither},
	}},

	{"source_ip", "source_ip: [10.0.0.0/8, 192.0.2.7, '2001:db8::/32']", []conditionCase{
		{tcp(), both},
		{tcp().source("10.255.255.255"), both},
		{tcp().source("11.0.0.0"), neither},
		{tcp().source("192.0.2.7"), both},
		{tcp().source("192.0.2.8"), neither},
		{tcp().source("2001:db8::1"), both},
		{tcp().source("2001:db9::1"), neither},
		{tcp().source("::ffff:10.1.2.3"), both}, // the same address
		{tcp().source("::ffff:11.1.2.3"), neither},
		{tcp().noSource(), denies}, // nobody knows
		{tcp().outbound(), neither},
		{tcp().noSource().outbound(), neither},
	}},
	{"source_ip at the inbound end", "at: inbound\nsource_ip: [10.0.0.0/8]", []conditionCase{
		{tcp(), both},
		{tcp().source("11.0.0.1"), neither},
		{tcp().noSource(), denies},
		{tcp().outbound(), neither},
	}},
	{"source_ip without zones", "source_ip: ['fe80::/10']", []conditionCase{
		{tcp().source("fe80::1%eth0"), both},
		{tcp().source("fe80::1"), both},
		{tcp().source("fd00::1%eth0"), neither},
	}},
	{"source_ip of a mapped address", "source_ip: ['::ffff:10.1.2.3']", []conditionCase{
		{tcp(), both},
		{tcp().source("::ffff:10.1.2.3"), both},
		{tcp().source("10.1.2.4"), neither},
	}},
	{"source_ip of every IPv6 address", "source_ip: ['::/0']", []conditionCase{
		{tcp().source("2001:db8::1"), both},
		{tcp(), neither},
		{tcp().source("::ffff:10.1.2.3"), neither},
	}},
	{"not_source_ip", "not_source_ip: [10.0.0.0/8, 192.0.2.7]", []conditionCase{
		{tcp(), neither},
		{tcp().source("192.0.2.7"), neither},
		{tcp().source("::ffff:10.1.2.3"), neither},
		{tcp().source("192.0.2.8"), both},
		{tcp().source("2001:db8::1"), both},
		{tcp().noSource(), denies},
		{tcp().source("192.0.2.8").outbound(), neither},
		{tcp().noSource().outbound(), neither},
	}},
	{"source_ip and not_source_ip", "source_ip: [10.0.0.0/8]\nnot_source_ip: [10.9.0.0/16]", []conditionCase{
		{tcp(), both},
		{tcp().source("10.9.0.1"), neither},
		{tcp().source("11.0.0.1"), neither},
		{tcp().noSource(), denies},
		{tcp().outbound(), neither},
	}},

	{"ports", "ports: [8443, '9000-9100']", []conditionCase{
		{tcp(), both},
		{tcp().outbound(), both},
		{tcp().port(8442), neither},
		{tcp().port(8444), neither},
		{tcp().port(8999), neither},
		{tcp().port(9000), both},
		{tcp().port(9050), both},
		{tcp().port(9100), both},
		{tcp().port(9101), neither},
		{tcp().port(9101).outbound(), neither},
		{tcp().port(0), denies},
		{tcp().port(0).outbound(), denies},
	}},

	{"sni", "sni: [Orders.Example.org, '*.shop.example']", []conditionCase{
		{tcp(), both},
		{tcp().outbound(), both},
		{tcp().sni("orders.example.com"), neither},
		{tcp().sni("x.orders.example.org"), neither},
		{tcp().sni("a.shop.example"), both},
		{tcp().sni("b.a.shop.example"), both},
		{tcp().sni("shop.example"), neither},
		{tcp().sni("ashop.example"), neither},
		{tcp().sni("").outbound(), denies},
		{tcp().sni(""), denies}, // else leaving it out would be the way around
	}},

	{"everything must hold", "on: [orders]\nat: inbound\nto: ['" + orders + "']\nsource_ip: [10.0.0.0/8]\nports: [8443]\nsni: [orders.example.org]\nwhen: 'from.authenticated'", []conditionCase{
		{tcp(), both},
		{tcp().on("carts"), neither},
		{tcp().outbound(), neither},
		{tcp().to(web), neither},
		{tcp().source("11.0.0.1"), neither},
		{tcp().noSource(), denies},
		{tcp().port(1), neither},
		{tcp().port(0), denies},
		{tcp().sni("x.org"), neither},
		{tcp().sni(""), denies},
		{tcp().plaintext(), neither},
		{tcp().noSource().port(0).sni(""), denies},
		{tcp().noSource().port(1), neither},
	}},
}

func TestConnectionConditions(t *testing.T) {
	t.Parallel()
	for _, c := range connectionConditions {
		c.cases = slices.Clone(c.cases)
		for _, tt := range c.cases {
			if tt.ask.HTTP == nil {
				tt.ask.HTTP = get("/v1/orders").HTTP
				c.cases = append(c.cases, tt)
			}
		}
		t.Run(c.name, c.run)
	}
}
