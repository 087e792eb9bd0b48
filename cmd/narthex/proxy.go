package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/handover"
	"github.com/narthex-id/narthex/internal/sandbox"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/telemetry/expose"
	"github.com/narthex-id/narthex/internal/watch"
	"github.com/narthex-id/narthex/proxy"
	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/extauthz"
	"github.com/narthex-id/narthex/proxy/forwarded"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/upstream"
)

func newProxy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "proxy -c narthex.yaml",
		Short: "Run the proxy: mutual TLS for local services, admitted by SPIFFE ID rules",
		Long: `Takes its identities from a SPIFFE Workload API (any agent's, a stock
spire-agent's included) or from files, carries connections of the services
behind it over mutual TLS, and decides each one by rules on SPIFFE IDs, for as
long as it lives. SIGHUP and changed files reload listeners and rules without
touching what still passes; SIGTERM drains, a second one ends at once. Once its
sockets and identities are there it gives up every right it does not need
(proxy.sandbox). With --beside, one with another program or configuration takes
the place of the one that runs without losing a connection.`,
		Example: `  narthex proxy -c /etc/narthex/narthex.yaml
  narthex proxy -c /etc/narthex/narthex.yaml --beside
  narthex proxy -c /etc/narthex/narthex.yaml --standby   for containers that replace each other`,
	}
	path := configFlag(cmd)
	beside := cmd.Flags().Bool("beside", false, "start in the background, and return once that process serves (in the place of the one that runs, with proxy.handover) or has failed")
	standsBy := standbyFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(*path)
		if err != nil {
			return err
		}
		if err := c.ForProxy(); err != nil {
			return err
		}
		if err := requireFIPS(c); err != nil {
			return err
		}
		log := newLogger("narthex.proxy", c.Log)
		switch {
		case *beside:
			return startBeside(cmd.Context(), log)
		case *standsBy && c.Proxy.Handover == nil:
			return usageError{errors.New("--standby needs proxy.handover: without it no other process can take the place of this one")}
		}
		s := &proxyStints{path: *path, config: c, log: log, running: map[*proxyRunner]bool{}}
		ctx, hangups, stop := untilSignal(cmd.Context(), s.endNow)
		defer stop()
		return s.run(ctx, hangups, *standsBy)
	}
	return cmd
}

// proxyStints are the times for which this process is the proxy that serves:
// one, or with --standby as many as it takes.
type proxyStints struct {
	path    string
	lock    *handover.Lock // nil: nobody can take our place
	lockErr error          // why the lock cannot be used
	log     hclog.Logger

	mu      sync.Mutex // guards the following
	config  *config.Config
	last    *proxyRunner          // serves, or was the last to; nil: none yet
	running map[*proxyRunner]bool // last, and those that drain
}

func (s *proxyStints) run(ctx context.Context, hangups <-chan os.Signal, standsBy bool) error {
	h := s.config.Proxy.Handover
	if h != nil && !strings.Contains(os.Getenv(filesEnv), controlSocketName+"=") { // `narthex run` looks after its proxy by itself
		// Before the sandbox is: it makes no files.
		if s.lock, s.lockErr = handover.OpenLock(string(h.Socket) + ".lock"); s.lockErr == nil {
			defer s.lock.Close()
		}
	}
	if !standsBy {
		return s.serve(ctx, stint{hangups: hangups, taken: func(config.Telemetry) {}})
	}
	wait := &standby{
		process: "proxy", control: string(h.Socket),
		lock: func() (*handover.Lock, error) { return s.lock, nil }, ready: errInStandby, log: s.log,
	}
	return wait.keepPlace(ctx, hangups, s.serve)
}

// serve runs one proxy. What the process has given up for good by then, the
// second has not to give up again.
func (s *proxyStints) serve(ctx context.Context, now stint) error {
	r := &proxyRunner{path: s.path, config: s.config, lock: s.lock, lockErr: s.lockErr, stint: now, log: s.log}
	s.mu.Lock()
	if before := s.last; before != nil {
		r.box, r.boxed = before.box, before.boxed
		r.config = configAgain(s.path, before.inForce(), func(again *config.Config) error { return sameProxyPlace(before, again) }, s.log)
	}
	s.last, s.running[r] = r, true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.running, r)
	}()
	return r.run(ctx, now.hangups)
}

