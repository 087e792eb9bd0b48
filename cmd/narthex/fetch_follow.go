package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/fetch"
	"github.com/narthex-id/narthex/internal/fileset"
	"github.com/narthex-id/narthex/internal/reload"
)

// tellOptions say who is told of new files, and how.
type tellOptions struct {
	exec    string
	signal  string
	pidFile string

	words  []string // of exec
	number syscall.Signal
}

func (t *tellOptions) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&t.exec, "exec", "", "program to run after each write, with its arguments; there is no shell, '…' and \"…\" keep words together")
	f.StringVar(&t.signal, "signal", "HUP", "signal to send after each write, to the process of --pid-file or to the program after --")
	f.StringVar(&t.pidFile, "pid-file", "", "file that names the process to signal; read each time")
	completeWords(cmd, "signal", "HUP", "USR1", "USR2", "TERM", "INT", "QUIT", "WINCH")
}

func (t *tellOptions) any() bool { return t.exec != "" || t.pidFile != "" }

func (t *tellOptions) check(program bool) (err error) {
	if t.number, err = reload.ParseSignal(t.signal); err != nil {
		return fmt.Errorf("--signal: %w", err)
	}
	if t.signal != "HUP" && t.pidFile == "" && !program {
		return errors.New("--signal says nobody to send it to: give --pid-file, or a program after --")
	}
	if t.exec != "" {
		if t.words, err = reload.Words(t.exec); err != nil {
			return fmt.Errorf("--exec: %w", err)
		}
	}
	return nil
}

// tellers returns what tells everybody, one after the other, or nil.
func (t *tellOptions) tellers(child *reload.Child) func(context.Context) error {
	var all []func(context.Context) error
	if child != nil {
		all = append(all, child.Tell)
	}
	if t.pidFile != "" {
		all = append(all, reload.PIDFile{Path: t.pidFile, Signal: t.number}.Tell)
	}
	if t.words != nil {
		all = append(all, reload.Command{Args: t.words, Output: os.Stderr}.Tell)
	}
	if all == nil {
		return nil
	}
	return func(ctx context.Context) error {
		var errs []error
		for _, tell := range all {
			errs = append(errs, tell(ctx))
		}
		return errors.Join(errs...)
	}
}

// follow prints or writes what is given until a signal, or the end of the program
// that it runs, ends it.
func (o *fetchOptions) follow(cmd *cobra.Command, client *fetch.Client) (err error) {
	log := newLogger("narthex.fetch", config.Log{Level: o.logLevel, Format: o.logFormat})
	f := fetch.Follow{Names: &o.names, Log: log}
	var child *reload.Child
	if o.write == "" {
		f.Show = func(g *fetch.Given) {
			if err := printGiven(cmd.OutOrStdout(), g, o.format, "", nil); err != nil {
				log.Error("cannot print what was given", "error", err)
			}
		}
	} else {
		dir, err := fileset.Open(o.write, o.fileOwner)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, dir.Close()) }()
		f.Put, f.Sweep = dir.Put, dir.Sweep
		if len(o.program) > 0 {
			child = reload.NewChild(o.program, o.tell.number)
		}
		f.Tell = o.tell.tellers(child)
	}
	ctx, stop := context.WithCancel(cmd.Context())
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	given := make(chan *fetch.Given, 1)
	trouble := troubles{log: log, client: client}
	g.Go(func() error {
		err := client.Watch(ctx, o.request, func(g *fetch.Given) {
			trouble.over()
			newest(given, g)
		}, func(err error) {
			if ctx.Err() == nil {
				trouble.note(err)
			}
		})
		if errors.Is(err, context.Canceled) {
			err = nil // it is us who end
		}
		if err != nil {
			err = client.Explain(err)
		}
		return err
	})
	g.Go(func() error { f.Run(ctx, given); return nil })
	g.Go(func() error { passSignals(ctx, child); stop(); return nil })
	return endFollow(g.Wait(), child)
}

// endFollow waits for the program, whose exit code is ours.
func endFollow(err error, child *reload.Child) error {
	if child == nil {
		return err
	}
	code, childErr := child.Wait()
	switch {
	case err != nil || childErr != nil:
		return errors.Join(err, childErr)
	case code != 0:
		return exitError{code}
	}
	return nil
}

// newest leaves g in a channel of one in place of what nobody has taken yet. Only
// one goroutine may send.
func newest(to chan *fetch.Given, g *fetch.Given) {
	select {
	case <-to:
	default:
	}
	to <- g
}

// passSignals returns once this process is to end: at SIGTERM or SIGINT, or,
// where it runs a program, which signals are passed on to, when that ends. SIGHUP
// has nothing to reload here, and is no reason to end.
func passSignals(ctx context.Context, child *reload.Child) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	var ended <-chan struct{}
	if child != nil {
		signal.Notify(signals, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
		ended = child.Ended()
	}
	for {
		select {
		case s := <-signals:
			passed := child != nil && child.Pass(s)
			if !passed && (s == syscall.SIGTERM || s == syscall.SIGINT) {
				return
			}
		case <-ended:
			return
		case <-ctx.Done():
			return
		}
	}
}

// troubles logs what is in the way of news, once for each reason. Its methods are
// for one goroutine at a time.
type troubles struct {
	log    hclog.Logger
	client *fetch.Client
	last   string
}

func (t *troubles) note(err error) {
	err = t.client.Explain(err)
	if err.Error() == t.last {
		return
	}
	t.last = err.Error()
	t.log.Warn("no news from the Workload API; it is asked again and again", "error", err)
}

func (t *troubles) over() {
	if t.last != "" {
		t.log.Info("the Workload API answers again")
		t.last = ""
	}
}
