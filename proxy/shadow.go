package proxy

import (
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// This file tells of rules in shadow: they decide nothing, and are to be seen
// before somebody enforces them.

// shadow is what the rules in shadow would have made of a connection.
type shadow struct {
	rules []string
	came  outcome // audited: they would deny it; missed: they would allow it
}

// noteShadow counts and logs, with c.mu held, those rules in shadow that were
// not counted for the connection before.
func (q *question) noteShadow() {
	c := q.c
	next := shadow{rules: q.decision.Shadow}
	if len(next.rules) > 0 {
		next.came = missed
		if q.decision.Allow {
			next.came = audited
		}
	}
	was := q.shadow
	q.shadow = next
	var news []string
	for _, id := range next.rules {
		if was.came != next.came || !slices.Contains(was.rules, id) {
			c.l.proxy.instruments.decided(c.l.name, id, next.came).Inc()
			news = append(news, id)
		}
	}
	if len(news) == 0 {
		return
	}
	what := "rules in shadow would refuse what passes"
	if next.came == missed {
		what = "rules in shadow would allow what no rule allows"
	}
	c.l.logSome(&c.l.shadows, hclog.Info, what, "source", c.source, "from", peerName(&q.request.From), "to", peerName(&q.request.To), "shadow", strings.Join(news, ","))
}