// sameProxyPlace checks a file with which a proxy is to take its place back.
func sameProxyPlace(before *proxyRunner, again *config.Config) error {
	if err := again.ForProxy(); err != nil {
		return err
	}
	if !reflect.DeepEqual(before.inForce().Proxy.Handover, again.Proxy.Handover) {
		return errors.New("proxy.handover is another one: start a new process for that")
	}
	if err := before.box.Admits(sandboxConfig(again, before.path)); err != nil {
		return err
	}
	return requireFIPS(again)
}

// endNow is for the second signal.
func (s *proxyStints) endNow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r := range s.running {
		r.endNow()
	}
}

// proxyRunner is a proxy with the files it is made from.
type proxyRunner struct {
	path    string
	sockets map[string]net.Listener // inherited, by listener name
	lock    *handover.Lock          // nil: nobody can take our place
	lockErr error                   // why the lock cannot be used: that of another user, most of all
	stint   stint
	place   *succession
	tell    *teller
	metrics *telemetry.Metrics
	access  *telemetry.AccessLog
	out     accessFile
	log     hclog.Logger
	started time.Time
	source  identitySource
	box     *sandbox.Sandbox // nil: proxy.sandbox is off
	boxed   bool             // the process is in it, or is not to be
	crls    *identity.CRLs
	good    *lastGood // guarded by mu once the proxy runs

	reloading sync.Mutex // held by a reload, and while the sockets are offered to another process

	mu      sync.Mutex // guards the following
	proxy   *proxy.Proxy
	authz   *extauthz.Set
	config  *config.Config
	policy  *policy.Policy
	read    []ruleFile // what policy was read from; nil where that is not known
	problem string     // why the newest files are not in force
	last    *telemetry.ReloadStatus
	copied  time.Time // when the copy was made that is in force; zero: the files themselves are
}

// run serves until ctx ends and the last connection is gone.
func (r *proxyRunner) run(ctx context.Context, hangups <-chan os.Signal) (err error) {
	nameProcess("narthex-proxy")
	c := r.config
	warn(r.log, c, notOfProxy...)
	if os.Geteuid() == 0 && c.Proxy.User != "" {
		r.log.Warn("proxy.user is for `narthex run`: this process stays root; start it as that user", "user", c.Proxy.User)
	}
	files, err := takeInherited()
	if err != nil {
		return err
	}
	defer files.close()
	if r.out, err = openAccessLog(c.AccessLog.Path); err != nil {
		return err
	}
	defer r.out.Close()
	r.metrics = telemetry.NewMetrics()
	if r.access, err = telemetry.NewAccessLog(r.out, c.AccessLog.Format, r.metrics); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.access.Close()) }()
	if r.tell, err = newTeller(files, r.log); err != nil {
		return err
	}
	defer r.tell.close()
	figures, err := r.begin(ctx, files)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.closeSources()) }()
	return r.serve(ctx, figures, hangups)
}

// begin does everything that can fail. Where another proxy runs, it is as it
// was if this fails, and has let go if it does not.
func (r *proxyRunner) begin(ctx context.Context, files inherited) (figures *expose.Server, err error) {
	if r.place, err = r.succeed(ctx, files); err != nil {
		return nil, err
	}
	if err := r.open(files); err != nil {
		r.place.abandon()
		return nil, err
	}
	if figures, err = r.figures(files); err == nil {
		err = r.place.listen()
	}
	if err == nil {
		r.enterSandbox() // before there is no way back
		err = r.place.takeOver(ctx, r)
	}
	if err != nil {
		r.authz.Close()
		r.proxy.Close()
		if figures != nil {
			_ = figures.Close()
		}
		r.place.abandon()
		return nil, errors.Join(err, r.closeSources())
	}
	countArrival(handovers(r.metrics), r.place.from, r.stint)
	if r.place.from != nil || r.stint.back {
		r.tell.tookOver()
	}
	if r.place.from != nil {
		r.place.from.Begun()
	}
	warnUnused(r.place.sockets, r.log)
	r.keepRules()
	r.logLimits()
	r.log.Info("proxy starts", "version", version, "fips_module", fipsWords(), "source", r.config.Proxy.Source, "listeners", len(r.config.Proxy.Listeners), "rules", r.policy.Rules())
	return figures, nil
}

