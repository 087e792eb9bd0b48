package policy

// Host matches the host of a request as `hosts` of a rule does: a name, or
// *.suffix for all names below it, with a port or for any. The zero Host
// matches nothing.
type Host struct{ pattern hostPattern }

// ParseHost reads a host as it stands in a rule.
func ParseHost(text string) (Host, error) {
	pattern, err := parseHost(text, true)
	return Host{pattern}, err
}

// Match reports whether it covers a canonical host.
func (h Host) Match(host string) bool { return h.pattern.name != "" && h.pattern.match(host) }

// String returns the host in its canonical form.
func (h Host) String() string { return h.pattern.String() }

// Path matches the path of a request as `paths` of an allow does, such as
// /v1/orders/{id} and /v1/items/**. The zero Path matches nothing.
type Path struct{ pattern pathPattern }

// ParsePath reads a path as it stands in a rule.
func ParsePath(text string) (Path, error) {
	pattern, err := parsePath(text)
	return Path{pattern}, err
}

// Match reports whether it covers a canonical path. It allocates nothing.
func (p Path) Match(path string) bool { return p.pattern.match(path, false) }

// String returns the path as it was written.
func (p Path) String() string { return p.pattern.written }
