package policy

import (
	"fmt"
	"strings"
	"testing"
)

// TestWhenBad has what is refused when it is loaded, with line and column in
// the text.
func TestWhenBad(t *testing.T) {
	t.Parallel()
	const steep = ": loops in loops, and loops that search long text, cost most"
	for _, test := range []struct{ text, want string }{
		// Names.
		{`from.idd == "x"`, "1:1: unknown field from.idd; did you mean from.id?"},
		{`true && request.foo == "x"`, "1:9: unknown field request.foo; known: time, method, host, path, subject, subject_trust_domain, subject_path, headers"},
		{`frm.id == "x"`, "1:1: unknown name frm; did you mean from?"},
		{`user == "x"`, "1:1: unknown name user; known: connection, from, request, source, time, to"},
		{`from == "x"`, "1:1: from is no value; its fields are: id, trust_domain, path, serial, authenticated"},
		{`from.id.length == 3`, "1:8: this has no fields"},
		{`"é" == fro.id`, "1:8: unknown name fro; did you mean from?"},
		{"from.authenticated &&\n  to.idd == \"x\"", "2:3: unknown field to.idd; did you mean to.id?"},
		{`type(1) == int`, "1:1: unknown function type; types are checked when the policy is loaded"},
		{`from.id.starstWith("x")`, "1:9: unknown function starstWith; did you mean startsWith?"},
		{`from.id.matches("^x")`, "1:9: unknown function matches; there are no regular expressions; use ==, startsWith, endsWith or contains"},
		{`matches(from.id, "^x")`, "1:1: unknown function matches; there are no regular expressions; use ==, startsWith, endsWith or contains"},
		{`["a"].map(x, x) == []`, "1:7: unknown function map; map and filter are not there; use all, exists or exists_one"},
		{`["a"].filter(x, true) == []`, "1:7: unknown function filter; map and filter are not there; use all, exists or exists_one"},
		{`["a"].existsOne(x, true)`, "1:7: unknown function existsOne; write exists_one"},
		{`"%s".format(["a"]) == "a"`, "1:6: unknown function format; text is not formatted; compare its parts"},
		{`string(1) == "1"`, "1:1: unknown function string; there is no conversion to text"},
		{`["a"].all(time, time == "a")`, "1:10: time is a name of the language already; call what all, exists or exists_one goes over something else"},
		{`["a"].all(x, true) && x == "a"`, "1:23: unknown name x; known: connection, from, request, source, time, to"},
		{`google.protobuf.Duration{} == duration("1s")`, `1:25: there are no messages; {"key": value} is a map`},
		// has, all, exists, exists_one.
		{`has(from.id)`, "1:4: from.id is always there; has asks for the key of a map, as in has(request.headers.cookie)"},
		{`has(request.headers["a"])`, "1:20: has takes one key of a map, as in has(request.headers.cookie)"},
		{`["a"].all("x", true)`, "1:11: all, exists and exists_one take a name first, as in list.all(x, condition on x)"},
		{`["a"].exists(x)`, "1:7: exists is written list.exists(x, condition on x)"},
		{`from.id.all(c, true)`, "1:5: all, exists and exists_one go over a list or a map"},
		{`[[["a"]]].all(a, a.all(b, b.all(c, true)))`, "1:32: more than 2 of all, exists and exists_one in each other"},
		// Headers.
		{`request.headers["X-Env"] == []`, `1:17: "X-Env": header names are in lower case here; write "x-env"`},
		{`"X-Env" in request.headers`, `1:1: "X-Env": header names are in lower case here; write "x-env"`},
		{`has(request.headers.Cookie)`, `1:4: "Cookie": header names are in lower case here; write "cookie"`},
		{`request.headers.host[0] == "a"`, `1:16: "host" is not among the headers; use request.host, request.method or request.path`},
		{`":path" in request.headers`, `1:1: ":path" is not among the headers; use request.host, request.method or request.path`},
		{`request.headers == {"a": ["b"]}`, "1:17: maps are not compared; compare what is under their keys"},
		{`[request.headers] == []`, "1:19: maps are not compared; compare what is under their keys"},
		// Types.
		{`from.id`, "1:1: must be true or false, not string"},
		{`from.id == 1`, "1:9: == does not take (string, int)"},
		{`source.port == "443"`, "1:13: == does not take (int, string)"},
		{`!from.id`, "1:1: ! does not take (string)"},
		{`from.id ? true : false`, "1:9: ?: takes a condition and two values of one type, not (string, bool, bool)"},
		{`from.id[0] == "a"`, "1:8: [] does not take (string, int)"},
		{`from.id.startsWith(1)`, "1:19: startsWith does not take string.(int)"},
		{`1.5 + 1.5 == 3.0`, "1:5: + does not take (double, double)"},
		{`request.headers["a"] + ["b"] == []`, "1:22: + does not take (list(string), list(string))"},
		{`int(1.5) == 1`, "1:4: int does not take (double)"},
		// Syntax.
		{``, "1:1: an empty condition; leave when out"},
		{" \n", "1:1: an empty condition; leave when out"},
		{`from.id ==`, "1:11: ends too early; is something missing at the end?"},
		{`(from.authenticated`, "1:20: a bracket that ( begins is not ended by )"},
		{`from.id == "x`, "1:12: text that begins here has no end; is a quote missing?"},
		{`from.id == 'x`, "1:12: text that begins here has no end; is a quote missing?"},
		{`from.id = "x"`, "1:9: a single =; == compares"},
		{`true & true`, "1:6: a single &; && is and"},
		{`true and true`, "1:6: and is written &&"},
		{`not true`, "1:5: extraneous input 'true'"},
		{`if (true)`, "1:1: a word that CEL keeps for itself"},
		{`request.headers.?a == 1`, "1:16: unsupported syntax '.?'"},
		// Constants.
		{`time.getHours("Europe/Berln") < 6`, `1:15: "Europe/Berln": there is no such time zone; use an IANA name, such as Europe/Berlin`},
		{`time.getHours("Local") < 6`, `1:15: "Local": name a zone, such as Europe/Berlin: nodes may stand in different ones`},
		{`time.getHours("") < 6`, `1:15: "": name a zone, such as Europe/Berlin: nodes may stand in different ones`},
		{`time.getHours("../UTC") < 6`, `1:15: "../UTC": there is no such time zone; use an IANA name, such as Europe/Berlin`},
		{`time.getHours("+1") < 6`, `1:15: "+1": an offset from UTC is written like +01:00`},
		{`time.getHours("+25:00") < 6`, `1:15: "+25:00": an offset from UTC is written like +01:00`},
		{`time.getHours(request.headers["zone"][0]) < 6`, "1:38: the time zone of getHours must be a constant text"},
		{`inNetwork(source.ip, "10.0.0.1/8")`, `1:22: "10.0.0.1/8": bits after the prefix are set; write 10.0.0.0/8`},
		{`inNetwork(source.ip, "::ffff:10.0.0.0/104")`, `1:22: "::ffff:10.0.0.0/104": write an IPv4 network in its own form, like 10.0.0.0/8`},
		{`inNetwork(source.ip, "ten")`, `1:22: "ten": not a network; write one like 10.0.0.0/8 or 2001:db8::/32`},
		{`inNetwork(source.ip, from.id)`, "1:26: the network of inNetwork must be a constant text"},
		{`inNetwork(source.ip)`, "1:10: inNetwork does not take (string)"},
		{`time > timestamp("2026-13-01T00:00:00Z")`, `1:18: "2026-13-01T00:00:00Z" is no timestamp; write one like "2026-01-02T15:04:05Z"`},
		{`time > timestamp(from.id)`, `1:22: timestamp takes a constant text, like "2026-01-02T15:04:05Z"`},
		{`duration("1d") == duration("24h")`, `1:10: "1d" is no duration; write one like "1h30m"`},
		{`int("x") == 1`, `1:5: "x" is no int; write one like "443"`},
		{`1 / 0 == 1`, "1:1: fails whatever the request is: division by zero"},
		{`[1][1] == 1`, "1:1: fails whatever the request is: index out of bounds: 1"},
		// Size and cost.
		{`"` + strings.Repeat("x", maxWhen) + `" == ""`, "1:1: 4104 bytes long; at most 4096 are allowed"},
		{strings.Repeat("(", 100) + "true" + strings.Repeat(")", 100), "1:1: too many expressions in each other"},
		{"0 == 1" + strings.Repeat(" + 1", 200), "1:1: too many expressions in each other"},
		{`request.headers.all(a, request.headers.all(b, a != b))`, "1:1: may cost 934530 steps where 50000 are allowed" + steep},
		{`request.headers.all(n, request.headers[n][0].contains("admin"))`, "1:1: may cost 211586 steps where 50000 are allowed" + steep},
		{`request.headers["a"].exists(v, request.headers["b"].exists(w, v == w))`, "1:1: may cost 952074 steps where 50000 are allowed" + steep},
		{`request.path.contains(request.headers["a"][0])`, "1:1: may cost 1343991 steps where 50000 are allowed" + steep},
		{`request.headers["a"].all(v, (v + v + v + v).contains("admin"))`, "1:1: may cost 86282 steps where 50000 are allowed" + steep},
		{`[[request.path]].exists(l, l.exists(p, p.contains("a")))`, "1:1: the cost has no bound" + steep},
		{inBoth("[%s].all(a, [%s].all(b, a == b))", "1, ", 300), "1:1: may cost 544211 steps where 50000 are allowed" + steep},
		{inBoth("%s%strue", `request.path.contains("a") && `, 60), "1:1: may cost 98520 steps where 50000 are allowed" + steep},
	} {
		w, problem := compileWhen(test.text, place{"f", 1, 1})
		if problem == nil {
			t.Errorf("%s is accepted", clip(test.text))
			continue
		}
		if got := fmt.Sprintf("%d:%d: %s", problem.Line, problem.Column, problem.Msg); got != test.want || w != nil {
			t.Errorf("%s:\n got %s\nwant %s", clip(test.text), got, test.want)
		}
	}
}