// serve runs everything until ctx ends, or another process has taken over, and
// the last connection is gone.
func (r *proxyRunner) serve(ctx context.Context, figures *expose.Server, hangups <-chan os.Signal) error {
	defer r.place.end()
	// Figures are shown until the last connection is gone, or another process
	// shows its own in their place.
	serving, served := context.WithCancel(context.WithoutCancel(ctx))
	defer served()
	showing, hide := context.WithCancel(serving)
	defer hide()
	signalled, stopGiving := context.WithCancel(ctx)
	defer stopGiving()
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { keepMemory(serving); return nil })
	g.Go(func() error {
		<-ctx.Done() // whoever drains serves nobody who comes
		r.place.releaseLock()
		return nil
	})
	g.Go(func() error {
		defer stopGiving()
		defer served()
		return r.proxy.Run(ctx)
	})
	g.Go(func() error { return r.authz.Run(ctx) })
	g.Go(func() error { return figures.Serve(showing) })
	g.Go(func() error { r.reloadWhenChanged(serving, hangups); return nil }) // rules hold for who drains, too
	g.Go(func() error { r.place.countLive(signalled, r.proxy); return nil })
	g.Go(func() error { r.sayReady(ctx); return nil })
	g.Go(func() error { sayHowToUpgrade(serving, r.log); return nil })
	g.Go(func() error { r.tell.follow(serving, r.statusLine, r.proxy.Alive); return nil })
	if r.place.control != nil {
		g.Go(func() error {
			_, err := handover.Serve(signalled, handover.Config{
				Listener: r.place.control, Path: r.place.path, Owned: r.place.owned, Version: version,
				Giver: &giver{r, figures, leave, hide}, Log: r.place.log,
			})
			return err
		})
	}
	err := g.Wait()
	r.log.Info("proxy has ended")
	return err
}

// sayReady tells the service manager when every listener can serve, or that
// this takes long, and when the proxy is about to end. What waits for us must
// not wait for ever because one identity is missing.
func (r *proxyRunner) sayReady(ctx context.Context) {
	within, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	if err := r.waitReady(within); err != nil && ctx.Err() == nil {
		r.log.Warn("not every listener can serve yet", "error", err)
	}
	if ctx.Err() == nil {
		r.tell.ready(r.statusLine())
	}
	<-ctx.Done()
	r.tell.stopping(r.statusLine())
}

// sayHowToUpgrade answers SIGUSR2, which would end this process otherwise. A
// sandboxed process cannot start the one that takes its place.
func sayHowToUpgrade(ctx context.Context, log hclog.Logger) {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR2)
	defer signal.Stop(asked)
	for {
		select {
		case <-ctx.Done():
			return
		case <-asked:
			log.Warn("SIGUSR2 upgrades `narthex run`; to upgrade a half alone, start the new one: a proxy takes over by proxy.handover, an agent by its data_dir")
		}
	}
}

// inForce is the configuration that is.
func (r *proxyRunner) inForce() *config.Config {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.config
}

// statusLine is what `systemctl status` shows.
func (r *proxyRunner) statusLine() string {
	r.mu.Lock()
	problem, listeners := r.problem, len(r.config.Proxy.Listeners)
	r.mu.Unlock()
	live := 0
	for _, n := range r.proxy.Live() {
		live += n
	}
	line := fmt.Sprintf("%d listeners, %d connections", listeners, live)
	if r.proxy.Draining() {
		return "draining: " + line
	}
	if err := r.ready(); err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n")
		line += "; " + first
	}
	if problem != "" {
		line += "; cannot reload: " + problem
	}
	return line
}

// endNow is for the second signal.
func (r *proxyRunner) endNow() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.proxy == nil {
		os.Exit(exitFailure)
	}
	r.authz.EndNow()
	r.proxy.EndNow()
}

