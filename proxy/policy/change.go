package policy

// Changes is what is other in one policy than in another, by id, sorted.
type Changes struct {
	Added, Changed, Removed []string
}

// Compare says which rules and limits of p are not in was, mean something else
// there, or are missing. Either may be nil.
func (p *Policy) Compare(was *Policy) Changes {
	return Changes{}
}

// TimeDependent reports whether an answer may change by the passing of time
// alone, so that live connections are to be asked again each minute.
func (p *Policy) TimeDependent() bool { return false }
