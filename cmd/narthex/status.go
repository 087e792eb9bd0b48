package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// defaultTelemetry is where status and health ask when nobody says otherwise, and
// addressEnv names the variable that may: it is for containers, of which two of
// a pod share one network and cannot both have the default.
const (
	defaultTelemetry = "127.0.0.1:9901"
	addressEnv       = "NARTHEX_ADDRESS"
)

func newStatus() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show identities, listeners, connections and decisions of a running Narthex",
		Long: `Asks a running Narthex what it presents and until when, which listeners,
endpoints and routes it has and what is wrong with them, which rules, CRLs and
sandbox are in force, who is connected, who speaks plaintext, and whom the rules
would refuse where a listener only audits. JSON has all of it.`,
		Example: `  narthex status                          on $NARTHEX_ADDRESS, or 127.0.0.1:9901
  narthex status -c narthex.yaml --watch
  narthex status --format json`,
	}
	ask := askFlags(cmd)
	format := cmd.Flags().String("format", "text", "text or json")
	completeWords(cmd, "format", "text", "json")
	watch := cmd.Flags().Bool("watch", false, "show it again every two seconds")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *format != "text" && *format != "json" {
			return usageError{fmt.Errorf("--format %q: want text or json", *format)}
		}
		ctx, _, stop := untilSignal(cmd.Context(), nil)
		defer stop()
		for {
			data, err := ask.get(ctx, "/api/v1/status")
			if err != nil {
				return err
			}
			if err := printStatus(cmd.OutOrStdout(), data, *format); err != nil || !*watch {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(2 * time.Second):
			}
		}
	}
	return cmd
}

func newHealth() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "health",
		Short: "Exit 0 when a running Narthex is live, or ready",
		Example: `  narthex health --ready && echo takes connections
  narthex health --address unix:/run/narthex/telemetry.sock`,
	}
	ask := askFlags(cmd)
	ready := cmd.Flags().Bool("ready", false, "ask whether it is ready, not only live")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		path := "/livez"
		if *ready {
			path = "/readyz"
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
		defer cancel()
		data, err := ask.get(ctx, path)
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(data)
		return err
	}
	return cmd
}

// asker finds a running Narthex.
type asker struct{ address, config *string }

func askFlags(cmd *cobra.Command) asker {
	return asker{
		address: cmd.Flags().String("address", "", "host:port or unix:/path of telemetry.listen (default $"+addressEnv+", or "+defaultTelemetry+")"),
		config:  cmd.Flags().StringP("config", "c", "", "read telemetry.listen from this narthex.yaml"),
	}
}

func (a asker) where() (string, error) {
	if *a.address != "" || *a.config == "" {
		return cmp.Or(*a.address, os.Getenv(addressEnv), defaultTelemetry), nil
	}
	c, err := config.Load(*a.config)
	if err != nil {
		return "", err
	}
	if c.Telemetry.Listen == "" {
		return "", fmt.Errorf("%s: telemetry.listen is not set, so there is nobody to ask; write for example telemetry: {listen: %q} and restart", *a.config, defaultTelemetry)
	}
	return string(c.Telemetry.Listen), nil
}

// get asks for a page. The body of an answer other than 200 is the error.
func (a asker) get(ctx context.Context, path string) ([]byte, error) {
	address, err := a.where()
	if err != nil {
		return nil, err
	}
	network, addr, host := "tcp", address, address
	if socket, ok := strings.CutPrefix(address, "unix:"); ok {
		network, addr, host = "unix", socket, "localhost"
	} else if h, port, err := net.SplitHostPort(address); err == nil && (h == "" || h == "0.0.0.0" || h == "::") {
		addr = net.JoinHostPort("127.0.0.1", port) // listening on all interfaces, asked on this one
		host = addr
	}
	if _, _, err := net.SplitHostPort(addr); network == "tcp" && err != nil {
		return nil, usageError{fmt.Errorf("address %q: want host:port or unix:/path", address)}
	}
	var dialer net.Dialer
	client := &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, network, addr)
			},
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+path, nil)
	if err != nil {
		return nil, usageError{fmt.Errorf("address %q: %w", address, err)}
	}
	resp, err := client.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			return nil, fmt.Errorf("nobody answers at %s: %w; is it running, and is telemetry.listen set? (--address says where to ask)", address, op.Err)
		}
		return nil, fmt.Errorf("ask %s: %w", address, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", address, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s%s: %s: %s", address, path, resp.Status, clip(strings.TrimSpace(string(body))))
	}
	return body, nil
}

// clip bounds what is shown of an answer that may be anybody's.
func clip(s string) string {
	const most = 300
	if len(s) > most {
		return s[:most] + " …"
	}
	return s
}