// figures opens what shows the proxy's state, and the agent's with it where
// they run as one.
func (r *proxyRunner) figures(files inherited) (*expose.Server, error) {
	socket, err := files.listener(telemetrySocketName)
	if err != nil {
		return nil, err
	}
	if socket == nil {
		socket = r.place.take(handover.Telemetry, "", string(r.config.Telemetry.Listen))
	}
	show := expose.Config{
		Process: "proxy",
		Metrics: r.metrics,
		Status:  r.status,
		Ready:   r.ready,
		Listen:  string(r.config.Telemetry.Listen),
		Socket:  socket,
		Health:  string(r.config.Telemetry.Health),
		Probed:  r.place.take(handover.Health, "", string(r.config.Telemetry.Health)),
		Log:     r.log.Named("telemetry"),
	}
	if path := files.path(statusPeerName); path != "" {
		show.Other = &expose.Remote{Process: "agent", Socket: path}
	}
	return expose.Listen(show)
}

// identitySource is what both sources of identities are.
type identitySource interface {
	identity.Source
	io.Closer
}

// open loads the policy, starts the source and binds the listeners, those
// apart whose sockets were handed down.
func (r *proxyRunner) open(files inherited) error {
	r.started = time.Now()
	r.sockets = map[string]net.Listener{}
	for i := range r.config.Proxy.Listeners {
		name := r.config.Proxy.Listeners[i].Name
		socket, err := files.listener(name)
		if err != nil {
			return err
		}
		if socket != nil {
			r.sockets[name] = socket
		}
	}
	r.good = openLastGood(r.config, files, r.log)
	if err := r.firstRules(); err != nil {
		return err
	}
	var err error
	if r.source, err = newSource(r.config.TrustDomain, r.config.Proxy, r.log.Named("identities")); err != nil {
		return err
	}
	r.crls, err = identity.NewCRLs(identity.CRLsConfig{
		Files: crlFiles(r.config), Identities: r.source, Metrics: r.metrics, Log: r.log.Named("crls"),
	})
	if err != nil {
		return errors.Join(err, r.source.Close())
	}
	p, err := proxy.New(r.proxyConfig(r.config, r.policy))
	if err != nil {
		return errors.Join(err, r.closeSources())
	}
	set, err := r.openExtAuthz(p)
	if err != nil {
		p.Close()
		return errors.Join(err, r.closeSources())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.proxy, r.authz = p, set
	return nil
}

// closeSources ends what watches identities and CRLs.
func (r *proxyRunner) closeSources() error { return errors.Join(r.crls.Close(), r.source.Close()) }

// crlFiles says in the proxy's words where CRLs are.
func crlFiles(c *config.Config) map[spiffeid.TrustDomain][]string {
	files := make(map[spiffeid.TrustDomain][]string, len(c.Proxy.CRLs))
	for td, patterns := range c.Proxy.CRLs {
		for _, p := range patterns {
			files[td] = append(files[td], string(p))
		}
	}
	return files
}

func newSource(td spiffeid.TrustDomain, c *config.Proxy, log hclog.Logger) (identitySource, error) {
	if c.Source == "files" {
		return identity.NewFiles(identity.FilesConfig{TrustDomain: td, FilePaths: identityFiles(c.Files), Log: log})
	}
	return identity.NewWorkloadAPI(identity.WorkloadAPIConfig{Socket: string(c.WorkloadAPI.Socket), Log: log})
}

func identityFiles(f *config.Files) identity.FilePaths {
	paths := identity.FilePaths{
		Cert: string(f.Cert), Key: string(f.Key), Bundle: string(f.Bundle),
		Bundles: make(map[spiffeid.TrustDomain]string, len(f.Bundles)),
	}
	for domain, file := range f.Bundles {
		paths.Bundles[domain] = string(file)
	}
	return paths
}

// firstRules loads the rules to start with: those that are configured or, where
// they cannot be used, the last good ones. One that is to take a running
// proxy's place fails instead: that one has rules and goes on.
func (r *proxyRunner) firstRules() error {
	rules, read, err := r.loadPolicy(r.config)
	if err == nil {
		r.policy, r.read = rules, read
		return nil
	}
	if r.place.from != nil {
		return err
	}
	rules, kept, noCopy := r.good.load(purpose(r.config, r.path))
	switch {
	case errors.Is(noCopy, errNoCopy):
		return err
	case noCopy != nil:
		return errors.Join(err, noCopy)
	}
	r.reloads().With("error").Inc()
	r.log.Error("the rule files cannot be used: the last good rules are in force until they can be", "kept", kept, "rules", rules.Rules(), "error", err)
	r.policy, r.copied, r.problem = rules, kept, err.Error()
	return nil
}

// reloads counts reloads, and starts that had to go on with the last good
// rules. One save is several events of the file system: what fails as before is
// counted once, unless a person asked.
func (r *proxyRunner) reloads() *telemetry.Family[telemetry.Counter] {
	return r.metrics.Counter("narthex_policy_reloads_total", "Reloads of configuration and policy.", "result")
}

// keepRules keeps the rule files in force for the next start. A process whose
// place was taken leaves that to the one that has it.
func (r *proxyRunner) keepRules() {
	if r.copied.IsZero() && !r.proxy.Draining() {
		r.good.keep(purpose(r.config, r.path), r.read)
	}
}

// loadPolicy reads the rule files and warns of rules that name a listener
// this node does not have. It returns also what it has read. Where there is
// nothing to decide, and no file, the policy allows nothing.
func (r *proxyRunner) loadPolicy(c *config.Config) (*policy.Policy, []ruleFile, error) {
	files, err := c.PolicyFiles()
	if err != nil {
		return nil, nil, err
	}
	if len(files) == 0 { // and no listener either
		rules, err := policy.Parse(r.path, []byte("version: 1"))
		return rules, nil, err
	}
	read := fingerprint(files)
	rules, err := policy.Load(files...)
	if err != nil {
		return nil, nil, err
	}
	for _, m := range rules.Listeners() {
		if !hasListener(c, m.Listener) {
			r.log.Info("a rule names a listener that this node does not have", "listener", m.Listener, "at", fmt.Sprintf("%s:%d:%d", m.File, m.Line, m.Column))
		}
	}
	return rules, read, nil
}

// upstreamSettings says in the proxy's words how a target is chosen.
func upstreamSettings(u config.Upstream) upstream.Settings {
	var out upstream.Settings
	if err := out.Balance.UnmarshalText([]byte(u.Balance)); err != nil {
		panic(err) // the file was checked against the same words
	}
	out.Ejection = upstream.Ejection{After: u.Ejection.After, For: time.Duration(u.Ejection.For), On5xx: u.Ejection.On5xx}
	if u.Ejection.After == 0 {
		out.Ejection.After = -1 // 0: never
	}
	if h := u.Health; h != nil {
		out.Health = upstream.Health{
			Interval: time.Duration(h.Interval), Timeout: time.Duration(h.Timeout),
			UnhealthyAfter: h.UnhealthyAfter, HealthyAfter: h.HealthyAfter, Path: h.Path,
		}
		if g := h.GRPC; g != nil {
			out.Health.GRPC, out.Health.Service = true, g.Service
		}
	}
	out.MaxRequests, out.MaxConnections = u.MaxRequests, u.MaxConnections
	if out.MaxPending = u.MaxPending; u.MaxPending == 0 {
		out.MaxPending = -1
	}
	return out
}

// proxyConfig says in the proxy's words what the file says in its own.
func (r *proxyRunner) proxyConfig(c *config.Config, rules *policy.Policy) proxy.Config {
	out := proxy.Config{Policy: rules, Identities: r.source, TrustDomain: c.TrustDomain, Metrics: r.metrics, Access: r.access, Log: r.log, Sockets: r.place.socket}
	out.MaxConnections = maxConnections(c.Proxy.MaxConnections, openFiles())
	for i := range c.Proxy.Listeners {
		l := &c.Proxy.Listeners[i]
		listener := proxy.Listener{
			Name:      l.Name,
			Direction: policy.Inbound,
			Bind:      string(l.Bind),
			Timeouts: proxy.Timeouts{
				Handshake: time.Duration(l.Timeouts.Handshake),
				Connect:   time.Duration(l.Timeouts.Connect),
				Idle:      orNone(l.Timeouts.Idle),
				Drain:     orNone(l.Timeouts.Drain), // 0s: no time at all
				Head:      time.Duration(l.Timeouts.Head),
				Response:  time.Duration(l.Timeouts.Response),
				Stall:     time.Duration(l.Timeouts.Stall),
			},
			Mode:           mode(l.Mode),
			Enforcement:    enforcement(l.Enforcement),
			Upstream:       upstreamSettings(l.Upstream),
			OnPolicyChange: action(l.OnPolicyChange),
			OnPeerExpiry:   action(l.OnPeerExpiry),
			MaxAge:         time.Duration(l.MaxAge),
			MaxConnections: l.MaxConnections,
			MaxPerIdentity: l.MaxConnectionsPerIdentity,
			Socket:         r.sockets[l.Name],
		}
		listener.ProxyProtocol = proxyProtocol(l.ProxyProtocol)
		listener.Targets, listener.Routes = words(l.Target), routes(l.Routes)
		listener.ALPN, listener.ServerName = l.ALPN, string(l.ServerName)
		if l.Protocol == "http" {
			listener.HTTP = httpSettings(l)
			listener.UpstreamProtocol = upstreamProtocol(l.Upstream.Protocol)
			if listener.Upstream.RetryPercent = l.HTTP.Retries.Budget; l.HTTP.Retries.Budget == 0 {
				listener.Upstream.RetryPercent = -1
			}
		}
		if l.Direction == "outbound" {
			listener.Direction = policy.Outbound
		}
		if l.Identity != nil {
			listener.Identity = identity.Pick{SPIFFEID: l.Identity.SPIFFEID, Hint: l.Identity.Hint}
		}
		for _, id := range l.Expect {
			pattern, err := policy.ParsePattern(id.String())
			if err != nil {
				panic(err) // a SPIFFE ID is a pattern of itself
			}
			listener.Expect = append(listener.Expect, pattern)
		}
		out.Listeners = append(out.Listeners, listener)
	}
	return out
}

func routes(c []config.Route) []proxy.Route {
	var out []proxy.Route
	for i := range c {
		r := &c[i]
		route := proxy.Route{SNI: words(r.SNI), ALPN: r.ALPN, Targets: words(r.Target), Response: time.Duration(r.Response)}
		for _, h := range r.Hosts {
			route.Hosts = append(route.Hosts, must(policy.ParseHost(h)))
		}
		for _, p := range r.Paths {
			route.Paths = append(route.Paths, must(policy.ParsePath(p)))
		}
		out = append(out, route)
	}
	return out
}

// must is for what internal/config has checked.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// httpSettings says in the proxy's words how a listener reads requests.
func httpSettings(l *config.Listener) *proxy.HTTP {
	h := &l.HTTP
	out := &proxy.HTTP{
		Literal: canonical.Options{
			EncodedSlash:  slices.Contains(h.Literal, config.EncodedSlash),
			EmptySegments: slices.Contains(h.Literal, config.EmptySegments),
		},
		Forwarded:  forwarded.Settings{RequestID: strings.ToLower(h.RequestID), Origin: origins[h.Forwarded]},
		Versions:   words(h.Versions),
		MaxStreams: h.MaxStreams,
		MaxBody:    int64(h.MaxBody),
		Retries:    h.Retries.Attempts,
	}
	if out.Retries == 0 {
		out.Retries = -1
	}
	if j := h.JWT; j != nil {
		out.JWT = &proxy.JWT{Audience: j.Audience, Required: j.Required}
	}
	if i := l.IdentityHeader; i != nil {
		out.Forwarded.IdentityHeader = strings.ToLower(i.Name)
		out.Forwarded.XFCC, out.Forwarded.Trusted = xfccs[i.XFCC], i.Trusted
	}
	return out
}

// The words of narthex.yaml.
var (
	origins = map[string]forwarded.Origin{"replace": forwarded.Replace, "append": forwarded.Behind, "off": forwarded.Untouched}
	xfccs   = map[string]forwarded.XFCC{"off": forwarded.Off, "sanitize": forwarded.Sanitize, "append": forwarded.Append, "forward": forwarded.Forward}
)

// words are a list without the type that checked it.
func words[T ~string](list []T) []string {
	var out []string
	for _, w := range list {
		out = append(out, string(w))
	}
	return out
}

func proxyProtocol(c config.ProxyProtocol) proxy.ProxyProtocol {
	var out proxy.ProxyProtocol
	if err := out.Send.UnmarshalText([]byte(c.Send)); err != nil {
		panic(err) // internal/config has checked the word
	}
	for _, n := range c.AcceptFrom {
		if n.Unix() {
			out.AcceptUnix = true
			continue
		}
		out.AcceptFrom = append(out.AcceptFrom, n.Prefix())
	}
	return out
}

// orNone turns the file's 0s, which means none, into the proxy's, where zero
// means the default.
func orNone(d config.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return time.Duration(d)
}

// action reads a word that internal/config has checked.
func action(word string) proxy.Action {
	var a proxy.Action
	if word == "" {
		return a
	}
	if err := a.UnmarshalText([]byte(word)); err != nil {
		panic(err)
	}
	return a
}

// mode reads a word that internal/config has checked.
func mode(word string) proxy.Mode {
	var m proxy.Mode
	if err := m.UnmarshalText([]byte(word)); err != nil {
		panic(err)
	}
	return m
}

// enforcement reads a word that internal/config has checked.
func enforcement(word string) proxy.Enforcement {
	var e proxy.Enforcement
	if err := e.UnmarshalText([]byte(word)); err != nil {
		panic(err)
	}
	return e
}

// upstreamProtocol reads a word that internal/config has checked.
func upstreamProtocol(word string) proxy.Protocol {
	var p proxy.Protocol
	if err := p.UnmarshalText([]byte(word)); err != nil {
		panic(err)
	}
	return p
}

// reloadWhenChanged reloads at each SIGHUP and when a file has changed, until
// ctx ends.
func (r *proxyRunner) reloadWhenChanged(ctx context.Context, hangups <-chan os.Signal) {
	var watching sync.WaitGroup
	defer watching.Wait()
	changed := make(chan struct{}, 1)
	watching.Go(func() {
		watch.Files(ctx, watch.Config{
			Paths: r.files,
			Changed: func() {
				select {
				case changed <- struct{}{}:
				default:
				}
			},
			Log: r.log.Named("watch"),
		})
	})
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangups:
			done := func() {}
			if !r.proxy.Draining() { // else we have said that we stop
				done = r.tell.reload()
			}
			if err := r.out.Reopen(); err != nil {
				r.log.Error("cannot open the access log anew: writing goes on to the old file", "error", err)
			}
			r.reload(true)
			done()
		case <-changed:
			r.reload(false)
		}
	}
}

