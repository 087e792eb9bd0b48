package main

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/report"
)

func newPolicyTest() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "test -f POLICY",
		Short: "Run the tests of a policy",
		Long: `Asks the questions under tests: of the rule files and compares the answers. The
same tests run whenever a proxy loads the files, which refuses a policy that
fails them. In the formats for programs, what keeps the rules from loading is a
failed result each. Exit status: 0 when all passed, 1 when one failed or the rules
cannot be read, 2 for a call that cannot be made sense of.`,
		Example: `  narthex policy test -f rules.yaml
  narthex policy test -f 'policies/*.yaml' --format junit > policy-tests.xml
  narthex policy test -c narthex.yaml -v`,
	}
	var files policyFiles
	files.register(cmd)
	format := cmd.Flags().String("format", "text", strings.Join(report.TestFormats, ", "))
	verbose := cmd.Flags().BoolP("verbose", "v", false, "name the tests that passed too")
	completeWords(cmd, "format", report.TestFormats...)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !slices.Contains(report.TestFormats, *format) {
			return usageError{fmt.Errorf("--format %q: want %s", *format, strings.Join(report.TestFormats, ", "))}
		}
		run := report.TestRun{Verbose: *verbose}
		rules, err := files.read()
		switch usage := (usageError{}); {
		case err != nil && (*format == "text" || errors.As(err, &usage)):
			return err
		case err != nil:
			run.Results = files.unloaded(err)
		}
		for _, r := range rules.Test() {
			run.Results = append(run.Results, report.TestResult{
				Name: r.Name, File: r.File, Line: r.Line, Column: r.Column,
				Passed: len(r.Failures) == 0, Failures: r.Failures, Duration: r.Duration,
			})
		}
		if err := run.Write(cmd.OutOrStdout(), *format); err != nil {
			return err
		}
		if !run.Passed() {
			return exitError{exitFailure}
		}
		return nil
	}
	return cmd
}

// unloaded returns a failed result for each error that keeps the rules from
// loading, so that a pipeline has a report of them too.
func (f *policyFiles) unloaded(err error) []report.TestResult {
	from := cmp.Or(f.config, strings.Join(f.patterns, " "))
	findings := policyFindings(from, err)
	if all := (*config.Error)(nil); errors.As(err, &all) {
		findings = configFindings(from, ruleConfigSyntax, err)
	}
	results := make([]report.TestResult, len(findings))
	for i := range findings {
		one := &findings[i]
		text := one.Text
		if one.Path != "" {
			text = one.Path + ": " + text
		}
		results[i] = report.TestResult{Name: "load " + one.File, File: one.File, Line: one.Line, Column: one.Column, Failures: []string{text}}
	}
	return results
}
