package main

import "github.com/spf13/cobra"

// newPolicy is the parent of the commands that work on rule files alone,
// without a configuration or a running proxy.
func newPolicy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Work on rule files",
		Long:  `Commands for those who write rules. They read rule files alone, no narthex.yaml.`,
		Example: `  narthex policy fmt rules.yaml              lay a rule file out as all others are
  narthex policy fmt --check rules/*.yaml    are they? For CI`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		newPolicyFmt(), newPolicyTest(), newPolicyExplain(), newPolicyImport(),
	)
	return cmd
}