// files are the files whose change means a reload.
func (r *proxyRunner) files() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	paths := []string{r.path}
	for _, pattern := range r.config.Proxy.Policies {
		paths = append(paths, string(pattern)) // its directory is what is watched
	}
	if !r.copied.IsZero() {
		return paths
	}
	return append(paths, r.policy.Files()...)
}

// reload puts the files as they are now in force, all of them or none. Unless
// a person asked for it, files that say what they said before are no reload.
func (r *proxyRunner) reload(asked bool) {
	r.reloading.Lock()
	defer r.reloading.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	c, rules, read, err := r.readAgain()
	if err == nil && !asked && r.problem == "" && rules == r.policy && reflect.DeepEqual(r.config.Proxy, c.Proxy) {
		return
	}
	var applied proxy.Applied
	if err == nil {
		applied, err = r.apply(c, rules)
	}
	r.last = reloadStatus(&applied, err)
	if err != nil {
		// A directory that was replaced looks as before and is another to the
		// sandbox.
		if outside := r.box.Admits(sandboxConfig(r.config, r.path)); outside != nil {
			err = fmt.Errorf("%w; %w", err, outside)
		}
		if r.problem != err.Error() || asked {
			r.reloads().With("error").Inc()
			r.log.Error("cannot reload: what was in force stays in force", "error", err)
		}
		r.problem = err.Error()
		return
	}
	r.followFiles(c)
	r.reloads().With("ok").Inc() // once all of it is in force
	if needs := needsRestart(r.config, c); len(needs) > 0 {
		r.log.Warn("these settings take effect at the next start only", "keys", needs)
	}
	r.config, r.policy, r.read, r.problem, r.copied = c, rules, read, "", time.Time{}
	r.keepRules()
}

