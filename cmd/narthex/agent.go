package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/agent/bootstrap"
	"github.com/narthex-id/narthex/agent/endpoint"
	"github.com/narthex-id/narthex/agent/keys"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/attestor/k8s"
	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/handover"
	"github.com/narthex-id/narthex/internal/sandbox"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/telemetry/expose"
)

func newAgent() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "agent -c narthex.yaml",
		Short: "Run the agent: attest this node, serve SVIDs to its workloads",
		Long: `Attests this node to a SPIRE Server, attests each local workload that asks, and
serves short-lived X.509-SVIDs and JWT-SVIDs over the SPIFFE Workload API. It does not end
because the server is away: it answers callers with the reason, and tries again.
Another one with the same data_dir takes the place of the one that runs, without
a moment in which nobody serves.`,
		Example: `  narthex agent -c /etc/narthex/narthex.yaml
  narthex agent -c /etc/narthex/narthex.yaml --standby   for containers that replace each other`,
	}
	path := configFlag(cmd)
	half := cmd.Flags().Bool("half", false, "show the figures to the proxy's process only (set by `narthex run`)")
	hide(cmd, "half")
	standsBy := standbyFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(*path)
		if err != nil {
			return err
		}
		if err := c.ForAgent(); err != nil {
			return err
		}
		if err := requireFIPS(c); err != nil {
			return err
		}
		ctx, hangups, stop := untilSignal(cmd.Context(), nil)
		defer stop()
		if !*standsBy {
			return runAgent(ctx, c, *half, stint{hangups: hangups, taken: func(config.Telemetry) {}})
		}
		s := agentStandby(c)
		return s.keepPlace(ctx, hangups, func(ctx context.Context, now stint) error {
			if now.back {
				c = configAgain(*path, c, func(again *config.Config) error { return sameAgentPlace(c, again) }, s.log)
			}
			return runAgent(ctx, c, *half, now)
		})
	}
	return cmd
}

// agentStandby is an agent between its stints: the lease of data_dir tells
// whether another one serves.
func agentStandby(c *config.Config) *standby {
	var once sync.Once
	var lock *handover.Lock
	var err error
	return &standby{
		process: "agent", control: filepath.Join(string(c.DataDir), handoverSocketName),
		lock: func() (*handover.Lock, error) {
			once.Do(func() { lock, err = handover.OpenLock(agent.LeasePath(string(c.DataDir))) })
			return lock, err
		},
		ready: nil, // its callers are served
		log:   newLogger("narthex.agent", c.Log),
	}
}

// sameAgentPlace checks a file with which an agent is to take its place back.
func sameAgentPlace(before, again *config.Config) error {
	if err := again.ForAgent(); err != nil {
		return err
	}
	if again.DataDir != before.DataDir {
		return errors.New("data_dir is another one: start a new process for that")
	}
	return requireFIPS(again)
}

// hide keeps a flag that only this program sets out of the help.
func hide(cmd *cobra.Command, flag string) {
	if err := cmd.Flags().MarkHidden(flag); err != nil {
		panic(err) // a flag that is not there: a mistake in the program
	}
}

// confineAgent gives up what an agent has no use for.
func confineAgent(log hclog.Logger) {
	if err := agent.Undumpable(); err != nil {
		log.Warn("the agent's memory is not kept from core files and debuggers", "error", err)
	}
	if err := sandbox.NoNewPrivs(); err != nil { // it executes nothing
		log.Warn("the agent could gain privileges by executing a program", "error", err)
	}
}

// runAgent serves for one stint. Where another agent runs, it goes on if this
// fails before that one has let go.
func runAgent(parent context.Context, c *config.Config, half bool, now stint) error {
	nameProcess("narthex-agent")
	log := newLogger("narthex.agent", c.Log)
	confineAgent(log)
	warn(log, c, notOfAgent(half)...)
	files, err := takeInherited()
	if err != nil {
		return err
	}
	defer files.close()
	private, err := files.listener(statusSocketName)
	if err != nil {
		return err
	}
	tell, err := newTeller(files, log)
	if err != nil {
		return err
	}
	defer tell.close()
	metrics := telemetry.NewMetrics()
	cfg, err := agentConfig(c, metrics, log)
	if err != nil {
		return err
	}
	place := newAgentPlace(c, half, log)
	a, err := place.agent(parent, cfg, now.back)
	if err != nil {
		place.abandon()
		return err
	}
	started := time.Now()
	show := expose.Config{
		Process: "agent",
		Metrics: metrics,
		Status: func() telemetry.Status {
			return telemetry.Status{Version: version, FIPS: fipsModule(), Started: started, TrustDomain: c.TrustDomain.Name(), Agent: a.Status()}
		},
		Ready:   a.NotReady,
		Private: private,
		Log:     log.Named("telemetry"),
	}
	if !half {
		show.Listen, show.Health = string(c.Telemetry.Listen), string(c.Telemetry.Health)
		show.Socket, show.Probed = place.take(handover.Telemetry, "", show.Listen), place.take(handover.Health, "", show.Health)
	}
	figures, err := expose.Listen(show)
	if err != nil {
		place.abandon()
		return errors.Join(err, a.Close())
	}
	place.listen()
	shown := newShownFigures(parent, figures)
	if show.Socket == nil && show.Probed == nil { // of a network of our own, where nobody answers probes while we wait for the place
		shown.begin()
	}
	if err := place.takeOver(parent, a); err != nil {
		place.abandon()
		return errors.Join(err, shown.end(), a.Close())
	}
	shown.begin()
	count := handovers(metrics)
	countArrival(count, place.from, now)
	if place.from != nil || now.back {
		tell.tookOver()
	}
	log.Info("agent starts", "version", version, "fips_module", fipsWords(), "trust_domain", c.TrustDomain.Name(),
		"server", string(c.Agent.Server.Address), "socket", string(c.Agent.WorkloadAPI.Socket))
	return serveAgent(parent, place, &agentGiver{
		agent: a, config: c, figures: figures, shown: shown, tell: tell, stint: now, count: count, log: place.log,
	}, log)
}

