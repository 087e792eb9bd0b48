package main

import "github.com/spf13/cobra"

// newPolicy is the parent of the commands that work on rule files, without a
// running proxy.
func newPolicy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Work on rule files",
		Long: `Commands for those who write rules. They read rule files, and access logs; none
asks a running proxy.`,
		Example: `  narthex policy test -f rules.yaml                        run the tests of a policy
  narthex policy explain -f rules.yaml --as ID --to ID     what is decided, and why
  narthex policy diff old.yaml new.yaml                    which decisions change
  narthex policy suggest access.log                        rules for what was seen
  narthex policy fmt rules.yaml                            lay a rule file out as all others are
  narthex policy import istio --trust-domain example.org policies.yaml  rules of other products as ours`,
		RunE: whichCommand,
	}
	cmd.AddCommand(
		newPolicyTest(), newPolicyExplain(), newPolicyDiff(), newPolicySuggest(), newPolicyFmt(), newPolicyImport(),
	)
	return cmd
}