// reloadStatus is what a reload came to, for people.
func reloadStatus(a *proxy.Applied, err error) *telemetry.ReloadStatus {
	s := &telemetry.ReloadStatus{Time: time.Now(), Result: "ok"}
	if err != nil {
		s.Result = "error"
		return s
	}
	s.Added, s.Changed, s.Removed = len(a.Rules.Added), len(a.Rules.Changed), len(a.Rules.Removed)
	s.Asked, s.Refused, s.Closed = a.Asked, a.NowRefused, a.Closed
	return s
}

// followFiles tells those who watch files of other names.
func (r *proxyRunner) followFiles(c *config.Config) {
	if !reflect.DeepEqual(r.config.Proxy.CRLs, c.Proxy.CRLs) {
		r.crls.Configure(crlFiles(c))
	}
	if files, ok := r.source.(*identity.Files); ok && c.Proxy.Files != nil && !reflect.DeepEqual(r.config.Proxy.Files, c.Proxy.Files) {
		files.Configure(identityFiles(c.Proxy.Files))
	}
}

// readAgain reads the files. Rules that mean what those in force mean are
// those in force, so that nobody is asked again for nothing.
func (r *proxyRunner) readAgain() (*config.Config, *policy.Policy, []ruleFile, error) {
	c, err := config.Load(r.path)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := c.ForProxy(); err != nil {
		return nil, nil, nil, err
	}
	if err := r.box.Admits(sandboxConfig(c, r.path)); err != nil {
		return nil, nil, nil, err
	}
	rules, read, err := r.loadPolicy(c)
	if err != nil {
		return nil, nil, nil, err
	}
	if rules.Equal(r.policy) {
		rules = r.policy
	}
	return c, rules, read, nil
}

