package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// runImport calls `policy import` with arguments and standard input.
func runImport(t *testing.T, stdin string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	parent := &cobra.Command{Use: "policy", SilenceErrors: true, SilenceUsage: true}
	parent.AddCommand(newPolicyImport())
	var out, errs bytes.Buffer
	parent.SetArgs(append([]string{"import"}, args...))
	parent.SetIn(strings.NewReader(stdin))
	parent.SetOut(&out)
	parent.SetErr(&errs)
	err = parent.Execute()
	return out.String(), errs.String(), err
}

const (
	importAllow  = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: shop}\nspec: {rules: [{from: [{source: {namespaces: [shop]}}]}]}\n"
	importSuffix = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: b, namespace: shop}\nspec: {action: ACTION, rules: [{from: [{source: {principals: [\"*b\"]}}]}]}\n"
)

func TestPolicyImport(t *testing.T) {
	t.Parallel()
	istio := []string{"istio", "--trust-domain", "example.org", "-"}
	for _, tc := range []struct {
		name, stdin    string
		args           []string
		stdout, stderr string // parts; empty: nothing is there
		exit           int
	}{
		{"good", importAllow, istio, `from: ["spiffe://example.org/ns/shop/sa/*"]`, "", exitOK},
		{"refused", importAllow + strings.Replace(importSuffix, "ACTION", "ALLOW", 1), istio, "", "stdin:9:62: AuthorizationPolicy shop/b: spec.rules[0].from[0].source.principals: \"*b\"", exitFailure},
		{"partial", importAllow + strings.Replace(importSuffix, "ACTION", "ALLOW", 1), append(istio, "--partial"), "#   stdin:9:62: AuthorizationPolicy shop/b", "1 thing not imported", exitOK},
		{"partial of a deny", importAllow + strings.Replace(importSuffix, "ACTION", "DENY", 1), append(istio, "--partial"), "", "the rules would allow what the input denies", exitFailure},
		{"no trust domain", importAllow, []string{"istio", "-"}, "", "", exitUsage},
		{"no file", "", []string{"istio", "--trust-domain", "example.org"}, "", "", exitUsage},
		{"to", "", append(istio, "--to", "x"), "", "", exitUsage},
		{"consul", "Kind = \"service-intentions\"\nName = \"api\"\nSources { Name = \"web\"\n Action = \"allow\" }\n", []string{"consul", "--trust-domain", "x.consul", "-"}, `to: ["spiffe://x.consul/ns/default/dc/*/svc/api"]`, "", exitOK},
		{"consul without identities", "", []string{"consul", "-"}, "", "", exitUsage},
		{"ghostunnel", "", []string{"ghostunnel", "--", "server", "--allow-uri", "spiffe://example.org/a"}, `from: ["spiffe://example.org/a"]`, "", exitOK},
		{"ghostunnel from a file", "server --allow-cn a", []string{"ghostunnel", "-"}, "", "stdin:1:8: server: --allow-cn", exitFailure},
		{"ghostunnel with both", "", []string{"ghostunnel", "-", "--", "server"}, "", "", exitUsage},
		{"ghostunnel without", "", []string{"ghostunnel"}, "", "", exitUsage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, err := runImport(t, tc.stdin, tc.args...)
			exit := exitOK
			var failed exitError
			var usage usageError
			switch {
			case errors.As(err, &failed):
				exit = failed.code
			case errors.As(err, &usage):
				exit = exitUsage
			case err != nil:
				t.Fatal(err)
			}
			if exit != tc.exit || !strings.Contains(stdout, tc.stdout) || !strings.Contains(stderr, tc.stderr) ||
				tc.stdout == "" && stdout != "" || tc.stderr == "" && stderr != "" {
				t.Errorf("exit %d (%v)\nstdout:\n%s\nstderr:\n%s", exit, err, stdout, stderr)
			}
		})
	}
}

func TestPolicyImportFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	big := filepath.Join(dir, "big.yaml")
	f, err := os.Create(big)
	if err == nil {
		err = f.Truncate(17 << 20)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for name, want := range map[string]string{
		big:                      "16 MiB can be imported",
		dir:                      "is not a plain file",
		filepath.Join(dir, "no"): "no such file",
	} {
		stdout, _, err := runImport(t, "", "istio", "--trust-domain", "example.org", name)
		if err == nil || !strings.Contains(err.Error(), want) || stdout != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
