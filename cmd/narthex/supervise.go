package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/config"
)

// supervisor keeps the two halves running and speaks for both to systemd.
type supervisor struct {
	agent, proxy *half
	program      string // where a newer version is looked for
	tell         *teller
	log          hclog.Logger
	opened       []*os.File

	mu     sync.Mutex // guards the following
	halves map[*half]*word
	ready  bool   // systemd was told
	done   func() // tells systemd that the reload it was told of is over; nil: none is under way
}

// word is what was last heard of a half.
type word struct {
	ready  bool
	status string
	beat   time.Time // that it is alive; zero: not since it was started
}

// newSupervisor prepares the two halves; nothing runs yet.
func newSupervisor(c *config.Config, path string, u *account, log hclog.Logger) (_ *supervisor, err error) {
	v := &supervisor{log: log, halves: map[*half]*word{}}
	defer func() {
		if err != nil {
			v.close()
		}
	}()
	if v.program, err = startedAs(); err != nil {
		return nil, err
	}
	if v.tell, err = newTeller(inherited{}, log); err != nil {
		return nil, err
	}
	var images [2]*image
	for i := range images {
		if images[i], err = openImage(); err != nil {
			return nil, err
		}
		v.opened = append(v.opened, images[i].file)
	}
	control, controlPeer, err := privateSocket("unixpacket", u)
	if err != nil {
		return nil, err
	}
	v.opened = append(v.opened, control, controlPeer)

	v.agent = newHalf(child{name: "agent", args: []string{"agent", "-c", path, "--half"}, files: map[string]*os.File{}}, images[0], log)
	v.proxy = newHalf(child{name: "proxy", args: []string{"proxy", "-c", path}, user: u, low: needsLowPort(c), files: activatedForChild()}, images[1], log)
	v.proxy.files[controlSocketName], v.proxy.peer = control, controlPeer
	for _, h := range []*half{v.agent, v.proxy} {
		v.halves[h] = &word{}
		h.heard = func(line string) { v.hear(h, line) }
		if v.tell.watchdog > 0 {
			h.env = append(h.env, fmt.Sprintf("%s=%s", watchdogEnv, v.tell.watchdog))
		}
	}
	return v, nil
}

func (v *supervisor) close() {
	for _, f := range v.opened {
		_ = f.Close()
	}
	if v.tell != nil {
		v.tell.close()
	}
}

// run supervises until ctx ends, or a half cannot be started: the proxy ends
// first, which may need the agent while it drains, then the agent.
func (v *supervisor) run(ctx, kill context.Context, hangups <-chan os.Signal) error {
	ctx, fail := context.WithCancel(ctx)
	defer fail()
	// The agent's context ends only when the proxy is gone.
	agentCtx, proxyGone := context.WithCancel(context.WithoutCancel(ctx))
	defer proxyGone()
	upgrades := make(chan os.Signal, 1)
	signal.Notify(upgrades, syscall.SIGUSR2)
	defer signal.Stop(upgrades)

	serving, over := context.WithCancel(context.WithoutCancel(ctx))
	defer over()
	var halves, others sync.WaitGroup
	others.Go(func() { v.relay(serving, hangups) })
	others.Go(func() { v.upgradeWhenAsked(ctx, upgrades) })
	others.Go(func() { v.tell.follow(serving, v.statusLine, v.checkHalves) })
	others.Go(func() {
		select {
		case <-ctx.Done():
			v.tell.stopping("draining")
		case <-serving.Done():
		}
	})
	var agentErr, proxyErr error
	halves.Go(func() {
		agentErr = v.agent.keepRunning(agentCtx, kill)
		fail()
	})
	halves.Go(func() {
		proxyErr = v.proxy.keepRunning(ctx, kill)
		proxyGone()
		fail()
	})
	halves.Wait()
	over()
	others.Wait()
	return errors.Join(agentErr, proxyErr)
}

// reloadWithin bounds how long systemd is left to believe in a reload whose
// end no half has told.
const reloadWithin = 20 * time.Second

// relay passes SIGHUP on: to each half for itself, so that one that is being
// started again does not keep the other from being told.
func (v *supervisor) relay(ctx context.Context, hangups <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangups:
		}
		v.mu.Lock()
		v.done = v.tell.reload()
		v.mu.Unlock()
		for _, h := range []*half{v.agent, v.proxy} {
			select {
			case h.hangups <- struct{}{}:
			default:
			}
		}
		late := time.AfterFunc(reloadWithin, v.reloaded)
		context.AfterFunc(ctx, func() { late.Stop() })
	}
}

// reloaded tells systemd that a reload is over, if it was told of one.
func (v *supervisor) reloaded() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.done != nil {
		v.done()
		v.done = nil
	}
}

// hear takes note of what a half says of itself. A half is not believed more
// than this: it parses what strangers send, and systemd obeys us.
func (v *supervisor) hear(h *half, line string) {
	key, value, _ := strings.Cut(line, "=")
	v.mu.Lock()
	w := v.halves[h]
	both := false
	switch key {
	case "READY":
		w.ready = true
		if h == v.proxy && v.done != nil && v.ready {
			v.done()
			v.done = nil
		}
		both = !v.ready && v.halves[v.agent].ready && v.halves[v.proxy].ready
		v.ready = v.ready || both
	case "STATUS":
		w.status = value
	case startedState:
		w.beat = time.Time{}
	case "WATCHDOG":
		w.beat = time.Now()
	}
	v.mu.Unlock()
	if both {
		v.tell.ready(v.statusLine())
	}
}

func (v *supervisor) statusLine() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	line := "proxy: " + v.halves[v.proxy].status
	if status := v.halves[v.agent].status; status != "" {
		line += "; agent: " + status
	}
	return line
}

// missedBeats is how many times in a row a half may fail to say that it is
// alive.
const missedBeats = 4

// checkHalves ends a half that has stopped to work: it is started again, and
// the other goes on. While we can do so we are alive ourselves.
func (v *supervisor) checkHalves(context.Context) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	for h, w := range v.halves {
		if w.beat.IsZero() || time.Since(w.beat) < missedBeats*v.tell.watchdog {
			continue
		}
		w.beat = time.Time{}
		select {
		case h.aborts <- struct{}{}:
		default:
		}
	}
	return nil
}

// upgradeWhenAsked upgrades at each SIGUSR2.
func (v *supervisor) upgradeWhenAsked(ctx context.Context, asked <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-asked:
		}
		v.log.Info("upgrading: the proxy first, then the agent", "program", v.program)
		if err := v.upgrade(ctx); err != nil {
			v.log.Error("the upgrade failed: what runs is what ran before", "error", err)
			continue
		}
		v.log.Info("upgraded; this supervisor is what it was until the service is restarted", "version", version)
	}
}

// upgrade replaces both halves by the program that is at our path now. The
// proxy lives through the agent's restart: what it has it keeps.
func (v *supervisor) upgrade(ctx context.Context) error {
	for _, h := range []*half{v.proxy, v.agent} {
		from, err := openImageAt(v.program)
		if err != nil {
			return err
		}
		done := make(chan error, 1)
		select {
		case h.replaces <- replacement{from, done}:
		case <-ctx.Done():
			from.close()
			return ctx.Err()
		}
		if err := <-done; err != nil {
			if h == v.agent {
				return fmt.Errorf("%w; the new proxy stays, beside the old agent", err)
			}
			return err
		}
		v.log.Info("a half runs the new program", "half", h.name)
	}
	return nil
}