// needsRestart names the settings in which two files differ and that are taken
// at start only.
func needsRestart(was, is *config.Config) []string {
	var keys []string
	for _, k := range []struct {
		key     string
		was, is any
	}{
		{"proxy.source", was.Proxy.Source, is.Proxy.Source},
		{"proxy.workload_api", was.Proxy.WorkloadAPI, is.Proxy.WorkloadAPI},
		{"proxy.sandbox", was.Proxy.Sandbox, is.Proxy.Sandbox},
		{"fips", was.FIPS, is.FIPS},
		{"data_dir", was.DataDir, is.DataDir},
		{"proxy.user", was.Proxy.User, is.Proxy.User},
		{"proxy.handover", was.Proxy.Handover, is.Proxy.Handover},
		{"telemetry", was.Telemetry, is.Telemetry},
		{"access_log", was.AccessLog, is.AccessLog},
		{"log", was.Log, is.Log},
	} {
		if !reflect.DeepEqual(k.was, k.is) {
			keys = append(keys, k.key)
		}
	}
	return keys
}

func (r *proxyRunner) status() telemetry.Status {
	p := r.proxy.Status()
	p.ExtAuthz = r.authz.Status()
	r.mu.Lock()
	defer r.mu.Unlock()
	p.Policy.Problem, p.Policy.Reload, p.Policy.LastGood = r.problem, r.last, r.copied
	p.Sandbox = r.sandboxStatus()
	domain := r.config.TrustDomain
	if domain.IsZero() && len(p.Identities) > 0 { // a proxy alone takes it from its SVID
		if id, err := spiffeid.FromString(p.Identities[0].SPIFFEID); err == nil {
			domain = id.TrustDomain()
		}
	}
	return telemetry.Status{Version: version, FIPS: fipsModule(), Started: r.started, TrustDomain: domain.Name(), Proxy: p}
}

// ready is nil when every listener can serve, and Envoy can ask.
func (r *proxyRunner) ready() error {
	var problems []error
	for _, l := range r.proxy.Status().Listeners {
		if l.Problem != "" {
			problems = append(problems, fmt.Errorf("listener %s: %s", l.Name, l.Problem))
		}
	}
	return errors.Join(append(problems, r.extAuthzProblems())...)
}

// accessFile is where access records go: a file, which logrotate may move, or
// a standard stream.
type accessFile interface {
	io.WriteCloser
	Reopen() error
}

func openAccessLog(path string) (accessFile, error) {
	switch path {
	case "stdout":
		return stream{os.Stdout}, nil
	case "stderr":
		return stream{os.Stderr}, nil
	}
	f, err := telemetry.OpenReopenable(path, 0o640)
	if err != nil {
		return nil, fmt.Errorf("access_log.path: %w", err)
	}
	return f, nil
}

// stream is a standard stream: it lives as long as the process.
type stream struct{ io.Writer }

func (stream) Reopen() error { return nil }
func (stream) Close() error  { return nil }
