package policy

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	scheme = "spiffe://"

	// maxIDLength and maxDomainLength are the bounds of the SPIFFE-ID
	// standard, section 2.3, in bytes.
	maxIDLength     = 2048
	maxDomainLength = 255

	one  = "*"  // any one segment
	many = "**" // one segment or more

	// reserved is the first segment of the paths that SPIRE keeps for its own
	// servers and agents.
	reserved = "spire"
)

// Pattern matches SPIFFE IDs segment by segment: it is a SPIFFE ID in whose
// path a segment may be "*", which stands for any one segment, and the last
// may be "**", which stands for one segment or more. There are no wildcards in
// the trust domain, and none for a part of a segment. A "**" that is the whole
// path never covers /spire and what is below it: those IDs belong to the SPIRE
// servers and agents themselves, and a rule that means them says so, be it with
// "*" in that place.
//
// Patterns are comparable: two are equal when their texts are. The zero Pattern
// matches nothing.
type Pattern struct {
	text string
	path int  // where the path begins in text
	wild bool // holds a wildcard
}

// ParsePattern reads a pattern such as spiffe://example.org/ns/*/sa/web. The
// error says which part is wrong and, where a person is likely to have meant
// something else, what to write.
func ParsePattern(s string) (Pattern, error) {
	if err := checkPrefix(s); err != nil {
		return Pattern{}, err
	}
	domain, path := s[len(scheme):], ""
	if i := strings.IndexByte(domain, '/'); i >= 0 {
		domain, path = domain[:i], domain[i:]
	}
	if err := checkDomain(domain); err != nil {
		return Pattern{}, err
	}
	if path == "" || path == "/" {
		return Pattern{}, fmt.Errorf("the path is missing: %s%s is a trust domain, not a workload; for all its workloads write %s%s/**", scheme, domain, scheme, domain)
	}
	wild, err := checkPath(path)
	if err != nil {
		return Pattern{}, err
	}
	return Pattern{text: s, path: len(scheme) + len(domain), wild: wild}, nil
}

func checkPrefix(s string) error {
	switch {
	case s == "":
		return errors.New("empty; a SPIFFE ID looks like spiffe://example.org/ns/shop/sa/orders")
	case len(s) > maxIDLength:
		return fmt.Errorf("%d bytes long; a SPIFFE ID has at most %d", len(s), maxIDLength)
	case strings.HasPrefix(s, scheme):
		return nil
	case len(s) >= len(scheme) && strings.EqualFold(s[:len(scheme)], scheme):
		return errors.New("the scheme is written in lower case: spiffe://")
	}
	return errors.New("not a SPIFFE ID: it begins with spiffe:// and a trust domain")
}

func checkDomain(domain string) error {
	switch {
	case domain == "":
		return errors.New("the trust domain is missing after spiffe://")
	case len(domain) > maxDomainLength:
		return fmt.Errorf("the trust domain is %d bytes long; at most %d are allowed", len(domain), maxDomainLength)
	case strings.Contains(domain, one):
		return fmt.Errorf("trust domain %q: there are no wildcards in the trust domain; name each one", domain)
	case strings.HasPrefix(domain, scheme):
		return fmt.Errorf("trust domain %q: write its name alone, like partner.example", clip(domain))
	case strings.Contains(domain, ":"):
		return fmt.Errorf("trust domain %q: a SPIFFE ID has no port", domain)
	case strings.Contains(domain, "@"):
		return fmt.Errorf("trust domain %q: a SPIFFE ID has no user", domain)
	}
	if _, err := spiffeid.TrustDomainFromString(domain); err != nil {
		return fmt.Errorf("trust domain %q: only a-z, 0-9, '.', '-' and '_' are allowed", domain)
	}
	return nil
}

// checkPath reports whether the path, which begins with a slash, holds a
// wildcard.
func checkPath(path string) (wild bool, err error) {
	segments := strings.Split(path[1:], "/")
	for i, segment := range segments {
		switch {
		case segment == one:
			wild = true
		case segment == many:
			if i != len(segments)-1 {
				return false, errors.New(`"**" must be the last segment; "*" stands for one segment in between`)
			}
			wild = true
		case segment == "" && i == len(segments)-1:
			return false, errors.New("the path ends with a slash")
		case segment == "":
			return false, errors.New("the path has an empty segment")
		case segment == "." || segment == "..":
			return false, fmt.Errorf("the path has a %q segment", segment)
		case strings.Contains(segment, one):
			return false, fmt.Errorf(`segment %q: "*" stands for one whole segment, not for a part of one`, segment)
		case spiffeid.ValidatePathSegment(segment) != nil:
			return false, fmt.Errorf("segment %q: only letters, digits, '.', '-' and '_' are allowed", segment)
		}
	}
	return wild, nil
}

// String returns the pattern as it was written.
func (p Pattern) String() string { return p.text }

// TrustDomain returns the name of the one trust domain whose IDs can match.
func (p Pattern) TrustDomain() string {
	if p.text == "" {
		return ""
	}
	return p.text[len(scheme):p.path]
}

// Match reports whether the pattern covers the ID. It allocates nothing. A
// zero ID, and one without a path, match no pattern.
func (p Pattern) Match(id spiffeid.ID) bool {
	s := id.String()
	if p.text == "" || s == "" {
		return false
	}
	if !p.wild {
		return s == p.text
	}
	if len(s) <= p.path || s[:p.path] != p.text[:p.path] || s[p.path] != '/' {
		return false
	}
	return matchPath(p.text[p.path:], s[p.path:])
}

// matchPath compares two paths that begin with a slash.
func matchPath(pattern, path string) bool {
	for top := true; ; top = false {
		if pattern == "" || path == "" {
			return pattern == path
		}
		var want, have string
		want, pattern = cutSegment(pattern)
		have, path = cutSegment(path)
		switch want {
		case many:
			return !top || have != reserved
		case one, have:
		default:
			return false
		}
	}
}

// cutSegment splits a path such as "/ns/shop" into its first segment "ns" and
// what follows, "/shop".
func cutSegment(path string) (segment, rest string) {
	path = path[1:]
	if i := strings.IndexByte(path, '/'); i >= 0 {
		return path[:i], path[i:]
	}
	return path, ""
}