func printStatus(w io.Writer, data []byte, format string) error {
	if format == "json" {
		_, err := w.Write(data)
		return err
	}
	var s telemetry.Status
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("read the status: %w", err)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if s.FIPS != "" {
		s.Version += " (FIPS 140-3 module " + s.FIPS + ")"
	}
	fmt.Fprintf(t, "narthex %s\ttrust domain %s\tup %s\n", s.Version, s.TrustDomain, time.Since(s.Started).Round(time.Second))
	if s.Agent != nil {
		if err := printAgent(t, s.Agent); err != nil {
			return err
		}
	}
	if p := s.Proxy; p != nil {
		fmt.Fprintf(t, "\npolicy\tgeneration %d\t%d rules\n", p.Policy.Generation, p.Policy.Rules)
		if kept := p.Policy.LastGood; !kept.IsZero() {
			fmt.Fprintf(t, "last good\trules of %s\tas the rule files cannot be used\n", kept.Format(time.DateTime))
		}
		printReload(t, p.Policy.Reload)
		printSandbox(t, p.Sandbox)
		for _, problem := range []string{p.Problem, p.Policy.Problem} {
			if problem != "" {
				fmt.Fprintf(t, "problem\t%s\n", problem)
			}
		}
		for _, c := range p.CRLs {
			if c.Problem != "" {
				fmt.Fprintf(t, "CRLs of %s\t%s\n", c.TrustDomain, c.Problem)
				continue
			}
			fmt.Fprintf(t, "CRL of %s\t%s\tnumber %s\t%d revoked\tout of date in %s\n", c.TrustDomain, c.Issuer, cmp.Or(c.Number, "-"), c.Entries, until(c.NextUpdate))
		}
		for i := range p.Listeners {
			printListener(t, &p.Listeners[i])
		}
		for i := range p.ExtAuthz {
			printExtAuthz(t, &p.ExtAuthz[i])
		}
		if len(p.Policy.Decisions) > 0 {
			fmt.Fprintln(t)
		}
		for _, d := range p.Policy.Decisions {
			fmt.Fprintf(t, "decided\t%s\t%s\t%s\t%d\n", d.Listener, d.Decision, cmp.Or(d.Rule, "(no rule)"), d.Count)
		}
	}
	return t.Flush()
}

// printAgent says who the agent is, and what it has for workloads.
func printAgent(t *tabwriter.Writer, a *telemetry.AgentStatus) error {
	reach := "not reachable"
	if a.Reachable {
		reach = "reachable"
	}
	// Two cells at most: a third would stand behind the longest ID.
	fmt.Fprintf(t, "\nagent\t%s  expires in %s\n", cmp.Or(a.ID, "(not attested)"), until(a.ExpiresAt))
	fmt.Fprintf(t, "server\t%s  %s since %s\n", a.Server, reach, a.Since.Format(time.TimeOnly))
	fmt.Fprintf(t, "entries\t%d\nstreams\t%d\n", a.Entries, a.Streams)
	if a.Problem != "" {
		fmt.Fprintf(t, "problem\t%s\n", a.Problem)
	}
	for _, w := range a.Attestors {
		if w.Problem != "" {
			fmt.Fprintf(t, "attestor\t%s\tproblem: %s\n", w.Type, w.Problem)
		}
	}
	if err := t.Flush(); err != nil { // columns of their own for what is longer
		return err
	}
	for _, id := range a.Identities {
		hint := ""
		if id.Hint != "" {
			hint = fmt.Sprintf("  hint %q", id.Hint)
		}
		fmt.Fprintf(t, "  %s\texpires in %s%s\n", id.SPIFFEID, until(id.NotAfter), hint)
	}
	return t.Flush()
}

func printListener(w io.Writer, l *telemetry.ListenerStatus) {
	to := strings.Join(l.Targets, ", ")
	if len(l.Routes) > 0 {
		to = "by its routes"
	}
	as := "(no identity)"
	if l.SPIFFEID != "" {
		as = fmt.Sprintf("%s (expires in %s)", l.SPIFFEID, until(l.ExpiresAt))
	}
	// In one cell: the columns are those of the lines below, which are shorter.
	fmt.Fprintf(w, "\n%s  %s %s -> %s  as %s  %d live, %d accepted, %d refused, %d failed\n",
		l.Name, l.Direction, l.Bind, to, as, l.Active, l.Accepted, l.Refused, l.Failed)
	if l.Problem != "" {
		fmt.Fprintf(w, "  problem\t%s\n", l.Problem)
	}
	printWays(w, l)
	printModes(w, l)
	for _, c := range l.Connections {
		fmt.Fprintf(w, "  %s -> %s\trule %s\tfor %s", c.From, c.To, cmp.Or(c.Rule, "-"), time.Since(c.Since).Round(time.Second))
		if c.WouldDeny != "" {
			fmt.Fprintf(w, "\twould be refused: %s", c.WouldDeny)
		}
		if len(c.Shadow) > 0 {
			fmt.Fprintf(w, "\totherwise by rules in shadow: %s", strings.Join(c.Shadow, ", "))
		}
		fmt.Fprintln(w)
	}
}

