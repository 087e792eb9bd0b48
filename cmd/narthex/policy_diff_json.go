package main

import "github.com/narthex-id/narthex/proxy/policy"

// diffJSON is the JSON of a comparison. Keys never change their meaning.
type diffJSON struct {
	Rules      diffRules      `json:"rules"`
	Reported   []string       `json:"reported_only"` // of those, the rules in shadow
	Undecided  []string       `json:"undecided"`     // of those, what may change more decisions
	Limits     []diffLimit    `json:"limits"`
	Source     string         `json:"source"` // made-up | replay
	Asked      int            `json:"asked"`
	Changed    int            `json:"changed"`
	Redecided  int            `json:"redecided"`
	Incomplete bool           `json:"incomplete"`
	Records    *diffRecords   `json:"records,omitempty"` // of a replay
	Changes    []diffDecision `json:"changes"`
	Notes      []string       `json:"notes"`
}

type diffRules struct {
	Added   []string `json:"added"`
	Changed []string `json:"changed"`
	Removed []string `json:"removed"`
}

// diffLimit says what a limit bounds, for people; empty where there is none.
type diffLimit struct {
	ID  string `json:"id"`
	Was string `json:"was"`
	Is  string `json:"is"`
}

type diffRecords struct {
	Decisions int            `json:"decisions"`
	Skipped   int            `json:"skipped"`
	Reasons   map[string]int `json:"skipped_reasons"`
	Carried   int            `json:"connections_of_requests"`
	Undecided int            `json:"undecided"`
	Strange   int            `json:"strange"`
	Otherwise int            `json:"old_decides_otherwise"`
}

type diffDecision struct {
	Decision string        `json:"decision"` // by now: allow | deny
	Was      diffStep      `json:"was"`
	Is       diffStep      `json:"is"`
	Count    int           `json:"count"`
	Examples []diffExample `json:"examples"`
}

type diffStep struct {
	Decision string `json:"decision"`
	Rule     string `json:"rule"`
	Reason   string `json:"reason"`
}

func (d *policyDiff) json() *diffJSON {
	list := func(words []string) []string { return append([]string{}, words...) } // [] and not null
	out := &diffJSON{
		Rules:    diffRules{list(d.rules.Added), list(d.rules.Changed), list(d.rules.Removed)},
		Reported: list(d.reported), Undecided: list(d.undecided), Limits: []diffLimit{},
		Source: "made-up", Asked: d.Asked, Changed: d.changed, Redecided: d.Redecided, Incomplete: d.Incomplete,
		Changes: []diffDecision{}, Notes: list(d.notes),
	}
	for _, l := range d.limits {
		one := diffLimit{ID: l.ID}
		if l.Was != nil {
			one.Was = l.Was.String()
		}
		if l.Is != nil {
			one.Is = l.Is.String()
		}
		out.Limits = append(out.Limits, one)
	}
	if r := d.replay; r != nil {
		out.Source = "replay"
		out.Records = &diffRecords{r.stats.Records, r.skipped, r.reasons, r.carried, r.stats.Other, r.stats.Strange, r.otherwise}
	}
	step := func(d *policy.Decision) diffStep { return diffStep{verdict(d), d.Rule, d.Reason.String()} }
	for i := range d.changes {
		c := &d.changes[i]
		change := diffDecision{Decision: verdict(&c.Is), Was: step(&c.Was), Is: step(&c.Is), Count: c.Count}
		for j := range c.Examples {
			change.Examples = append(change.Examples, d.exampleOf(&c.Examples[j]))
		}
		out.Changes = append(out.Changes, change)
	}
	return out
}
