package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/bootstrap"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/report"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

func newCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check -c narthex.yaml",
		Short: "Check configuration and rules, for people and CI",
		Long: `Reads narthex.yaml and every rule file it names, and prints what is wrong with
its file, line and column. Errors keep Narthex from starting; warnings do not.
With --host, identity files and CRLs are read as the proxy would read them, and the
bundle and join token as the agent would. Root is told too where proxy.user is missing.
Exit status: 0 when nothing was found, 1 with findings, 2 for a call that
cannot be made sense of. --level error lets warnings pass, as one rule file for
many nodes has them by its nature. --format sarif is for code scanning, junit
for the test report of a pipeline, where each file is a test.`,
		Example: `  narthex check -c /etc/narthex/narthex.yaml --host
  narthex check -c narthex.yaml --level error && narthex run -c narthex.yaml
  narthex check -c narthex.yaml --format sarif > narthex.sarif    in CI`,
	}
	path := configFlag(cmd)
	format := cmd.Flags().String("format", "text", "text, json, sarif or junit")
	level := cmd.Flags().String("level", "warning", "the least finding that counts and is shown: warning or error")
	host := cmd.Flags().Bool("host", false, "look at this host too: are the files there and good, is there such a user?")
	completeWords(cmd, "format", report.FindingFormats...)
	completeWords(cmd, "level", "warning", "error")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !slices.Contains(report.FindingFormats, *format) {
			return usageError{fmt.Errorf("--format %q: want one of %s", *format, strings.Join(report.FindingFormats, ", "))}
		}
		if *level != "warning" && *level != "error" {
			return usageError{fmt.Errorf("--level %q: want warning or error", *level)}
		}
		found := checkFiles(*path)
		if *host {
			found.List = append(found.List, checkHost(*path)...)
		}
		found.Keep(report.Level(*level))
		if err := found.Write(cmd.OutOrStdout(), *format); err != nil {
			return err
		}
		if len(found.List) > 0 {
			return exitError{exitFailure}
		}
		return nil
	}
	return cmd
}

// checkFiles reads all there is.
func checkFiles(path string) *report.Findings {
	found := &report.Findings{Version: version, Files: []string{path}, Rules: checkRules}
	if dir, err := os.Getwd(); err == nil {
		found.Dir = dir // else names are shown as they were given
	}
	c, err := config.Load(path)
	if err != nil {
		found.List = configFindings(path, ruleConfigSyntax, err)
		return found
	}
	for i := range c.Warnings {
		found.List = append(found.List, fromConfig(report.Warning, ruleConfigDoubtful, &c.Warnings[i]))
	}
	found.Summary = "agent"
	if c.HasProxy() {
		checkRuleFiles(found, path, c)
	}
	return found
}

