package main

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy/suggest"
)

// checkLogs refuses names of access logs of which standard input is one twice.
func checkLogs(names []string) error {
	if i := slices.Index(names, "-"); i >= 0 && slices.Contains(names[i+1:], "-") {
		return usageError{errors.New("- is standard input, and can be read once")}
	}
	return nil
}

// readLogs calls f for each record of a decision in the access logs, of which
// "-" is standard input. It is an error that there are none: who takes another
// file for an access log should learn it.
func readLogs(cmd *cobra.Command, names []string, f func(*telemetry.Access)) (suggest.Stats, error) {
	var all suggest.Stats
	for _, name := range names {
		stats, err := readLog(cmd, name, f)
		all.Add(stats)
		if err != nil {
			return all, err
		}
	}
	if all.Records == 0 {
		what := "it is empty"
		if len(names) > 1 {
			what = "they are empty"
		}
		if all.Other+all.Strange > 0 {
			what = fmt.Sprintf("%s came to none, and %s no access records in JSON", count(all.Other, "record"), areLines(all.Strange))
		}
		return all, fmt.Errorf("no decisions in the access log: %s", what)
	}
	return all, nil
}

func areLines(n int) string {
	if n == 1 {
		return "1 line is"
	}
	return fmt.Sprintf("%d lines are", n)
}

func readLog(cmd *cobra.Command, name string, f func(*telemetry.Access)) (suggest.Stats, error) {
	in := cmd.InOrStdin()
	shown := "standard input"
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return suggest.Stats{}, fmt.Errorf("read access log: %w", err)
		}
		defer file.Close()
		in, shown = file, name
	}
	stats, err := suggest.Read(in, f)
	if err != nil {
		return stats, fmt.Errorf("%s: %w", shown, err)
	}
	return stats, nil
}
