package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/policy/importer"
)

// newPolicyImport makes `narthex policy import`, one command below it for each
// product.
func newPolicyImport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import",
		Short: "Make a rule file of the rules of another product",
		Long: `Reads the access rules of another product and prints a rule file that means
exactly the same, in the form that policy fmt gives it. What the rules cannot say
is refused, with its file, line and the reason, and never said nearly: then
nothing is printed, and the exit status is 1. With --partial, what can be said is
printed as long as leaving out the rest allows nothing more, and the rest is there
as comments.`,
		Example: `  kubectl get authorizationpolicies -A -o yaml | narthex policy import istio --trust-domain example.org -
  narthex policy import consul --trust-domain 1234.consul intentions/*.hcl
  narthex policy import ghostunnel -- server --allow-uri 'spiffe://example.org/ns/*/sa/web'`,
		Args: importArgs(cobra.NoArgs),
		RunE: whichCommand,
	}
	cmd.AddCommand(newImportIstio(), newImportConsul(), newImportGhostunnel())
	return cmd
}

// importArgs has calls with wrong arguments end as every other one does that
// cannot be made sense of.
func importArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{err}
		}
		return nil
	}
}

func newImportIstio() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "istio FILE…",
		Short: "Import AuthorizationPolicy objects of Istio",
		Long: `Reads AuthorizationPolicy objects (security.istio.io/v1 and v1beta1) from YAML or
JSON files, lists included, and prints the rules that they are. A file named -
is standard input. Give all policies of the mesh at once: an ALLOW policy closes
what it selects, and whether one does is asked of all of them.`,
		Example: `  narthex policy import istio --trust-domain example.org policies.yaml > rules.yaml
  narthex policy import istio --trust-domain example.org --to shop/orders=spiffe://example.org/ns/shop/sa/orders policies.yaml
  kubectl get authorizationpolicies -A -o json | narthex policy import istio --trust-domain example.org --partial -`,
		Args: importArgs(cobra.MinimumNArgs(1)),
	}
	var o importer.IstioOptions
	flags := cmd.Flags()
	flags.StringArrayVar(&o.TrustDomains, "trust-domain", nil, "a trust domain that the proxies trust; the mesh's own is the first (required, can be repeated)")
	flags.StringVar(&o.MeshTrustDomain, "mesh-trust-domain", "cluster.local", "the name that the mesh's own trust domain has in Istio")
	flags.StringVar(&o.RootNamespace, "root-namespace", "istio-system", "the namespace whose policies apply to all")
	flags.StringVar(&o.Namespace, "namespace", "", "the namespace of policies that name none")
	to := flags.StringArray("to", nil, "NAMESPACE/POLICY=SPIFFE-ID: who the workloads are that a policy selects by labels or references (can be repeated)")
	flags.BoolVar(&o.InboundOnly, "inbound-only", false, "leave out the rule by which the calling end asks nothing")
	partial := partialFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(o.TrustDomains) == 0 {
			return usageError{errors.New("no trust domain: give --trust-domain example.org")}
		}
		o.To = map[string][]string{}
		for _, given := range *to {
			name, id, ok := strings.Cut(given, "=")
			if !ok || strings.Count(name, "/") != 1 {
				return usageError{fmt.Errorf("--to %q: want NAMESPACE/POLICY=SPIFFE-ID", given)}
			}
			o.To[name] = append(o.To[name], id)
		}
		files, err := readImports(cmd, args)
		if err != nil {
			return err
		}
		return printImport(cmd, importer.Istio(files, o), *partial)
	}
	return cmd
}

func newImportConsul() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "consul FILE…",
		Short: "Import service intentions of Consul",
		Long: `Reads configuration entries of kind service-intentions from HCL or JSON files, and
ServiceIntentions objects of Kubernetes from YAML or JSON, and prints the rules
that they are. A file named - is standard input. Give all entries at once: which
intention comes first is asked of all of them.`,
		Example: `  consul config read -kind service-intentions -name api | narthex policy import consul --trust-domain 1234.consul -
  narthex policy import consul --template 'spiffe://example.org/ns/{namespace}/sa/{name}' intentions/*.hcl`,
		Args: importArgs(cobra.MinimumNArgs(1)),
	}
	var o importer.ConsulOptions
	flags := cmd.Flags()
	flags.StringVar(&o.TrustDomain, "trust-domain", "", "the trust domain, whose services are spiffe://DOMAIN/ns/{namespace}/dc/*/svc/{name}")
	flags.StringVar(&o.Template, "template", "", "the SPIFFE ID of a service, where it is another: {namespace} and {name} stand for whole segments")
	flags.BoolVar(&o.InboundOnly, "inbound-only", false, "leave out the rule by which the calling end asks nothing")
	partial := partialFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if (o.TrustDomain == "") == (o.Template == "") {
			return usageError{errors.New("give one of --trust-domain and --template, which say what the SPIFFE IDs of services are")}
		}
		files, err := readImports(cmd, args)
		if err != nil {
			return err
		}
		return printImport(cmd, importer.Consul(files, o), *partial)
	}
	return cmd
}