// checkRuleFiles reads the rule files that a configuration names.
func checkRuleFiles(found *report.Findings, path string, c *config.Config) {
	files, err := c.PolicyFiles()
	found.Files = append(found.Files, files...)
	if err != nil {
		found.List = append(found.List, configFindings(path, ruleNoPolicyFile, err)...)
		return
	}
	var rules *policy.Policy // nil: there is no listener yet, and no file
	if len(files) > 0 {
		if rules, err = policy.Load(files...); err != nil {
			found.List = append(found.List, policyFindings(path, err)...)
			return
		}
		list := checkLoaded(c, rules)
		slices.SortStableFunc(list, func(a, b report.Finding) int {
			return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		found.List = append(found.List, list...)
	}
	found.Summary = fmt.Sprintf("%s, %s in %s", count(len(c.Proxy.Listeners), "listener"), count(rules.Rules(), "rule"), count(len(files), "file"))
	if n := len(c.Proxy.ExtAuthz); n > 0 {
		found.Summary = fmt.Sprintf("%d ext_authz, %s", n, found.Summary)
	}
	if c.HasAgent() {
		found.Summary = "agent, " + found.Summary
	}
}

// checkLoaded finds what of rules that load was hardly meant for these
// listeners.
func checkLoaded(c *config.Config, rules *policy.Policy) (findings []report.Finding) {
	if rules.Allowing() == 0 && c.Proxy.Decides() {
		what := "every connection will be refused"
		if slices.ContainsFunc(c.Proxy.Listeners, func(l config.Listener) bool { return l.Enforcement == "audit" }) {
			what += ", but on listeners that only audit"
		}
		findings = append(findings, report.Finding{
			Level: report.Warning, Rule: ruleNothingAllowed, File: rules.Files()[0], Text: "no rule allows anything: " + what,
		})
	}
	findings = append(findings, reviewRules(rules)...)
	findings = append(findings, checkVisible(c, rules)...)
	findings = append(findings, checkGRPC(c, rules)...)
	for _, m := range rules.Listeners() {
		if !hasListener(c, m.Listener) {
			findings = append(findings, report.Finding{
				Level: report.Warning, Rule: ruleUnknownListener, File: m.File, Line: m.Line, Column: m.Column,
				Path: "on", Text: fmt.Sprintf("this node has no listener %q", m.Listener),
			})
		}
	}
	findings = append(findings, checkLimits(c, rules)...)
	findings = append(findings, checkPlaintext(c, rules)...)
	return findings
}

// reviewRules finds rules that contradict each other, or that nobody needs.
func reviewRules(rules *policy.Policy) (findings []report.Finding) {
	for _, r := range rules.Review() {
		f := report.Finding{Level: report.Warning, Rule: r.Kind, File: r.File, Line: r.Line, Column: r.Column, Text: r.Msg}
		if r.Kind == ruleIncomplete {
			f.Level = report.Note
		}
		if r.Other.File != "" {
			f.Related = append(f.Related, report.Place{File: r.Other.File, Line: r.Other.Line, Column: r.Other.Column, Text: r.Other.What})
		}
		findings = append(findings, f)
	}
	return findings
}

// checkVisible finds rules that ask for HTTP on listeners that do not see it, or
// whom a request speaks for on listeners that look for no JWT-SVIDs.
func checkVisible(c *config.Config, rules *policy.Policy) (findings []report.Finding) {
	for i := range c.Proxy.Listeners {
		l := &c.Proxy.Listeners[i]
		d := directionOf(l)
		blind, kind, asks := rules.Blind, ruleHTTPInvisible, "for HTTP, which listener %q does not see"
		if l.Protocol == "http" {
			if d == policy.Inbound && l.HTTP.JWT != nil {
				continue
			}
			blind, kind, asks = rules.BlindToSubjects, ruleSubjectInvisible, "whom a request speaks for, and listener %q takes no JWT-SVIDs"
		}
		findings = append(findings, blindTo(blind(l.Name, d, ownIdentity(l)), kind, fmt.Sprintf(asks, l.Name))...)
	}
	for i := range c.Proxy.ExtAuthz {
		name := c.Proxy.ExtAuthz[i].Name
		asks := fmt.Sprintf("whom a request speaks for, and ext_authz %q looks for no JWT-SVIDs", name)
		findings = append(findings, blindTo(rules.BlindToSubjects(name, policy.Inbound, spiffeid.ID{}), ruleSubjectInvisible, asks)...)
	}
	return findings
}

// blindTo says of rules what becomes of them where what they ask for is not
// seen.
func blindTo(rules []policy.RuleNote, kind, asks string) (findings []report.Finding) {
	for _, r := range rules {
		what := "matches whatever is asked"
		if r.Allow {
			what = "never matches"
		}
		findings = append(findings, report.Finding{
			Level: report.Warning, Rule: kind, File: r.File, Line: r.Line, Column: r.Column,
			Text: fmt.Sprintf("rule %s: asks %s: there it %s", r.ID, asks, what),
		})
	}
	return findings
}

// checkGRPC finds rules that allow gRPC calls on listeners where none comes.
func checkGRPC(c *config.Config, rules *policy.Policy) (findings []report.Finding) {
	for i := range c.Proxy.Listeners {
		l := &c.Proxy.Listeners[i]
		if l.Protocol != "http" || slices.Contains(l.HTTP.Versions, config.HTTP2) {
			continue
		}
		for _, r := range rules.AllowingGRPC(l.Name, directionOf(l), ownIdentity(l)) {
			findings = append(findings, report.Finding{
				Level: report.Warning, Rule: ruleGRPCAbsent, File: r.File, Line: r.Line, Column: r.Column,
				Text: fmt.Sprintf("rule %s: allows gRPC calls, which come by HTTP/2, and http.versions of listener %q are without h2", r.ID, l.Name),
			})
		}
	}
	return findings
}

func directionOf(l *config.Listener) policy.Direction {
	if l.Direction == "outbound" {
		return policy.Outbound
	}
	return policy.Inbound
}

// checkLimits finds limits on listeners that have none: they bound what peers
// do here, at the inbound end.
func checkLimits(c *config.Config, rules *policy.Policy) (findings []report.Finding) {
	outbound := map[string]bool{}
	for i := range c.Proxy.Listeners {
		if l := &c.Proxy.Listeners[i]; l.Direction == "outbound" {
			outbound[l.Name] = true
		}
	}
	for _, m := range rules.LimitListeners() {
		if outbound[m.Listener] {
			findings = append(findings, report.Finding{
				Level: report.Warning, Rule: ruleLimitOutbound, File: m.File, Line: m.Line, Column: m.Column,
				Text: fmt.Sprintf("limit %s: listener %q is outbound, where it limits nothing: limits are for inbound listeners", m.Rule, m.Listener),
			})
		}
	}
	return findings
}

// ownIdentity returns whom a listener is to be; zero where the configuration
// does not say.
func ownIdentity(l *config.Listener) spiffeid.ID {
	if l.Identity == nil {
		return spiffeid.ID{}
	}
	return l.Identity.SPIFFEID
}

// checkPlaintext finds permissive listeners that no rule lets plaintext
// through, and rules that allow plaintext where none comes.
func checkPlaintext(c *config.Config, rules *policy.Policy) (findings []report.Finding) {
	listeners := map[string]*config.Listener{}
	for i := range c.Proxy.Listeners {
		l := &c.Proxy.Listeners[i]
		listeners[l.Name] = l
		if l.Mode == "permissive" && l.Enforcement == "enforce" && !rules.AllowsUnauthenticated(l.Name, ownIdentity(l)) {
			f := c.Finding(fmt.Sprintf("proxy.listeners[%d].mode", i), "permissive, but no rule can allow plaintext here: it needs an allow with from: [unauthenticated]")
			findings = append(findings, fromConfig(report.Warning, rulePlaintextRefused, &f))
		}
	}
	for _, m := range rules.Unauthenticated() {
		what := ""
		switch l := listeners[m.Listener]; {
		case l == nil && extAuthzNamed(c, m.Listener) != nil:
			what = "answers for peers that Envoy has authenticated"
		case l == nil: // another node's
		case l.Direction == "outbound":
			what = "is outbound and comes from our own SVID"
		case l.Mode == "strict":
			what = "is strict and takes none"
		}
		if what != "" {
			findings = append(findings, report.Finding{
				Level: report.Warning, Rule: rulePlaintextAbsent, File: m.File, Line: m.Line, Column: m.Column,
				Text: fmt.Sprintf("rule %s: allows plaintext on listener %q, which %s", m.Rule, m.Listener, what),
			})
		}
	}
	return findings
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// hostCheck gathers what a configuration needs of the host it runs on, and
// does not find there.
type hostCheck struct {
	config   *config.Config
	findings []report.Finding
}

func checkHost(path string) []report.Finding {
	c, err := config.Load(path)
	if err != nil {
		return nil // said by checkFiles
	}
	h := &hostCheck{config: c}
	h.agent()
	h.proxy()
	return h.findings
}

func (h *hostCheck) report(rule, key string, err error) {
	f := h.config.Finding(key, "%v", err)
	h.findings = append(h.findings, fromConfig(report.Error, rule, &f))
}

// readable reports whether a file is one that can be read.
func (h *hostCheck) readable(key string, file config.File) bool {
	if file == "" {
		return true
	}
	f, err := os.Open(string(file))
	if err != nil {
		h.report(ruleHostFile, key, err)
		return false
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && !info.Mode().IsRegular() {
		h.report(ruleHostFile, key, fmt.Errorf("%s is not a plain file", file))
		return false
	}
	return true
}

func (h *hostCheck) agent() {
	a := h.config.Agent
	if a == nil {
		return
	}
	if b := a.Server.Bundle; b != nil && b.File != "" && h.readable("agent.server.bundle.file", b.File) {
		if err := parseBundle(b); err != nil {
			h.report(ruleHostFile, "agent.server.bundle.file", err)
		}
	}
	if t := a.NodeAttestor.JoinToken; t != nil && t.TokenFile != "" && h.readable("agent.node_attestor.join_token.token_file", t.TokenFile) {
		if _, err := (attestor.JoinToken{File: string(t.TokenFile)}).Begin(context.Background()); err != nil {
			h.report(ruleHostFile, "agent.node_attestor.join_token.token_file", err)
		}
	}
	if x := a.NodeAttestor.X509PoP; x != nil {
		h.readable("agent.node_attestor.x509pop.key", x.Key)
		h.readable("agent.node_attestor.x509pop.certificate", x.Certificate)
		h.readable("agent.node_attestor.x509pop.intermediates", x.Intermediates)
	}
}

// parseBundle reads a bundle as the agent would at first contact.
func parseBundle(b *config.ServerBundle) error {
	f, err := os.Open(string(b.File))
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, bootstrap.MaxSize))
	if err == nil {
		_, err = bootstrap.Parse(data, b.Format)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", b.File, err)
	}
	return nil
}

func (h *hostCheck) proxy() {
	p := h.config.Proxy
	if p == nil {
		return
	}
	h.user(p.User)
	files := crlFiles(h.config)
	for _, td := range slices.SortedFunc(maps.Keys(files), spiffeid.TrustDomain.Compare) {
		if err := identity.CheckCRLs(files[td]); err != nil {
			h.report(ruleHostCRL, "proxy.crls."+td.Name(), err)
		}
	}
	if p.Files != nil {
		h.identity(p.Files)
	}
}

// user sees whom the proxy is to become. A file with both halves is for `narthex
// run`, and who checks it as root starts it as root.
func (h *hostCheck) user(name string) {
	if os.Geteuid() == 0 && h.config.HasAgent() {
		_, err := proxyAccount(h.config)
		switch {
		case errors.Is(err, errNoProxyUser), errors.Is(err, errProxyIsRoot):
			h.report(ruleHostRoot, "proxy.user", err)
		case err != nil:
			h.report(ruleHostUser, "proxy.user", err)
		}
		return
	}
	if name == "" {
		return
	}
	if _, err := lookupAccount(name); err != nil {
		h.report(ruleHostUser, "proxy.user", err)
	}
}

// identity reads the proxy's own files as it would, since those that do not
// fit together keep every listener from serving.
func (h *hostCheck) identity(f *config.Files) {
	good := h.readable("proxy.files.cert", f.Cert)
	good = h.readable("proxy.files.key", f.Key) && good
	good = h.readable("proxy.files.bundle", f.Bundle) && good
	for _, td := range slices.SortedFunc(maps.Keys(f.Bundles), spiffeid.TrustDomain.Compare) {
		good = h.readable("proxy.files.bundles."+td.Name(), f.Bundles[td]) && good
	}
	if !good {
		return
	}
	id, err := identity.CheckFiles(identity.FilesConfig{TrustDomain: h.config.TrustDomain, FilePaths: identityFiles(f)})
	if err != nil {
		at := h.config.Finding("proxy.files", "%v", err)
		at.Key = "" // the error names the key and the file
		h.findings = append(h.findings, fromConfig(report.Error, ruleHostIdentity, &at))
		return
	}
	if info, err := os.Stat(string(f.Key)); err == nil && info.Mode().Perm()&0o004 != 0 {
		at := h.config.Finding("proxy.files.key", "every user of this host can read %s, and so be %s; take that from them: chmod o-r", f.Key, id)
		h.findings = append(h.findings, fromConfig(report.Warning, ruleHostKeyMode, &at))
	}
	for i := range h.config.Proxy.Listeners {
		h.present(fmt.Sprintf("proxy.listeners[%d]", i), h.config.Proxy.Listeners[i].Identity, id)
	}
	for i := range h.config.Proxy.ExtAuthz {
		h.present(fmt.Sprintf("proxy.ext_authz[%d]", i), h.config.Proxy.ExtAuthz[i].Identity, id)
	}
}

// present finds an identity that is asked for and is not the one there is.
func (h *hostCheck) present(key string, want *config.ListenerIdentity, have spiffeid.ID) {
	if want != nil && !want.SPIFFEID.IsZero() && want.SPIFFEID != have {
		h.report(ruleHostIdentity, key+".identity.spiffe_id", fmt.Errorf("%s is not whom the certificate is of, %s (%s): the listener would wait for ever", want.SPIFFEID, have, h.config.Proxy.Files.Cert))
	}
}

// hasListener reports whether rules can be asked at something of that name.
func hasListener(c *config.Config, name string) bool {
	for i := range c.Proxy.Listeners {
		if c.Proxy.Listeners[i].Name == name {
			return true
		}
	}
	return extAuthzNamed(c, name) != nil
}

func fromConfig(level report.Level, rule string, f *config.Finding) report.Finding {
	return report.Finding{Level: level, Rule: rule, File: f.File, Line: f.Line, Column: f.Column, Path: f.Key, Text: f.Problem}
}

func configFindings(path, rule string, err error) (findings []report.Finding) {
	var all *config.Error
	if !errors.As(err, &all) {
		return []report.Finding{{Level: report.Error, Rule: ruleConfigUnreadable, File: path, Text: err.Error()}}
	}
	for i := range all.Findings {
		findings = append(findings, fromConfig(report.Error, rule, &all.Findings[i]))
	}
	return findings
}

func policyFindings(path string, err error) (findings []report.Finding) {
	var all policy.Errors
	if !errors.As(err, &all) {
		return []report.Finding{{Level: report.Error, Rule: rulePolicyUnreadable, File: path, Text: err.Error()}}
	}
	for _, e := range all {
		rule := rulePolicySyntax
		switch {
		case all[0].Test: // the last may only say how many more there are
			rule = rulePolicyTest
		case e.Unwrap() != nil:
			rule = rulePolicyUnreadable
		}
		findings = append(findings, report.Finding{
			Level: report.Error, Rule: rule, File: cmp.Or(e.File, path), Line: e.Line, Column: e.Column, Path: e.Path, Text: e.Msg,
		})
	}
	return findings
}
