package main

import "github.com/narthex-id/narthex/internal/report"

// The kinds of findings of `narthex check`. People silence findings by these
// names, so none ever changes its meaning.
const (
	ruleConfigUnreadable = "config-unreadable"
	ruleConfigSyntax     = "config-syntax"
	ruleConfigDoubtful   = "config-doubtful"
	ruleNoPolicyFile     = "no-policy-file"
	rulePolicyUnreadable = "policy-unreadable"
	rulePolicySyntax     = "policy-syntax"
	rulePolicyTest       = "policy-test"
	ruleNothingAllowed   = "nothing-allowed"
	ruleUnknownListener  = "unknown-listener"
	ruleUnreachable      = "unreachable-rule"
	ruleDuplicate        = "duplicate-rule"
	ruleUnusedGroup      = "unused-group"
	ruleIncomplete       = "incomplete"
	ruleTestListener     = "test-listener"
	ruleUnusualMethod    = "unusual-method"
	ruleHTTPInvisible    = "http-not-visible"
	ruleSubjectInvisible = "subject-not-visible"
	ruleGRPCAbsent       = "grpc-absent"
	ruleLimitOutbound    = "limit-outbound"
	rulePlaintextRefused = "plaintext-refused"
	rulePlaintextAbsent  = "plaintext-absent"
	ruleHostFile         = "host-file"
	ruleHostUser         = "host-user"
	ruleHostRoot         = "host-root"
	ruleHostCRL          = "host-crl"
	ruleHostIdentity     = "host-identity"
	ruleHostKeyMode      = "host-key-mode"
)

// checkRules describes them, as docs/ci.md does.
var checkRules = []report.Rule{
	{ID: ruleConfigUnreadable, Text: "The configuration file cannot be read."},
	{ID: ruleConfigSyntax, Text: "The configuration has an unknown key, a wrong value or a combination that cannot be."},
	{ID: ruleConfigDoubtful, Text: "The configuration starts, and likely does something else than was meant."},
	{ID: ruleNoPolicyFile, Text: "A pattern of proxy.policies names no rule file."},
	{ID: rulePolicyUnreadable, Text: "A rule file cannot be read."},
	{ID: rulePolicySyntax, Text: "A rule file has an unknown key, a wrong value or a combination that cannot be."},
	{ID: rulePolicyTest, Text: "A test that stands beside the rules fails."},
	{ID: ruleNothingAllowed, Text: "No rule allows anything."},
	{ID: ruleUnknownListener, Text: "A rule names a listener that this configuration does not have."},
	{ID: ruleUnreachable, Text: "An allow can never decide: a deny, a revocation or a ceiling covers all of it."},
	{ID: ruleDuplicate, Text: "Two rules say the same."},
	{ID: ruleUnusedGroup, Text: "No rule and no limit names a group."},
	{ID: ruleIncomplete, Text: "The policy is too large to compare all of its rules with each other."},
	{ID: ruleTestListener, Text: "A test asks at a listener that no rule and no limit names."},
	{ID: ruleUnusualMethod, Text: "A rule asks for a method that HTTP does not have."},
	{ID: ruleHTTPInvisible, Text: "A rule asks for HTTP at a listener where it is not visible."},
	{ID: ruleSubjectInvisible, Text: "A rule asks whom a request speaks for at a listener that looks for no JWT-SVIDs."},
	{ID: ruleGRPCAbsent, Text: "A rule allows gRPC calls at a listener that takes no HTTP/2."},
	{ID: ruleLimitOutbound, Text: "A limit names a listener that is outbound, where it limits nothing."},
	{ID: rulePlaintextRefused, Text: "A listener is permissive, and no rule can allow plaintext there."},
	{ID: rulePlaintextAbsent, Text: "A rule allows plaintext on a listener where none comes."},
	{ID: ruleHostFile, Text: "A file that the configuration names cannot be read on this host."},
	{ID: ruleHostUser, Text: "The user that the proxy becomes is not on this host."},
	{ID: ruleHostRoot, Text: "Started as root, `narthex run` would have no user for the proxy, or root."},
	{ID: ruleHostCRL, Text: "The CRLs of a trust domain cannot be used."},
	{ID: ruleHostIdentity, Text: "The identity files do not fit together, or are not whom a listener is to be."},
	{ID: ruleHostKeyMode, Text: "Every user of this host can read the private key."},
}
