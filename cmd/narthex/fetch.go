package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/fetch"
	"github.com/narthex-id/narthex/internal/fileset"
)

// defaultWorkloadAPI is where the Workload API is asked when nobody says
// otherwise: the default of agent.workload_api.socket.
const defaultWorkloadAPI = "unix:/run/narthex/public/api.sock"

func newFetch() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fetch",
		Short: "Show, or write to files, what this process is given by the Workload API",
		Long: `Asks a SPIFFE Workload API, ours or any other agent's, what it gives this process,
and prints it, or writes it to files and keeps them current.
Exit status: 0 when it was given, 1 when there is nothing for this process, 2 when
the call cannot be made sense of, 3 when nobody answers within --timeout.`,
		Example: `  narthex fetch x509                                  what am I?
  narthex fetch jwt --audience orders
  narthex fetch x509 --write /run/certs --watch -- nginx -g 'daemon off;'`,
		RunE: whichCommand,
	}
	cmd.AddCommand(
		newFetchKind(fetch.X509, "Fetch X.509-SVIDs", `Prints the X.509-SVIDs of this process. With --write DIR it writes svid.pem (the
chain), svid_key.pem (PKCS#8), bundle.pem, and bundle.TRUST-DOMAIN.pem for each
trust domain that is federated with: of the first identity, of the one that --id or
--hint names, or with --all of each, in a directory by its hint or path.`, `  narthex fetch x509 --socket unix:/run/spire/agent-sockets/api.sock
  narthex fetch x509 --write /run/certs --mode 0640 --owner root:postgres
  narthex fetch x509 --write /run/certs --watch --exec 'systemctl reload haproxy'
  narthex fetch x509 --write /run/certs --watch --signal HUP --pid-file /run/postgresql/16-main.pid
  narthex fetch x509 --write /run/certs -- nginx -g 'daemon off;'`),
		newFetchKind(fetch.JWT, "Fetch JWT-SVIDs", `Prints JWT-SVIDs for an audience: whoever has one is this process to that audience
until it ends. With --write DIR it writes jwt_svid.token and jwt_bundle.json, a JWK
Set, and does not print them.`, `  narthex fetch jwt --audience spiffe://example.org/orders
  narthex fetch jwt --audience vault --write /run/tokens --watch
  narthex fetch jwt --audience vault --format json | jq -r '.identities[0].token'`),
		newFetchKind(fetch.WIT, "Fetch WIT-SVIDs", `Prints WIT-SVIDs. With --write DIR it writes wit_svid.token, wit_svid_key.pem, whose
possession has to be proven with it, and wit_bundle.json, a JWK Set. The profile is
experimental in SPIFFE: not every agent serves it.`, `  narthex fetch wit
  narthex fetch wit --write /run/wit --watch`),
		newFetchKind(fetch.Bundles, "Fetch the bundles of all trust domains", `Prints what peers are verified by. With --write DIR it writes
bundle.TRUST-DOMAIN.pem, jwt_bundle.TRUST-DOMAIN.json and
wit_bundle.TRUST-DOMAIN.json, as far as the agent has them.`, `  narthex fetch bundles
  narthex fetch bundles --write /run/bundles --watch --exec 'systemctl reload haproxy'`),
	)
	return cmd
}

// fetchOptions are the flags of `narthex fetch`.
type fetchOptions struct {
	apiFlags
	request   fetch.Request
	id        string
	format    string
	names     fetch.Names
	write     string
	mode      string
	certMode  string
	owner     string
	watch     bool
	tell      tellOptions
	logLevel  string
	logFormat string
	fileOwner *fileset.Owner
	program   []string
}

func newFetchKind(kind fetch.Kind, short, long, example string) *cobra.Command {
	o := &fetchOptions{request: fetch.Request{Kind: kind}}
	cmd := &cobra.Command{
		Use:     string(kind) + " [flags] [-- PROGRAM ARGUMENT…]",
		Short:   short,
		Long:    long,
		Example: example,
	}
	o.register(cmd)
	// What follows -- is a program's, and nothing else is an argument.
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if dash := cmd.ArgsLenAtDash(); len(args) > 0 && dash != 0 {
			return fmt.Errorf("unknown argument %q: a program to run and its arguments follow --", args[0])
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o.program = args
		if err := o.check(); err != nil {
			return err
		}
		address, err := o.where()
		if err != nil {
			return err
		}
		client, err := fetch.Dial(address)
		if err != nil {
			return usageError{err}
		}
		defer client.Close()
		if o.watch {
			return o.follow(cmd, client)
		}
		return unavailable(cmd, o.once(cmd, client))
	}
	return cmd
}

