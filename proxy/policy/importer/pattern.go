package importer

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	scheme = "spiffe://"
	one    = "*"  // any one segment
	many   = "**" // one segment or more, at the end
)

// checkPattern says what is wrong with a SPIFFE ID in whose path segments may
// be wildcards.
func checkPattern(s string) error {
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return errors.New("not a SPIFFE ID: it begins with spiffe:// and a trust domain")
	}
	if len(s) > 2048 {
		return errors.New("longer than 2048 bytes, the most that a SPIFFE ID has")
	}
	domain, path, _ := strings.Cut(rest, "/")
	if err := checkDomain(domain); err != nil {
		return err
	}
	if path == "" {
		return errors.New("a trust domain without a path is no workload")
	}
	segments := strings.Split(path, "/")
	for i, segment := range segments {
		if segment == one || segment == many && i == len(segments)-1 {
			continue
		}
		if spiffeid.ValidatePathSegment(segment) != nil {
			return fmt.Errorf("%q is no segment of a SPIFFE ID", clip(segment))
		}
	}
	return nil
}

func checkDomain(domain string) error {
	td, err := spiffeid.TrustDomainFromString(domain)
	if err != nil || td.Name() != domain || len(domain) > 255 {
		return fmt.Errorf("%q is no trust domain", clip(domain))
	}
	return nil
}

// exact reports whether a pattern stands for one ID alone.
func exact(pattern string) bool { return !strings.Contains(pattern, one) }

// meet returns the pattern of what both patterns match; false where nothing is.
func meet(a, b string) (string, bool) {
	x, y := strings.Split(a[len(scheme):], "/"), strings.Split(b[len(scheme):], "/")
	var out []string
	for i := 0; ; i++ {
		switch {
		case i == len(x) || i == len(y):
			return scheme + strings.Join(out, "/"), len(x) == len(y)
		case i > 0 && x[i] == many:
			return scheme + strings.Join(append(out, y[i:]...), "/"), true
		case i > 0 && y[i] == many:
			return scheme + strings.Join(append(out, x[i:]...), "/"), true
		case x[i] == y[i] || i > 0 && y[i] == one:
			out = append(out, x[i])
		case i > 0 && x[i] == one:
			out = append(out, y[i])
		default:
			return "", false
		}
	}
}

// meetAll returns the patterns of what some pattern of both lists matches.
func meetAll(a, b []string) []string {
	var out []string
	for _, x := range a {
		for _, y := range b {
			if both, ok := meet(x, y); ok {
				out = append(out, both)
			}
		}
	}
	return unique(out)
}

func unique(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}