// inBoth puts n times the same into two places.
func inBoth(format, part string, n int) string {
	parts := strings.TrimSuffix(strings.Repeat(part, n), ", ")
	return fmt.Sprintf(format, parts, parts)
}

// TestWhenPlace finds the place of an error in the file, however the text is
// written there.
func TestWhenPlace(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, file, want string }{
		{"plain", "a: from.idd == 1\n", "f:1:4"},
		{"single quotes", "a: 'true && from.idd == 1'\n", "f:1:13"},
		{"double quotes", "a: \"true && from.idd == 1\"\n", "f:1:13"},
		{"between braces", "{a: 'true && from.idd == 1'}\n", "f:1:14"},
		{"a block", "b: 1\na: |\n  true &&\n  from.idd == 1\n", "f:4:3"},
		{"an indented block", "b:\n  a: |-\n      true &&\n        from.idd == 1\n", "f:4:9"},
		{"a block that begins with an empty line", "a: |\n\n  true &&\n    from.idd == 1\n", "f:4:5"},
		{"a folded block has the place in one line", "a: >-\n  true &&\n  from.idd == 1\n", "f:2:11"},
	} {
		n, problem := readNode("f", 0, []byte(test.file))
		if problem != nil {
			t.Fatal(problem)
		}
		for n.kind == block {
			n = n.pairs[len(n.pairs)-1].value
		}
		_, problem = compileWhen(n.text, n.start())
		if problem == nil || !strings.HasPrefix(problem.Error(), test.want+": unknown field") {
			t.Errorf("%s: %v, want %s", test.name, problem, test.want)
		}
	}
}