func (o *fetchOptions) register(cmd *cobra.Command) {
	f := cmd.Flags()
	o.apiFlags.register(cmd)
	if o.request.Kind != fetch.Bundles {
		f.StringVar(&o.id, "id", "", "the identity with this SPIFFE ID alone")
		f.StringVar(&o.request.Hint, "hint", "", "the identity with this hint alone")
		f.BoolVar(&o.names.All, "all", false, "write all identities, each to a directory of its own by its hint or path")
		f.StringVar(&o.names.SVID, "svid-file", "", "name of the SVID's file (default as said above)")
		f.StringVar(&o.names.Bundle, "bundle-file", "", "name of the bundle's file")
		f.StringVar(&o.mode, "mode", "0600", "mode of keys and tokens")
	}
	switch o.request.Kind {
	case fetch.JWT:
		f.StringSliceVar(&o.request.Audience, "audience", nil, "whom the token is for; several are separated by commas (required)")
	case fetch.X509:
		f.BoolVar(&o.names.Federated, "include-federated", false, "put the authorities of all trust domains in the bundle's file too: whoever reads it cannot tell any more whose they are")
	}
	if o.request.Kind == fetch.X509 || o.request.Kind == fetch.WIT {
		f.StringVar(&o.names.Key, "key-file", "", "name of the private key's file")
	}
	f.StringVar(&o.format, "format", "text", "text or json")
	f.StringVar(&o.write, "write", "", "directory to write to, as one set: ..data is a symbolic link that is replaced")
	f.StringVar(&o.certMode, "cert-mode", "0644", "mode of certificates and bundles")
	f.StringVar(&o.owner, "owner", "", "user, user:group or :group to give the files to")
	f.BoolVar(&o.watch, "watch", false, "stay, and print or write again after each change")
	o.tell.register(cmd)
	f.StringVar(&o.logLevel, "log-level", "info", "with --watch: debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", "text", "with --watch: text or json")
	completeWords(cmd, "format", "text", "json")
	completeWords(cmd, "log-level", "debug", "info", "warn", "error")
	completeWords(cmd, "log-format", "text", "json")
	if err := cmd.MarkFlagDirname("write"); err != nil {
		panic(err) // a flag that is not there: a mistake in the program
	}
}

// check makes sense of the flags.
func (o *fetchOptions) check() error {
	if o.format != "text" && o.format != "json" {
		return usageError{fmt.Errorf("--format %q: want text or json", o.format)}
	}
	if o.request.Kind == fetch.JWT && (len(o.request.Audience) == 0 || slices.Contains(o.request.Audience, "")) {
		return usageError{errors.New("--audience is missing: a token is for somebody, such as --audience orders")}
	}
	if o.id != "" {
		id, err := spiffeid.FromString(o.id)
		if err != nil {
			return usageError{fmt.Errorf("--id %q: %w", o.id, err)}
		}
		o.request.ID = id
	}
	if err := o.checkFiles(); err != nil {
		return usageError{err}
	}
	if len(o.program) > 0 {
		o.watch = true
	}
	if err := o.tell.check(len(o.program) > 0); err != nil {
		return usageError{err}
	}
	if o.write == "" && (len(o.program) > 0 || o.tell.any()) {
		return usageError{errors.New("nobody is told of files where none are written: give --write DIR")}
	}
	if hclog.LevelFromString(o.logLevel) == hclog.NoLevel {
		return usageError{fmt.Errorf("--log-level %q: want debug, info, warn or error", o.logLevel)}
	}
	if o.logFormat != "text" && o.logFormat != "json" {
		return usageError{fmt.Errorf("--log-format %q: want text or json", o.logFormat)}
	}
	return o.checkPrograms()
}

// checkPrograms finds out, before anything is fetched, what cannot be started: to
// try again later would not help.
func (o *fetchOptions) checkPrograms() error {
	for _, p := range []struct {
		from  string
		words []string
	}{{"the program after --", o.program}, {"--exec", o.tell.words}} {
		if len(p.words) == 0 {
			continue
		}
		if _, err := exec.LookPath(p.words[0]); err != nil {
			return usageError{fmt.Errorf("%s: %w: install it, or give its path", p.from, err)}
		}
	}
	return nil
}