// shownFigures are figures that are shown from some moment on.
type shownFigures struct {
	figures *expose.Server
	ctx     context.Context
	hide    context.CancelFunc
	served  chan error // what Serve returned; nil until it was called
}

func newShownFigures(ctx context.Context, figures *expose.Server) *shownFigures {
	ctx, hide := context.WithCancel(ctx)
	return &shownFigures{figures: figures, ctx: ctx, hide: hide}
}

// begin shows them. A second call changes nothing.
func (f *shownFigures) begin() {
	if f.served != nil {
		return
	}
	f.served = make(chan error, 1)
	go func() { f.served <- f.figures.Serve(f.ctx) }() // until and end wait for it
}

// until returns once ctx has ended or they cannot be shown any more.
func (f *shownFigures) until(ctx context.Context) error {
	defer f.hide()
	select {
	case err := <-f.served:
		return err
	case <-ctx.Done():
		f.hide()
		return <-f.served
	}
}

// end hides them, whether or not they were shown.
func (f *shownFigures) end() error {
	f.hide()
	if f.served == nil {
		return f.figures.Close()
	}
	return <-f.served
}

// serveAgent runs everything until ctx ends, or another process has taken over.
func serveAgent(ctx context.Context, place *agentPlace, r *agentGiver, log hclog.Logger) error {
	ctx, r.leave = context.WithCancelCause(ctx)
	defer r.leave(nil)
	g, ctx := errgroup.WithContext(ctx)
	r.ctx = ctx
	g.Go(func() error { return r.agent.Run(ctx) })
	g.Go(func() error { return place.answer(ctx, r) })
	g.Go(func() error { return r.shown.until(ctx) })
	g.Go(func() error { return sayOnHangup(ctx, r.stint.hangups, r.tell, log) })
	g.Go(func() error { sayHowToUpgrade(ctx, log); return nil })
	g.Go(func() error { tidyUp(ctx, agentWorth); return nil })
	g.Go(func() error { sayAgentReady(ctx, r.agent, r.tell); return nil })
	g.Go(func() error {
		r.tell.follow(ctx, func() string { return agentStatusLine(r.agent) }, func(context.Context) error { r.agent.Status(); return nil })
		return nil
	})
	err := g.Wait()
	place.end()
	log.Info("agent has ended")
	return err
}

// attestedWithin bounds how long whoever waits for the agent is kept waiting
// while its server cannot be reached: workloads are answered with the reason
// meanwhile.
const attestedWithin = 60 * time.Second

// sayAgentReady tells the service manager when the agent can serve, or that
// this takes long, and when it is about to end.
func sayAgentReady(ctx context.Context, a *agent.Agent, tell *teller) {
	late := time.After(attestedWithin)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for waiting := true; waiting && a.NotReady() != nil; {
		select {
		case <-ctx.Done():
			return
		case <-late:
			waiting = false
		case <-tick.C:
		}
	}
	tell.ready(agentStatusLine(a))
	<-ctx.Done()
	tell.stopping("ending")
}

// agentStatusLine is what `systemctl status` shows.
func agentStatusLine(a *agent.Agent) string {
	s := a.Status()
	if s.Problem != "" {
		return s.Problem
	}
	if err := a.NotReady(); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d identities, %d streams", len(s.Identities), s.Streams)
}

// sayOnHangup answers SIGHUP: what the agent reads from files it reads
// whenever it needs them, and the rest of its configuration takes a restart.
func sayOnHangup(ctx context.Context, hangups <-chan os.Signal, tell *teller, log hclog.Logger) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			tell.reload()()
			log.Info("nothing to reload: bundle and token files are read each time they are needed, other settings at start")
		}
	}
}

