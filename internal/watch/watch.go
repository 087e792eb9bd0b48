// Package watch tells when files may have changed: by what the kernel
// announces of the directories they are in, and by looking every so often,
// since there are file systems that announce nothing.
//
//	err := watch.Files(ctx, watch.Config{Paths: paths, Changed: reload})
//
// It announces too much rather than too little (any change beside a file
// counts) and leaves it to the callback to find out whether the contents are
// others.
package watch

import (
	"context"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/hashicorp/go-hclog"
)

// settle is how long files must have been quiet before a change is told: who
// renews a certificate writes more than one file.
const settle = 100 * time.Millisecond

// DefaultPoll is how often Changed is called without any announcement.
const DefaultPoll = 15 * time.Second

// Config says what is watched.
type Config struct {
	Paths   func() []string // asked again after each change; files need not be there
	Changed func()          // called by the goroutine of Files, never twice at once
	Poll    time.Duration   // default DefaultPoll
	Log     hclog.Logger
}

// Files calls Changed once it watches (what changed before that nobody else
// will tell), after each change, and every Poll, until ctx ends.
func Files(ctx context.Context, c Config) {
	if c.Poll <= 0 {
		c.Poll = DefaultPoll
	}
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	var events <-chan fsnotify.Event
	var failures <-chan error
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		c.Log.Warn("cannot watch files: they are only looked at now and then", "every", c.Poll, "error", err)
		watcher = nil
	} else {
		defer func() { _ = watcher.Close() }()
		events, failures = watcher.Events, watcher.Errors
	}
	follow(watcher, c.Paths())
	c.Changed()
	poll := time.NewTicker(c.Poll)
	defer poll.Stop()
	quiet := time.NewTimer(time.Hour)
	quiet.Stop()
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
			quiet.Reset(settle)
			continue
		case err := <-failures:
			c.Log.Warn("watch files: some changes may be seen later", "error", err)
			continue
		case <-quiet.C:
		case <-poll.C:
		}
		follow(watcher, c.Paths())
		c.Changed()
	}
}

// follow watches the directories of the files, as named and as symbolic links
// lead now: a file that is replaced by rename is another file, its directory
// is the same. In a Kubernetes volume, the link ..data beside the files is
// what changes.
func follow(watcher *fsnotify.Watcher, paths []string) {
	if watcher == nil {
		return
	}
	for _, p := range paths {
		_ = watcher.Add(filepath.Dir(p)) // not there yet: the poll finds it
		if real, err := filepath.EvalSymlinks(p); err == nil {
			_ = watcher.Add(filepath.Dir(real))
		}
	}
}