func printExtAuthz(w io.Writer, e *telemetry.ExtAuthzStatus) {
	who := "to whoever may connect"
	if len(e.Clients) > 0 {
		who = "to " + strings.Join(e.Clients, ", ")
	}
	fmt.Fprintf(w, "\n%s  ext_authz %s  %s  %d live, %d asked, %d denied\n", e.Name, e.Bind, who, e.Active, e.Checks, e.Denied)
	switch {
	case e.Problem != "":
		fmt.Fprintf(w, "  problem\t%s\n", e.Problem)
	case e.SPIFFEID != "":
		fmt.Fprintf(w, "  presents\t%s (expires in %s)\n", e.SPIFFEID, until(e.ExpiresAt))
	}
	if e.Enforcement == "audit" {
		fmt.Fprintf(w, "  audit\trefuses nothing by rules\n")
	}
}

// printWays says where connections are led and which endpoints are left out.
func printWays(w io.Writer, l *telemetry.ListenerStatus) {
	rest := false
	for i := range l.Routes {
		r := &l.Routes[i]
		rest = rest || len(r.SNI)+len(r.ALPN) == 0
		fmt.Fprintf(w, "  route\t%s -> %s\n", r.Takes(), strings.Join(r.Targets, ", "))
	}
	if len(l.Routes) > 0 && !rest {
		fmt.Fprintf(w, "  route\tthe rest -> refused\n")
	}
	healthy := 0
	for i := range l.Endpoints {
		if l.Endpoints[i].Healthy {
			healthy++
		}
	}
	if n := len(l.Endpoints); n > 1 || healthy < n {
		first := ""
		if l.EndpointsMore {
			first = "the first "
		}
		fmt.Fprintf(w, "  endpoints\t%d of %s%d healthy\n", healthy, first, n)
	}
	for i := range l.Endpoints {
		if e := &l.Endpoints[i]; !e.Healthy || e.Problem != "" {
			state := "left out"
			if e.Healthy {
				state = "in use"
			} else if healthy == 0 {
				state = "tried, as all are unhealthy"
			}
			fmt.Fprintf(w, "  endpoint\t%s\t%s: %s\n", e.Where(), state, cmp.Or(e.Problem, "-"))
		}
	}
}

// printReload says what the last reload came to. A failed one has its problem
// on a line of its own.
func printReload(w io.Writer, r *telemetry.ReloadStatus) {
	switch {
	case r == nil: // none since start
	case r.Result != "ok":
		fmt.Fprintf(w, "last reload\t%s\tfailed\n", r.Time.Format(time.TimeOnly))
	default:
		fmt.Fprintf(w, "last reload\t%s\trules: %d added, %d changed, %d removed\tconnections: %d asked, %d refused, %d closed\n",
			r.Time.Format(time.TimeOnly), r.Added, r.Changed, r.Removed, r.Asked, r.Refused, r.Closed)
	}
}

func printSandbox(w io.Writer, s *telemetry.SandboxStatus) {
	switch {
	case s == nil: // of an older version
	case !s.On:
		fmt.Fprintf(w, "sandbox\toff: whoever takes over the proxy has all the rights of its user\n")
	default:
		fmt.Fprintf(w, "sandbox\ton\t%s\n", strings.Join(s.Enforced, ", "))
		for _, missing := range s.Missing {
			fmt.Fprintf(w, "\tmissing\t%s\n", missing)
		}
	}
}

// printModes says how a listener lets more through than it should for ever, and
// who makes use of it.
func printModes(w io.Writer, l *telemetry.ListenerStatus) {
	if l.Enforcement == "audit" {
		fmt.Fprintf(w, "  audit\trules refuse nothing\twould have %d times\n", l.WouldDeny)
	}
	if l.Mode == "permissive" {
		fmt.Fprintf(w, "  permissive\ttakes plaintext too\t%d connections of it\n", l.Unauthenticated)
	}
	for _, s := range l.Sources {
		fmt.Fprintf(w, "  plaintext from %s\t%d connections", s.Source, s.Connections)
		if s.AtMostOver > 0 {
			fmt.Fprintf(w, " (counted too high by at most %d)", s.AtMostOver)
		}
		fmt.Fprintf(w, "\tlast %s ago\n", time.Since(s.Last).Round(time.Second))
	}
}

func until(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return time.Until(t).Round(time.Second).String()
}