// agentConfig says in the agent's words what the file says in its own.
func agentConfig(c *config.Config, metrics *telemetry.Metrics, log hclog.Logger) (agent.Config, error) {
	out := agent.Config{
		TrustDomain:        c.TrustDomain,
		DataDir:            string(c.DataDir),
		Version:            version,
		Server:             string(c.Agent.Server.Address),
		RequirePQKEM:       c.Agent.Server.RequirePQKEM,
		InsecureBootstrap:  c.Agent.Server.InsecureBootstrap,
		Rebootstrap:        agent.Rebootstrap{Mode: c.Agent.Server.Rebootstrap.Mode, Delay: time.Duration(c.Agent.Server.Rebootstrap.Delay)},
		WorkloadKeyType:    c.Agent.SVID.KeyType,
		SyncInterval:       time.Duration(c.Agent.Sync.Interval),
		X509Cache:          c.Agent.SVID.X509Cache,
		JWTCache:           c.Agent.SVID.JWTCache,
		AvailabilityTarget: time.Duration(c.Agent.SVID.AvailabilityTarget),
		Socket:             string(c.Agent.WorkloadAPI.Socket),
		SDS:                endpoint.SDS(c.Agent.SDS),

		AllowUnauthenticatedVerifiers: c.Agent.WorkloadAPI.AllowUnauthenticatedVerifiers,
		ForeignJWTClaims:              c.Agent.WorkloadAPI.AllowedForeignJWTClaims,

		Metrics: metrics,
		Log:     log,
	}
	if admin := c.Agent.Admin; admin != nil {
		out.AdminSocket, out.Delegates = string(admin.Socket), admin.AuthorizedDelegates
	}
	if b := c.Agent.Broker; b != nil {
		out.Broker = brokerConfig(b)
	}
	if b := c.Agent.Server.Bundle; b != nil {
		source, err := bootstrap.New(bootstrap.Config{
			TrustDomain: c.TrustDomain, Server: out.Server,
			File: string(b.File), URL: b.URL, Socket: string(b.UnixSocket), Format: b.Format,
			Log: log.Named("bootstrap"),
		})
		if err != nil {
			return agent.Config{}, err
		}
		out.Bootstrap = source
	}
	switch n := c.Agent.NodeAttestor; {
	case n.JoinToken != nil:
		out.Node = attestor.JoinToken{Token: string(n.JoinToken.Token), File: string(n.JoinToken.TokenFile)}
	case n.X509PoP != nil:
		out.Node = attestor.X509PoP{
			Key: string(n.X509PoP.Key), Certificate: string(n.X509PoP.Certificate), Intermediates: string(n.X509PoP.Intermediates),
		}
	case n.K8sPSAT != nil:
		out.Node = attestor.PSAT{Cluster: n.K8sPSAT.Cluster, Token: string(n.K8sPSAT.Token)}
	}
	if c.Agent.KeyManager.Memory != nil {
		out.Keys = keys.Memory()
	}
	if t := c.Agent.TakeOver; t != nil {
		out.TakeOver = &agent.TakeOver{DataDir: string(t.DataDir), Keys: string(t.Keys)}
	}
	if u := c.Agent.WorkloadAttestors.Unix; u != nil {
		out.WorkloadAttestors = append(out.WorkloadAttestors, attestor.NewUnix(attestor.UnixConfig{
			DiscoverPath: u.DiscoverWorkloadPath, SizeLimit: u.WorkloadSizeLimit,
		}))
	}
	if k := c.Agent.WorkloadAttestors.K8s; k != nil {
		cfg, err := k8sConfig(k, c.Finding, os.LookupEnv, log.Named("k8s"))
		if err != nil {
			return agent.Config{}, err
		}
		out.WorkloadAttestors = append(out.WorkloadAttestors, k8s.New(cfg))
	}
	return out, nil
}

// brokerConfig says what the broker block does.
func brokerConfig(b *config.Broker) agent.Broker {
	out := agent.Broker{Socket: string(b.Socket), Listen: string(b.Listen)}
	for _, one := range b.Brokers {
		may := endpoint.Broker{ID: one.ID}
		for _, r := range one.References {
			may.References = append(may.References, endpoint.ReferenceType{TypeURL: r.TypeURL, OverTCP: r.AllowOverTCP})
		}
		out.Brokers = append(out.Brokers, may)
	}
	return out
}

// notOfProxy are the blocks that a proxy has no part in.
var notOfProxy = []string{"agent"}

// notOfAgent are the blocks of a configuration that an agent has no part in. One
// that `narthex run` started leaves what is shown to the proxy.
func notOfAgent(half bool) []string {
	if half {
		return []string{"proxy", "telemetry"}
	}
	return []string{"proxy"}
}

// warn logs what a configuration allows and should not be relied on, but for the
// blocks that are for others: under `narthex run` each process reads all of it.
func warn(log hclog.Logger, c *config.Config, others ...string) {
	for _, w := range c.Warnings {
		if block, _, _ := strings.Cut(w.Key, "."); !slices.Contains(others, block) {
			log.Warn(w.Error())
		}
	}
}
