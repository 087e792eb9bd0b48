package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/handover"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/telemetry/expose"
)

// stint is one time for which this process serves: from its start, or from
// when it takes its place back, until it ends or another process has its place.
type stint struct {
	back    bool // it takes its place back: no process is asked for it
	hangups <-chan os.Signal
	taken   func(left config.Telemetry) // called when another process has the place, with where that one does not answer probes in place of us
}

// errPlaceHeld is returned by a stint that was to take its place back and found
// another process in it.
var errPlaceHeld = errors.New("another process has the place")

// standby is what a process does between two stints.
type standby struct {
	process string                         // agent, proxy
	control string                         // where the process that serves is asked for its place
	lock    func() (*handover.Lock, error) // had by the process that serves
	ready   error                          // what /readyz says meanwhile
	log     hclog.Logger
}

// handovers counts how a process came to its place, and how those fared who
// asked for it. What happens to a process that gives its place away is not for
// figures: it shows none any more.
func handovers(m *telemetry.Metrics) *telemetry.Family[telemetry.Counter] {
	return m.Counter("narthex_handovers_total", "Hand-overs from and to this process, by what came of them.", "result")
}

// countArrival counts how this process came to its place, unless nobody had it.
func countArrival(count *telemetry.Family[telemetry.Counter], from *handover.Takeover, now stint) {
	switch {
	case from != nil:
		count.With("took_over").Inc()
	case now.back:
		count.With("took_back").Inc()
	}
}

// standbyFlag adds --standby.
func standbyFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("standby", false, "when another process takes the place of this one, do not end: hold nothing, wait, and take the place back if that one goes without a successor")
}

// Times of a process in standby.
const (
	// lookEvery is how often it looks whether the place is free.
	lookEvery = 250 * time.Millisecond
	// A stint that fails to take the place back is tried again.
	backMin = time.Second
	backMax = 30 * time.Second
)

// keepPlace serves whenever no other process does that took the place, until
// ctx ends. The first stint is like that of a process without standby, and what
// it fails with is returned. What a stint still has to end when its place is
// taken goes on beside what follows.
func (s *standby) keepPlace(ctx context.Context, hangups <-chan os.Signal, serve func(context.Context, stint) error) error {
	var stints sync.WaitGroup
	defer stints.Wait()
	pause := backMin
	var left config.Telemetry
	for back := false; ; back = true {
		taken, ended := make(chan config.Telemetry, 1), make(chan error, 1)
		begun := time.Now()
		var gave atomic.Bool
		now := stint{back: back, hangups: hangups, taken: func(left config.Telemetry) { gave.Store(true); taken <- left }}
		stints.Go(func() {
			if now.back { // the one before may not be over, and hears of SIGHUP too
				hups := make(chan os.Signal, 1)
				signal.Notify(hups, syscall.SIGHUP)
				defer signal.Stop(hups)
				now.hangups = hups
			}
			err := serve(ctx, now)
			if err != nil && gave.Load() { // and nobody waits for it
				s.log.Error("what was left of a place that was taken did not end well", "error", err)
			}
			ended <- err
		})
		select {
		case left = <-taken:
		case err := <-ended:
			switch {
			case len(taken) > 0:
				left = <-taken
			case !back || err == nil || ctx.Err() != nil:
				return err
			case !errors.Is(err, errPlaceHeld):
				s.log.Error("cannot serve in the place of the process that is gone, will try again", "error", err, "next_try_in", pause)
				if !sleep(ctx, pause) {
					return nil
				}
				pause = min(2*pause, backMax)
			}
		}
		if time.Since(begun) > backMax {
			pause = backMin
		}
		if err := s.await(ctx, left); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// sleep reports whether d passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// await waits until the place is free: its lock, which the kernel takes back
// from a process that dies, and the socket on which one would be asked, which
// is served for as long as one process follows the other. Meanwhile probes are
// answered at left.
func (s *standby) await(ctx context.Context, left config.Telemetry) error {
	lock, err := s.lock()
	if err != nil {
		return fmt.Errorf("wait for the place of this process: %w", err)
	}
	s.log.Info("another process has taken over: in standby until that one is gone")
	ignored := make(chan os.Signal, 1)
	signal.Notify(ignored, syscall.SIGUSR2) // else it would end this process
	defer signal.Stop(ignored)
	shown := s.show(ctx, left)
	defer shown()
	tidy := time.NewTimer(3 * time.Second) // by then little is left of what ended
	defer tidy.Stop()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tidy.C:
			collectAll()
		case <-tick.C:
			if lock.Free() && !handover.Served(s.control) {
				s.log.Warn("the process that took over is gone: taking the place back")
				return nil
			}
		}
	}
}

// errInStandby is why a proxy in standby is not ready: nobody listens on the
// addresses of its network any more. An agent in standby is: callers find the
// one that serves under the same path, and were it not ready, a DaemonSet would
// delete its pod before that one has shown that it works.
var errInStandby = errors.New("in standby: another process has taken over")

// show answers probes until the returned function is called: a process in
// standby is alive.
func (s *standby) show(ctx context.Context, at config.Telemetry) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	var showing sync.WaitGroup
	if at != (config.Telemetry{}) {
		showing.Go(func() {
			started := time.Now()
			for said := false; ctx.Err() == nil; sleep(ctx, lookEvery) {
				f, err := expose.Listen(expose.Config{
					Process: s.process,
					Listen:  string(at.Listen),
					Health:  string(at.Health),
					Status: func() telemetry.Status {
						return telemetry.Status{Version: version, FIPS: fipsModule(), Started: started}
					},
					Ready: func() error { return s.ready },
					Log:   s.log.Named("telemetry"),
				})
				if err == nil {
					err = f.Serve(ctx)
				} else if time.Since(started) < 10*lookEvery { // those of the stint before may not be closed yet
					continue
				}
				if err != nil && !said {
					s.log.Warn("probes of this process in standby are not answered", "error", err)
					said = true
				}
			}
		})
	}
	return func() { cancel(); showing.Wait() }
}

// configAgain reads the file once more to take a place back. One that cannot be
// used, or that has the place somewhere else, may be that of a newer version
// which has failed: what this process ran with before is in force then.
func configAgain(path string, before *config.Config, check func(*config.Config) error, log hclog.Logger) *config.Config {
	c, err := config.Load(path)
	if err == nil {
		err = check(c)
	}
	if err != nil {
		log.Error("the configuration cannot be used: going on with the one from before", "error", err)
		return before
	}
	return c
}
