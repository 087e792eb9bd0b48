package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
	"github.com/narthex-id/narthex/integration/internal/figures"
)

// Decisions are measured by the program in policypeers, which has the peers'
// libraries in it: a new process for each side, mix and number of rules, so
// that none has the heap of another to collect.

// ruleSides are the sides that decide by rules, by the names they have in
// policypeers.
var ruleSides = []string{ours, opa, cedarGo, casbin}

// decisions are the rows of one mix of rules.
type decisions struct {
	mix                  rulemix.Kind
	decide               []*row // by ruleCounts
	growth, load, memory *row
}

// comparing is for how long answers are compared before the first round.
const comparing = 30 * time.Second

var ruleCounts = []int{10, 1000, 100_000}

func (d *decisions) rows() []*row {
	return slices.Concat(d.decide, []*row{d.growth, d.load, d.memory})
}

// ruleRows are all rows about rules.
func ruleRows() []*row {
	return slices.Concat(identityRules.rows(), httpRules.rows(), []*row{rowReload, rowWhen})
}

// fed returns the rows that the i-th number of rules is measured for.
func (d *decisions) fed(i int) []*row {
	switch i {
	case 0:
		return []*row{d.decide[0], d.growth}
	case len(ruleCounts) - 1:
		return []*row{d.decide[i], d.growth, d.load, d.memory}
	}
	return []*row{d.decide[i]}
}

// decided is what policypeers says of one side, mix and number of rules.
type decided struct {
	Text     float64 `json:"text"`     // bytes
	Load     float64 `json:"load"`     // seconds
	Peak     float64 `json:"peak"`     // bytes
	Held     float64 `json:"held"`     // bytes
	Decision float64 `json:"decision"` // ns
	Allocs   float64 `json:"allocs"`
	Asked    int     `json:"asked"` // requests whose answers were compared
	Of       int     `json:"of"`
	GaveUp   string  `json:"gave_up"`
}

func (d *decisions) run(ctx context.Context, b *bench) error {
	sides := slices.DeleteFunc(slices.Clone(ruleSides), func(side string) bool { return !b.measures(side) })
	for i := range ruleCounts {
		if !b.wants(d.fed(i)...) {
			continue
		}
		first := map[string]*decided{} // by side, of the first round
		err := b.rounds(ctx, len(sides), func(at int) error { return d.turn(ctx, b, i, sides[at], first) })
		if err != nil {
			return err
		}
		d.note(b, i, sides, first)
	}
	small, large := b.results[d.decide[0].id], b.results[d.decide[len(d.decide)-1].id]
	for side := range large {
		for _, ratio := range large[side].Over(small[side]) {
			b.results.add(d.growth, side, ratio)
		}
	}
	return nil
}

// turn measures one side in one round. One that gave up is not asked again.
func (d *decisions) turn(ctx context.Context, b *bench, i int, side string, first map[string]*decided) error {
	if first[side] != nil && first[side].GaveUp != "" {
		return nil
	}
	args := []string{"-engine", side, "-mix", string(d.mix), "-rules", itoa(b.rules(ruleCounts[i])), "-for", b.lasting(time.Second).String()}
	check := time.Duration(0) // those that are measured are compared anyway
	if first[side] == nil {
		check = b.lasting(comparing)
	}
	args = append(args, "-check", check.String())
	var got decided
	if err := b.policyPeers(ctx, &got, args...); err != nil {
		return err
	}
	if first[side] == nil {
		first[side] = &got
	}
	if got.GaveUp != "" {
		return nil
	}
	b.results.add(d.decide[i], side, got.Decision)
	if i == len(ruleCounts)-1 {
		b.results.add(d.load, side, got.Load)
		b.results.add(d.memory, side, got.Peak/1e6)
	}
	return nil
}

// rules returns how many rules are measured where n are asked for: fewer with
// -quick, and never fewer than ten.
func (b *bench) rules(n int) int { return max(b.scaled(n), min(n, 10)) }

// note says what the first round showed beside times.
func (d *decisions) note(b *bench, i int, sides []string, first map[string]*decided) {
	each := func(what string, value func(*decided) string) string {
		var list []string
		for _, side := range sides {
			if got := first[side]; got.GaveUp == "" {
				list = append(list, side+" "+value(got))
			}
		}
		return what + ": " + strings.Join(list, ", ") + "."
	}
	row := d.decide[i]
	b.notes.add(row, "%s", each("Allocations by decision", func(got *decided) string { return figures.Number(got.Allocs) }))
	for _, side := range sides {
		switch got := first[side]; {
		case got.GaveUp != "":
			b.notes.add(row, "%s: %s.", side, got.GaveUp)
		case got.Asked < got.Of:
			b.notes.add(row, "%s: in %v %d of the %d requests were answered and compared.", side, b.lasting(comparing), got.Asked, got.Of)
		}
	}
	if i == len(ruleCounts)-1 {
		b.notes.add(d.load, "%s", each("Text, in MB", func(got *decided) string { return figures.Number(got.Text / 1e6) }))
		b.notes.add(d.memory, "%s", each("Held once loaded, in MB", func(got *decided) string { return figures.Number(got.Held / 1e6) }))
	}
}

// measureReload measures decisions of ours while rules are loaded.
func measureReload(ctx context.Context, b *bench) error {
	if !b.measures(ours) {
		return nil
	}
	var quiet, busy figures.Series
	err := b.rounds(ctx, 1, func(int) error {
		var got struct{ Quiet, Busy float64 }
		err := b.policyPeers(ctx, &got, "-what", "reload", "-rules", itoa(b.rules(10_000)), "-for", b.lasting(4*time.Second).String())
		if err == nil {
			quiet, busy = append(quiet, got.Quiet), append(busy, got.Busy)
			b.results.add(rowReload, ours, got.Busy/got.Quiet)
		}
		return err
	})
	b.notes.add(rowReload, "p99 in quiet %s ns, while rules are loaded %s ns, reading the clock included.", figures.Number(quiet.Median()), figures.Number(busy.Median()))
	return err
}

// measureWhen measures a decision of ours by a condition in CEL.
func measureWhen(ctx context.Context, b *bench) error {
	if !b.measures(ours) {
		return nil
	}
	var without, allocations figures.Series
	err := b.rounds(ctx, 1, func(int) error {
		var got struct{ With, Without, Allocs float64 }
		err := b.policyPeers(ctx, &got, "-what", "when", "-for", b.lasting(time.Second).String())
		if err == nil {
			without, allocations = append(without, got.Without), append(allocations, got.Allocs)
			b.results.add(rowWhen, ours, got.With)
		}
		return err
	})
	b.notes.add(rowWhen, "%s ns without the condition; %s allocations with it.", figures.Number(without.Median()), figures.Number(allocations.Median()))
	return err
}

// policyPeers runs the program in policypeers, and reads what it prints.
func (b *bench) policyPeers(ctx context.Context, got any, args ...string) error {
	dir, err := b.folder()
	if err != nil {
		return err
	}
	// It gives up by itself where loading takes too long.
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	var said bytes.Buffer
	cmd := exec.Command(b.policies, args...)
	cmd.Stdout = &said
	p, err := b.keeper.start(cmd, filepath.Join(dir, "output"))
	if err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.stop()
	}
	if err := cmp.Or(p.err, ctx.Err()); err != nil {
		return fmt.Errorf("policypeers %s: %w\n%s", strings.Join(args, " "), err, p.said())
	}
	if err := json.Unmarshal(said.Bytes(), got); err != nil {
		return fmt.Errorf("policypeers %s: %w", strings.Join(args, " "), err)
	}
	return nil
}
