package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// notifyName is the inherited pipe through which a child of `narthex run`
// tells what systemd would be told: one assignment a line.
const notifyName = "@notify"

// watchdogEnv tells a child of `narthex run` how often to say that it is alive.
const watchdogEnv = "NARTHEX_WATCHDOG"

// teller tells whoever started this process how it is: systemd (sd_notify(3)),
// `narthex run`, or nobody.
type teller struct {
	send     func(states ...string) error // nil: nobody wants to know
	watchdog time.Duration                // how often it wants to hear that this process is alive; 0: never
	systemd  bool
	log      hclog.Logger

	conn    *net.UnixConn // to systemd
	starter *os.File      // who started us with --beside; nil: nobody
	mute    atomic.Bool   // another process took our place: it does the talking
}

// newTeller finds out who wants to know.
func newTeller(files inherited, log hclog.Logger) (*teller, error) {
	t := &teller{log: log, starter: files[besideName]}
	delete(files, besideName)
	if pipe, ok := files[notifyName]; ok {
		// Whoever reads must not be able to keep us from working.
		fd := int(pipe.Fd())
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("prepare the pipe to narthex run: %w", err)
		}
		t.send = func(states ...string) error {
			_, err := unix.Write(fd, []byte(strings.Join(states, "\n")+"\n"))
			return err
		}
		if text := os.Getenv(watchdogEnv); text != "" {
			every, err := time.ParseDuration(text)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", watchdogEnv, err)
			}
			t.watchdog = every
		}
		return t, nil
	}
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return t, nil
	}
	// Connected once, and not for each message as daemon.SdNotify does: a
	// process out of files must still be able to say that it is alive.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		return nil, fmt.Errorf("connect to the service manager (NOTIFY_SOCKET): %w", err)
	}
	t.systemd, t.conn = true, conn
	t.send = func(states ...string) error {
		_, err := conn.Write([]byte(strings.Join(states, "\n")))
		return err
	}
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read what systemd asks of the watchdog: %w", err), conn.Close())
	}
	t.watchdog = every / 2 // as sd_watchdog_enabled(3) recommends
	return t, nil
}

func (t *teller) close() {
	if t.conn != nil {
		_ = t.conn.Close()
	}
}

func (t *teller) tell(states ...string) {
	if t.send == nil || t.mute.Load() {
		return
	}
	if err := t.send(states...); err != nil {
		t.log.Warn("cannot tell the service manager how we are", "states", strings.Join(states, " "), "error", err)
	}
}

// tookOver says that this process has taken the place of the one before it,
// ready or not: it is the one to look after now.
func (t *teller) tookOver() {
	if t.systemd {
		t.tell(fmt.Sprintf("MAINPID=%d", os.Getpid()))
		return
	}
	t.tell(tookOverState)
}

// ready says that this process serves.
func (t *teller) ready(status string) {
	t.tell(daemon.SdNotifyReady, statusState(status))
	if t.starter != nil {
		_, _ = t.starter.WriteString("ready\n") // one that has gone away need not know
		_ = t.starter.Close()
		t.starter = nil
	}
}

// tookOverState is what `narthex run` is told in place of MAINPID.
const tookOverState = "X_NARTHEX_TOOK_OVER=1"

// reload says that files are read again until done is called. systemd ties
// the two together by the time (Type=notify-reload).
func (t *teller) reload() (done func()) {
	t.tell(daemon.SdNotifyReloading, strings.TrimSpace(daemon.SdNotifyMonotonicUsec()))
	return func() { t.tell(daemon.SdNotifyReady) }
}

func (t *teller) stopping(status string) {
	t.tell(daemon.SdNotifyStopping, statusState(status))
}

// statusEvery is how often the status line is looked at.
const statusEvery = 5 * time.Second

// follow keeps the status line up to date, and says that this process is alive
// for as long as alive finds it so, until ctx ends. alive is given until the
// next time is due.
func (t *teller) follow(ctx context.Context, status func() string, alive func(context.Context) error) {
	if t.send == nil {
		return
	}
	every := statusEvery
	if t.watchdog > 0 {
		every = min(every, t.watchdog)
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	said := ""
	for {
		if t.watchdog > 0 {
			within, cancel := context.WithTimeout(ctx, every)
			err := alive(within)
			cancel()
			if err == nil {
				t.tell(daemon.SdNotifyWatchdog)
			} else if ctx.Err() == nil {
				t.log.Error("this process does not work as it should: the watchdog is not told that it is alive", "error", err)
			}
		}
		if now := status(); now != said {
			t.tell(statusState(now))
			said = now
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// statusState is one line of at most 200 bytes, whatever it is made of.
func statusState(text string) string {
	const most = 200
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most-3], "") + "…"
	}
	return "STATUS=" + text
}
