package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/proxy/policy"
)

func newCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check -c narthex.yaml",
		Short: "Check configuration and rules, for people and CI",
		Long: `Reads narthex.yaml and every rule file it names, and prints what is wrong with
its file, line and column. Errors keep Narthex from starting; warnings do not.
Exit status: 0 when nothing was found, 1 with findings, 2 for a call that
cannot be made sense of.`,
		Example: `  narthex check -c /etc/narthex/narthex.yaml
  narthex check -c narthex.yaml --format json`,
	}
	path := configFlag(cmd)
	format := cmd.Flags().String("format", "text", "text or json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *format != "text" && *format != "json" {
			return usageError{fmt.Errorf("--format %q: want text or json", *format)}
		}
		findings, summary := checkFiles(*path)
		if err := printFindings(cmd.OutOrStdout(), findings, summary, *format); err != nil {
			return err
		}
		if len(findings) > 0 {
			return exitError{exitFailure}
		}
		return nil
	}
	return cmd
}

// checkFinding is one line of `narthex check`.
type checkFinding struct {
	Level  string `json:"level"` // error | warning
	File   string `json:"file"`
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
	Text   string `json:"text"`
}

func (f checkFinding) String() string {
	where := f.File
	if f.Line > 0 {
		where = fmt.Sprintf("%s:%d:%d", f.File, f.Line, f.Column)
	}
	return fmt.Sprintf("%s: %s: %s", where, f.Level, f.Text)
}

// checkFiles reads all there is. The summary tells what was found good.
func checkFiles(path string) (findings []checkFinding, summary string) {
	c, err := config.Load(path)
	if err != nil {
		return configFindings(path, err), ""
	}
	for i := range c.Warnings {
		findings = append(findings, fromConfig("warning", &c.Warnings[i]))
	}
	summary = "agent"
	if !c.HasProxy() {
		return findings, summary
	}
	files, err := c.Proxy.PolicyFiles()
	if err != nil {
		return append(findings, checkFinding{Level: "error", File: path, Text: err.Error()}), ""
	}
	rules, err := policy.Load(files...)
	if err != nil {
		return append(findings, policyFindings(path, err)...), ""
	}
	for _, m := range rules.Listeners() {
		if !hasListener(c, m.Listener) {
			findings = append(findings, checkFinding{
				Level: "warning", File: m.File, Line: m.Line, Column: m.Column,
				Text: fmt.Sprintf("on: this node has no listener %q", m.Listener),
			})
		}
	}
	summary = fmt.Sprintf("%d listeners, %d rules in %d files", len(c.Proxy.Listeners), rules.Rules(), len(files))
	if c.HasAgent() {
		summary = "agent, " + summary
	}
	return findings, summary
}

func hasListener(c *config.Config, name string) bool {
	for i := range c.Proxy.Listeners {
		if c.Proxy.Listeners[i].Name == name {
			return true
		}
	}
	return false
}

func fromConfig(level string, f *config.Finding) checkFinding {
	text := f.Problem
	if f.Key != "" {
		text = f.Key + ": " + text
	}
	return checkFinding{Level: level, File: f.File, Line: f.Line, Column: f.Column, Text: text}
}

func configFindings(path string, err error) (findings []checkFinding) {
	var all *config.Error
	if !errors.As(err, &all) {
		return []checkFinding{{Level: "error", File: path, Text: err.Error()}}
	}
	for i := range all.Findings {
		findings = append(findings, fromConfig("error", &all.Findings[i]))
	}
	return findings
}

func policyFindings(path string, err error) (findings []checkFinding) {
	var all policy.Errors
	if !errors.As(err, &all) {
		return []checkFinding{{Level: "error", File: path, Text: err.Error()}}
	}
	for _, e := range all {
		text := e.Msg
		if e.Path != "" {
			text = e.Path + ": " + text
		}
		findings = append(findings, checkFinding{Level: "error", File: e.File, Line: e.Line, Column: e.Column, Text: text})
	}
	return findings
}

func printFindings(w io.Writer, findings []checkFinding, summary, format string) error {
	if format == "json" {
		if findings == nil {
			findings = []checkFinding{}
		}
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(findings)
	}
	for _, f := range findings {
		fmt.Fprintln(w, f)
	}
	if len(findings) == 0 {
		fmt.Fprintf(w, "good: %s\n", summary)
	}
	return nil
}
