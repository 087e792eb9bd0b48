package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestEveryRowIsInOneTable(t *testing.T) {
	t.Parallel()
	var listed []string
	for _, table := range tables {
		for _, row := range table.rows {
			listed = append(listed, row.id)
		}
	}
	measured := rowIDs()
	slices.Sort(listed)
	slices.Sort(measured)
	if !slices.Equal(listed, measured) {
		t.Errorf("in tables: %v\nmeasured:  %v", listed, measured)
	}
}

// A side that gives up is not asked again, has no value and is spoken of; the
// others go on.
func TestDecisionsOfWhoGivesUp(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "policypeers")
	script := `#!/bin/sh
echo "$2" >> "$0.asked"
case "$2" in
opa) echo '{"gave_up": "given up after 120 s", "of": 1024}' ;;
casbin) echo '{"decision": 5000, "allocs": 12345, "asked": 7, "of": 1024, "text": 3e6}' ;;
*) echo '{"decision": 100, "allocs": 0, "load": 0.5, "peak": 9e7, "asked": 1024, "of": 1024}' ;;
esac
`
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	b := &bench{
		options: options{policies: program, pairs: 3, sides: []string{ours, opa, casbin}},
		dir:     t.TempDir(), keeper: newKeeper(), results: results{}, notes: notes{},
	}
	defer b.keeper.close()
	if err := identityRules.run(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	asked, err := os.ReadFile(program + ".asked")
	if n := strings.Count(string(asked), opa); err != nil || n != len(ruleCounts) {
		t.Errorf("who gave up was asked %d times, %v", n, err)
	}
	r := report{options: b.options, results: b.results, notes: b.notes}
	for _, want := range []string{
		"decide-100000 ns CPU 100 – – 5000 (0.020×) 0.020× casbin ≤ 150 ns met",
		"decide-growth × 1.00 – – 1.00 (1.00×) 1.00× casbin ≤ 2.00 × met",
		"rules-memory MB 90.0 – – 0.00 ",
		"decide-10: Allocations by decision: narthex 0.00, casbin 12,345.",
		"decide-10: opa: given up after 120 s.",
		"decide-10: casbin: in 30s 7 of the 1024 requests were answered and compared.",
	} {
		if text := strings.Join(strings.Fields(r.text()), " "); !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, r.text())
		}
	}
}
