package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/integration/internal/bareclient"
	"github.com/narthex-id/narthex/integration/internal/figures"
)

// Agents with more entries than most nodes have.
var (
	manyEntries = agentRun{entries: 10_000, cache: defaultCache, long: true, steps: []func(context.Context, *bench, *agent) error{
		settle, measureRest(rowAgentRest10000), measureIdleAgent(rowAgentIdle10000),
	}}
	mostEntries = agentRun{entries: 100_000, cache: defaultCache, long: true, steps: []func(context.Context, *bench, *agent) error{
		settle, askAsUsers, measureRest(rowAgentRest100000), measureIdleAgent(rowAgentIdle100000),
	}}
	rotation = agentRun{entries: 10_000, cache: 10_000, ttl: 3 * time.Minute, long: true, steps: []func(context.Context, *bench, *agent) error{
		measureSigned, measureRest(rowAgentRest10000SVIDs), measureRotation,
	}}
)

// settle waits until the agent has what it keeps ready.
func settle(ctx context.Context, _ *bench, a *agent) error {
	_, err := a.server.settled(ctx)
	return err
}

// measureSigned adds how long it took until all SVIDs were signed.
func measureSigned(ctx context.Context, b *bench, a *agent) error {
	last, err := a.server.settled(ctx)
	if err != nil {
		return err
	}
	b.results.add(rowAgentSigned, a.name, last.Sub(a.begun).Seconds())
	return nil
}

// roleCallers is what this program is when it asks as many users. A socket and
// the range of them follow: the first, and how many there are.
const roleCallers = "callers"

// users who ask.
const users = 1000

// askAsUsers has many users ask for the SVID that each of them has an entry
// for: those of the last entries, which nobody would sign ahead of all others.
func askAsUsers(ctx context.Context, b *bench, a *agent) error {
	if os.Geteuid() != 0 {
		return errors.New("to ask as other users takes root: run this as root, or leave the row out")
	}
	for _, dir := range []string{b.dir, a.dir} { // so that they reach the socket
		if err := os.Chmod(dir, 0o711); err != nil {
			return err
		}
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	n := b.scaled(users)
	first := firstUser + a.run.entries - n
	p, err := b.keeper.start(exec.Command(program, roleCallers, a.socket, itoa(first), itoa(n)), filepath.Join(a.dir, "callers"))
	if err != nil {
		return err
	}
	defer p.stop()
	select {
	case <-p.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if p.err != nil {
		return p.ended()
	}
	return nil
}

// runCallers fetches an X.509-SVID as each of n users. One process does it for
// all: who has called is what the process is at that moment.
func runCallers(socket, first, n string) error {
	begin, err := strconv.Atoi(first)
	if err != nil {
		return err
	}
	count, err := strconv.Atoi(n)
	if err != nil {
		return err
	}
	for uid := begin; uid < begin+count; uid++ {
		if err := syscall.Setresuid(uid, uid, 0); err != nil {
			return err
		}
		if err := errors.Join(fetchAgain(socket), syscall.Setresuid(0, 0, 0)); err != nil {
			return fmt.Errorf("user %d: %w", uid, err)
		}
	}
	return nil
}

// userPatience is how long a user tries: an agent that is busy with its server
// refuses for a while.
const userPatience = 30 * time.Second

// fetchAgain fetches an X.509-SVID, and tries again where it is refused.
func fetchAgain(socket string) error {
	until := time.Now().Add(userPatience)
	for {
		c, err := bareclient.FetchX509SVID(context.Background(), socket)
		if err == nil {
			return c.Close()
		}
		if time.Now().After(until) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// measureRotation measures how long fetches take while nothing else happens,
// and while all SVIDs are signed anew.
func measureRotation(ctx context.Context, b *bench, a *agent) error {
	rest, err := a.paced(ctx, func(context.Context) error { return pause(ctx, b.lasting(10*time.Second)) })
	if err != nil {
		return err
	}
	if err := a.server.busy(ctx, a.run.ttl); err != nil {
		return err
	}
	rotating, err := a.paced(ctx, func(ctx context.Context) error {
		_, err := a.server.settled(ctx)
		return err
	})
	if err != nil {
		return err
	}
	b.results.add(rowAgentRotate, a.name, figures.Quantile(rotating, 0.99)/figures.Quantile(rest, 0.99))
	b.notes.add(rowAgentRotate, "%s: median %.2f ms at rest and %.2f ms while rotating, p99 %.1f and %.1f, at most %.1f and %.1f.", a.name,
		figures.Quantile(rest, 0.5)*1e3, figures.Quantile(rotating, 0.5)*1e3,
		figures.Quantile(rest, 0.99)*1e3, figures.Quantile(rotating, 0.99)*1e3, figures.Quantile(rest, 1)*1e3, figures.Quantile(rotating, 1)*1e3)
	return nil
}

// Clients that fetch at a pace.
const (
	pacedClients = 4
	pace         = 40 * time.Millisecond
)

// paced has clients fetch at fixed times until during returns. It returns how
// long each fetch took from when it was due, in seconds.
func (a *agent) paced(ctx context.Context, during func(context.Context) error) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex // guards all
	var all []float64
	var g errgroup.Group
	over := make(chan struct{})
	for i := range pacedClients {
		g.Go(func() error {
			due := time.Now().Add(pace * time.Duration(i) / pacedClients)
			for {
				select {
				case <-over:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(time.Until(due)):
				}
				c, err := bareclient.FetchX509SVID(ctx, a.socket)
				if err != nil {
					cancel() // during need not go on
					return fmt.Errorf("fetch: %w", err)
				}
				mu.Lock()
				all = append(all, time.Since(due).Seconds())
				mu.Unlock()
				_ = c.Close() // it has served
				due = due.Add(pace)
			}
		})
	}
	err := during(ctx)
	close(over)
	if failed := g.Wait(); failed != nil {
		err = failed
	}
	return all, err
}