func newImportGhostunnel() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ghostunnel FILE | -- server|client FLAG…",
		Short: "Import the access flags of a ghostunnel",
		Long: `Reads the command line of one ghostunnel, given after -- or in a file as a shell
or a unit file has it, and prints the rule that its access flags are. A file
named - is standard input. Flags that have no part in access are passed over.`,
		Example: `  narthex policy import ghostunnel --listener inventory -- server --allow-uri spiffe://example.org/ns/shop/sa/orders
  narthex policy import ghostunnel --trust-domain example.org ghostunnel.args`,
		Args: func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); dash > 0 || dash < 0 && len(args) != 1 || dash == 0 && len(args) == 0 {
				return usageError{errors.New("give one file, or the flags of one ghostunnel after --")}
			}
			return nil
		},
	}
	var o importer.GhostunnelOptions
	flags := cmd.Flags()
	flags.StringArrayVar(&o.TrustDomains, "trust-domain", nil, "a trust domain that the proxy trusts, its own first; needed for --allow-all and for a client (can be repeated)")
	flags.StringVar(&o.Listener, "listener", "", "the listener that the rule is for; left out: all")
	partial := partialFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		input := importer.CommandLine(args)
		if cmd.ArgsLenAtDash() < 0 {
			files, err := readImports(cmd, args)
			if err != nil {
				return err
			}
			input = files[0]
		}
		return printImport(cmd, importer.Ghostunnel(input, o), *partial)
	}
	return cmd
}

func partialFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("partial", false, "print what can be said, if leaving out the rest allows nothing more")
}

// readImports reads the files, and no more than can be imported.
func readImports(cmd *cobra.Command, names []string) ([]importer.Input, error) {
	files := make([]importer.Input, 0, len(names))
	left := int64(importer.MaxSize)
	for _, name := range names {
		data, err := readImport(cmd, name, left+1)
		if err != nil {
			return nil, fmt.Errorf("read rules to import: %w", err)
		}
		if left -= int64(len(data)); left < 0 {
			return nil, fmt.Errorf("read rules to import: %s: too large: %d MiB can be imported at once", name, importer.MaxSize>>20)
		}
		if name == "-" {
			name = "stdin"
		}
		files = append(files, importer.Input{Name: name, Data: data})
	}
	return files, nil
}

// readImport reads a file up to a limit. What is not a plain file is refused:
// reading it may never end.
func readImport(cmd *cobra.Command, name string, limit int64) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(cmd.InOrStdin(), limit))
	}
	info, err := os.Stat(name)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a plain file", name)
	}
	if err != nil {
		return nil, err
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// printImport prints the rules, or why there are none.
func printImport(cmd *cobra.Command, r *importer.Result, partial bool) error {
	errOut := cmd.ErrOrStderr()
	if !r.Refused(partial) {
		if _, err := policy.Parse("rules", r.Text); err != nil {
			return fmt.Errorf("the rules that come of it cannot be loaded, so that nothing was printed: %w", err)
		}
		text, err := policy.Format("rules", r.Text)
		if err != nil {
			return fmt.Errorf("the rules that come of it have no canonical form, so that nothing was printed: %w", err)
		}
		if len(r.Refusals) > 0 {
			fmt.Fprintf(errOut, "%s not imported; the output has them as comments\n", count(len(r.Refusals), "thing"))
		}
		_, err = cmd.OutOrStdout().Write(text)
		return err
	}
	for i := range r.Refusals {
		fmt.Fprintln(errOut, r.Refusals[i].String())
	}
	switch {
	case partial:
		fmt.Fprintln(errOut, "nothing was printed: without some of these, the rules would allow what the input denies")
	case !slices.ContainsFunc(r.Refusals, func(f importer.Refusal) bool { return f.Widens }):
		fmt.Fprintln(errOut, "nothing was printed; --partial prints the rest, which allows less")
	default:
		fmt.Fprintln(errOut, "nothing was printed")
	}
	return exitError{exitFailure}
}
