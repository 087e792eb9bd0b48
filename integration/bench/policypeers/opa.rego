# Rules are data, filed under what tells most of them apart: the identity they
# go to; where that is a pattern or left out, the one they come from; where both
# are patterns, what stands in the first before its wildcard. So few rules are
# looked at however many there are.
package mesh

default allow := false

allow if {
	permitted
	not denied
}

permitted if {
	some rule in data.allow.to[input.to]
	holds(rule)
}

permitted if {
	some rule in data.allow.from[input.from]
	holds(rule)
}

permitted if {
	index := data.allow.beneath
	some prefix in prefixes
	some rule in index[prefix]
	holds(rule)
}

denied if data.revoked[input.from]

denied if data.revoked[input.to]

denied if outside(input.from)

denied if outside(input.to)

denied if {
	some rule in data.deny.to[input.to]
	holds(rule)
}

denied if {
	some rule in data.deny.from[input.from]
	holds(rule)
}

denied if {
	index := data.deny.beneath
	some prefix in prefixes
	some rule in index[prefix]
	holds(rule)
}

outside(id) if {
	pattern := data.ceilings[split(id, "/")[2]]
	not glob.match(pattern, ["/"], id)
}

# prefixes are those of the identity a request comes from, without the last
# slash of each.
prefixes contains concat("/", array.slice(segments, 0, n)) if {
	segments := split(input.from, "/")
	some n in numbers.range(3, count(segments) - 1)
}

holds(rule) if {
	rule.at in ["", input.direction]
	rule.on in ["", input.listener]
	from(rule)
	to(rule)
	http(rule)
}

# What a rule is filed under it does not say again.
from(rule) if not rule.from

from(rule) if rule.from.id == input.from

from(rule) if data.groups[rule.from.group][input.from]

from(rule) if glob.match(rule.from.glob, ["/"], input.from)

to(rule) if not rule.to

to(rule) if glob.match(rule.to.glob, ["/"], input.to)

http(rule) if not rule.http

http(rule) if {
	input.method in rule.http.methods
	path(rule.http)
	host(rule.http)
	header(rule.http)
}

path(http) if input.path in http.paths

path(http) if {
	some pattern in http.path_globs
	glob.match(pattern, ["/"], input.path)
}

host(http) if not http.host

host(http) if glob.match(http.host, [], input.host)

header(http) if not http.header

header(http) if input.headers[http.header] in http.values
