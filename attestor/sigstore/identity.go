package sigstore

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
)

// identity is one pair of issuer and subject that may sign.
type identity struct{ issuer, subject pattern }

// pattern is a text or a regular expression. The rules of the house have no
// regular expressions; these are here because the files of spire-agent have
// them, and RE2 matches them in linear time.
type pattern struct {
	text  string
	regex *regexp.Regexp // nil: the text itself
}

func compilePattern(text string) (pattern, error) {
	if text == "" {
		return pattern{}, nil
	}
	if !strings.ContainsAny(text, "*+?^${}[]|()") {
		return pattern{text: text}, nil
	}
	regex, err := regexp.Compile(text)
	if err != nil {
		return pattern{}, fmt.Errorf("%q is no regular expression: %w", text, err)
	}
	return pattern{text: text, regex: regex}, nil
}

// matches tells whether s is what the pattern says. An empty pattern says
// nothing.
func (p pattern) matches(s string) bool {
	switch {
	case p.regex != nil:
		return p.regex.MatchString(s)
	case p.text != "":
		return p.text == s
	default:
		return true
	}
}

// loose tells whether the pattern matches names that merely contain what it
// says: where it does not begin with ^ and end with $, in each of its
// alternatives.
func (p pattern) loose() bool {
	if p.regex == nil {
		return false
	}
	parsed, err := syntax.Parse(p.text, syntax.Perl)
	return err != nil || !anchored(parsed)
}

func anchored(r *syntax.Regexp) bool {
	switch r.Op {
	case syntax.OpCapture:
		return anchored(r.Sub[0])
	case syntax.OpAlternate:
		return !slices.ContainsFunc(r.Sub, func(sub *syntax.Regexp) bool { return !anchored(sub) })
	case syntax.OpConcat:
		return r.Sub[0].Op == syntax.OpBeginText && r.Sub[len(r.Sub)-1].Op == syntax.OpEndText
	}
	return false
}

func compileIdentities(allowed map[string][]string) ([]identity, error) {
	var ids []identity
	for issuer, subjects := range allowed {
		i, err := compilePattern(issuer)
		if err != nil {
			return nil, fmt.Errorf("allowed_identities: issuer %w", err)
		}
		if len(subjects) == 0 {
			return nil, fmt.Errorf("allowed_identities: issuer %q has no subjects; name them, or \".*\" for all", issuer)
		}
		for _, subject := range subjects {
			s, err := compilePattern(subject)
			if err != nil {
				return nil, fmt.Errorf("allowed_identities: issuer %q: subject %w", issuer, err)
			}
			ids = append(ids, identity{i, s})
		}
	}
	return ids, nil
}

// allowed tells whether one of ids is the issuer with one of the subjects.
func allowed(ids []identity, issuer string, subjects []string) bool {
	return len(ids) == 0 || slices.ContainsFunc(ids, func(id identity) bool {
		return id.issuer.matches(issuer) && slices.ContainsFunc(subjects, id.subject.matches)
	})
}