func (o *fetchOptions) checkFiles() error {
	for flag, m := range map[string]struct {
		text string
		to   *fs.FileMode
	}{"mode": {o.mode, &o.names.KeyMode}, "cert-mode": {o.certMode, &o.names.CertMode}} {
		if m.text == "" {
			continue
		}
		n, err := strconv.ParseUint(m.text, 8, 12)
		if err != nil || n == 0 {
			return fmt.Errorf("--%s %q: want an octal mode such as 0640", flag, m.text)
		}
		*m.to = fs.FileMode(n)
	}
	if err := o.names.Check(); err != nil {
		return err
	}
	var err error
	o.fileOwner, err = lookupOwner(o.owner)
	return err
}

// lookupOwner reads USER, USER:GROUP or :GROUP, by names or numbers; nil where
// there is none.
func lookupOwner(text string) (*fileset.Owner, error) {
	if text == "" {
		return nil, nil
	}
	name, group, _ := strings.Cut(text, ":")
	owner := &fileset.Owner{UID: -1, GID: -1}
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		owner.UID = int(n) // it need not have a name
	} else if name != "" {
		u, err := lookupAccount(name)
		if err != nil {
			return nil, fmt.Errorf("--owner: %w", err)
		}
		owner.UID = int(u.uid)
	}
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		owner.GID = int(n)
	} else if group != "" {
		g, err := user.LookupGroup(group)
		if err != nil {
			return nil, fmt.Errorf("--owner: look up group %q: %w", group, err)
		}
		if owner.GID, err = strconv.Atoi(g.Gid); err != nil {
			return nil, fmt.Errorf("--owner: look up group %q: %w", group, err)
		}
	}
	return owner, nil
}

// once fetches, writes where that is asked for, and prints.
func (o *fetchOptions) once(cmd *cobra.Command, client *fetch.Client) error {
	stopped, _, stop := untilSignal(cmd.Context(), nil)
	defer stop()
	ctx, cancel := context.WithTimeout(stopped, o.timeout)
	defer cancel()
	given, err := client.Fetch(ctx, o.request)
	if err != nil {
		return err
	}
	var files []fileset.File
	if o.write != "" {
		if files, err = o.names.Files(given); err != nil {
			return err
		}
		if doubt := o.names.Doubt(given); doubt != "" {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s\n", cmd.CommandPath(), doubt)
		}
		dir, err := fileset.Open(o.write, o.fileOwner)
		if err != nil {
			return err
		}
		// The set before is left to whoever is about to open its second file: the
		// next one sweeps it up.
		if err := errors.Join(dir.Put(files), dir.Close()); err != nil {
			return err
		}
		if tell := o.tell.tellers(nil); tell != nil {
			if err := tell(stopped); err != nil {
				return fmt.Errorf("the files are written, but: %w", err)
			}
		}
	}
	return printGiven(cmd.OutOrStdout(), given, o.format, o.write, files)
}

// apiFlags find a Workload API.
type apiFlags struct {
	socket, config string
	timeout        time.Duration
}

func (a *apiFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&a.socket, "socket", "", "where the Workload API is: unix:/path or tcp://IP:port (default $"+workloadapi.SocketEnv+", or "+defaultWorkloadAPI+")")
	f.StringVarP(&a.config, "config", "c", "", "take the socket from this narthex.yaml")
	f.DurationVar(&a.timeout, "timeout", 10*time.Second, "how long to ask while nobody answers; not with --watch")
}

func (a *apiFlags) where() (string, error) {
	if a.timeout <= 0 {
		return "", usageError{fmt.Errorf("--timeout %s: want more than nothing", a.timeout)}
	}
	if a.socket != "" || a.config == "" {
		return cmp.Or(a.socket, os.Getenv(workloadapi.SocketEnv), defaultWorkloadAPI), nil
	}
	c, err := config.Load(a.config)
	switch {
	case err != nil:
		return "", err
	case c.Agent != nil:
		return "unix:" + string(c.Agent.WorkloadAPI.Socket), nil
	case c.Proxy != nil && c.Proxy.WorkloadAPI != nil:
		return "unix:" + string(c.Proxy.WorkloadAPI.Socket), nil
	}
	return "", fmt.Errorf("%s: names no Workload API: give --socket", a.config)
}

// unavailable has the command end with another status where nobody answers.
func unavailable(cmd *cobra.Command, err error) error {
	if !errors.Is(err, fetch.ErrUnavailable) {
		return err
	}
	hint := ""
	if !cmd.Flags().Changed("socket") && !cmd.Flags().Changed("config") && os.Getenv(workloadapi.SocketEnv) == "" {
		hint = "\nThat is the default: --socket, -c narthex.yaml or $" + workloadapi.SocketEnv + " say where another one is."
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s: %v%s\n", cmd.CommandPath(), err, hint)
	return exitError{exitUnavailable}
}
