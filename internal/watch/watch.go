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
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/hashicorp/go-hclog"
)

// settle is how long files must have been quiet before a change is told: who
// renews a certificate writes more than one file.
const settle = 100 * time.Millisecond

// settleAtMost bounds that where it never gets quiet: something else may write
// into the same directory all the time.
const settleAtMost = time.Second

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
	f := follower{log: c.Log, poll: c.Poll}
	defer f.close()
	f.follow(c.Paths())
	c.Changed()
	poll := time.NewTicker(c.Poll)
	defer poll.Stop()
	quiet := time.NewTimer(time.Hour)
	quiet.Stop()
	defer quiet.Stop()
	var since time.Time // the first change that was not told yet
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-f.events():
			if !f.dirs.concerns(event.Name) {
				continue
			}
			if since.IsZero() {
				since = time.Now()
			}
			quiet.Reset(min(settle, time.Until(since.Add(settleAtMost))))
			continue
		case err := <-f.failures():
			c.Log.Warn("watch files: some changes may be seen later", "error", err)
			continue
		case <-quiet.C:
		case <-poll.C:
		}
		since = time.Time{}
		f.follow(c.Paths())
		c.Changed()
	}
}

// watched are the directories that are watched, by names without symbolic
// links, and what counts in each: all names (nil) where a file is, otherwise
// those that lead to one.
type watched map[string][]string

func (w watched) concerns(name string) bool {
	names, there := w[filepath.Dir(name)]
	return !there || names == nil || slices.Contains(names, filepath.Base(name))
}

// maxLinks bounds the symbolic links on the way to a file, as the kernel does.
const maxLinks = 40

// follower holds the kernel's announcements of some directories.
type follower struct {
	log     hclog.Logger
	poll    time.Duration
	watcher *fsnotify.Watcher // nil while nothing can be announced
	dirs    watched
	seen    map[string]os.FileInfo // the directories as they were when they came to be watched
	warned  bool
}

// follow watches the directories of the files, and those that decide where
// they are: a file that is replaced by rename is another file, its directory
// is the same; a symbolic link on the way, as ..data in a Kubernetes volume,
// may come to lead elsewhere; and the directory itself may be replaced.
//
// Directories other than before get a new watcher: the library confuses two
// that had one name.
func (f *follower) follow(paths []string) {
	dirs, seen := watched{}, map[string]os.FileInfo{}
	for _, p := range paths {
		dirs.add(p)
	}
	for dir := range dirs {
		if info, err := os.Stat(dir); err == nil { // else not there yet: the poll finds it
			seen[dir] = info
		}
	}
	f.dirs = dirs
	if f.watcher != nil && maps.EqualFunc(f.seen, seen, os.SameFile) {
		return
	}
	f.close()
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		if !f.warned {
			f.log.Warn("cannot watch files: they are only looked at now and then", "every", f.poll, "error", err)
		}
		f.warned = true
		return
	}
	f.watcher, f.seen, f.warned = watcher, seen, false
	for dir := range seen {
		_ = watcher.Add(dir) // gone again, or not to be read: the poll has to do
	}
}

func (f *follower) close() {
	if f.watcher != nil {
		_ = f.watcher.Close()
		f.watcher = nil
	}
}

// events and failures are channels that never say anything while nothing can
// be announced.
func (f *follower) events() <-chan fsnotify.Event {
	if f.watcher == nil {
		return nil
	}
	return f.watcher.Events
}

func (f *follower) failures() <-chan error {
	if f.watcher == nil {
		return nil
	}
	return f.watcher.Errors
}

// add takes the directories on the way to a file.
func (w watched) add(path string) {
	for range maxLinks {
		path = filepath.Clean(path)
		link, rest := firstLink(path)
		if link == "" {
			dir := filepath.Dir(path)
			w[dir] = nil
			w.leads(filepath.Dir(dir), filepath.Base(dir))
			return
		}
		w.leads(filepath.Dir(link), filepath.Base(link))
		to, err := os.Readlink(link)
		if err != nil {
			return // it was one a moment ago; whoever changed it is announced
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(link), to)
		}
		path = filepath.Join(to, rest)
	}
}

// leads has a name in a directory count, unless all of them do.
func (w watched) leads(dir, name string) {
	names, there := w[dir]
	if !there || (names != nil && !slices.Contains(names, name)) {
		w[dir] = append(names, name)
	}
}

// firstLink returns the first symbolic link on a path, and what follows it.
func firstLink(path string) (link, rest string) {
	for at := 0; at < len(path); {
		end := len(path)
		if next := strings.IndexByte(path[at+1:], filepath.Separator); next >= 0 {
			end = at + 1 + next
		}
		if info, err := os.Lstat(path[:end]); err != nil {
			return "", ""
		} else if info.Mode().Type() == os.ModeSymlink {
			return path[:end], path[end:]
		}
		at = end
	}
	return "", ""
}
