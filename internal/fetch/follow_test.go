package fetch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/fileset"
)

// readers is what Follow drives, and a diary of it.
type readers struct {
	t       *testing.T
	started time.Time
	diary   []string
	failPut int // so many times
	fail    int // likewise, of telling
	takes   time.Duration
	log     strings.Builder
}

func (r *readers) note(what string) {
	r.diary = append(r.diary, fmt.Sprintf("%s %s", time.Since(r.started), what))
}

// follow runs script beside Follow, in a bubble of its own.
func follow(t *testing.T, r *readers, script func(give func(token string, life time.Duration))) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r.t, r.started = t, time.Now()
		f := Follow{
			Names: &Names{},
			Put: func(files []fileset.File) error {
				if r.failPut > 0 {
					r.failPut--
					r.note("put failed")
					return errors.New("disk full")
				}
				r.note("put " + string(files[0].Data))
				return nil
			},
			Sweep: func() error { r.note("sweep"); return nil },
			Tell: func(context.Context) error {
				time.Sleep(r.takes)
				if r.fail > 0 {
					r.fail--
					r.note("tell failed")
					return errors.New("exit status 1")
				}
				r.note("tell")
				return nil
			},
			Log: hclog.New(&hclog.LoggerOptions{Output: &r.log, DisableTime: true}),
		}
		ctx, cancel := context.WithCancel(t.Context())
		given := make(chan *Given, 1)
		var g sync.WaitGroup
		g.Go(func() { f.Run(ctx, given) })
		script(func(token string, life time.Duration) {
			given <- &Given{Kind: JWT, Identities: []Identity{{
				ID: spiffeid.RequireFromString("spiffe://example.org/web"), Token: token, NotAfter: time.Now().Add(life),
			}}}
			synctest.Wait()
		})
		cancel()
		g.Wait()
	})
}

func (r *readers) check(want ...string) {
	r.t.Helper()
	if !slices.Equal(r.diary, want) {
		r.t.Errorf("it did\n  %s\nwant\n  %s", strings.Join(r.diary, "\n  "), strings.Join(want, "\n  "))
	}
}

// TestFollow leaves readers their time: three changes within it are two sets.
func TestFollow(t *testing.T) {
	t.Parallel()
	r := &readers{}
	follow(t, r, func(give func(string, time.Duration)) {
		give("a", time.Hour)
		time.Sleep(500 * time.Millisecond)
		give("b", time.Hour)
		give("c", time.Hour)
		time.Sleep(time.Minute)
	})
	r.check("0s put a", "0s tell", "2s sweep", "2s put c", "2s tell", "4s sweep")
}

// TestFollowWaitsForReaders counts their time from when telling them is over.
func TestFollowWaitsForReaders(t *testing.T) {
	t.Parallel()
	r := &readers{takes: 10 * time.Second}
	follow(t, r, func(give func(string, time.Duration)) {
		give("a", time.Hour)
		give("b", time.Hour)
		time.Sleep(time.Minute)
	})
	r.check("0s put a", "10s tell", "12s sweep", "12s put b", "22s tell", "24s sweep")
}

func TestFollowTellsAgain(t *testing.T) {
	t.Parallel()
	r := &readers{fail: 3}
	follow(t, r, func(give func(string, time.Duration)) {
		give("a", time.Hour)
		time.Sleep(time.Minute)
		give("b", time.Hour)
		time.Sleep(time.Minute)
	})
	r.check("0s put a", "0s tell failed", "2s sweep", "5s tell failed", "1m0s put b", "1m0s tell failed", "1m2s sweep", "1m5s tell")
	if n := strings.Count(r.log.String(), "with the next change"); n != 1 {
		t.Errorf("the log says %d times that it gave up:\n%s", n, r.log.String())
	}
}

func TestFollowWritesAgain(t *testing.T) {
	t.Parallel()
	r := &readers{failPut: 2}
	follow(t, r, func(give func(string, time.Duration)) {
		give("a", time.Hour)
		time.Sleep(time.Minute)
	})
	r.check("0s put failed", "5s put failed", "10s put a", "10s tell", "12s sweep")
	if !strings.Contains(r.log.String(), "disk full") {
		t.Error(r.log.String())
	}
}

// TestFollowSameFiles does nothing where what was given makes the same files.
func TestFollowSameFiles(t *testing.T) {
	t.Parallel()
	r := &readers{}
	follow(t, r, func(give func(string, time.Duration)) {
		give("a", time.Hour)
		time.Sleep(time.Minute)
		give("a", time.Hour)
		give("b", time.Hour)
		give("a", time.Hour) // b was taken, and is in force by now
		time.Sleep(time.Minute)
	})
	r.check("0s put a", "0s tell", "2s sweep", "1m0s put b", "1m0s tell", "1m2s sweep", "1m2s put a", "1m2s tell", "1m4s sweep")
}

func TestFollowSaysThatTheIdentityHasEnded(t *testing.T) {
	t.Parallel()
	for wait, want := range map[time.Duration]int{59 * time.Second: 0, time.Hour: 1} {
		r := &readers{}
		follow(t, r, func(give func(string, time.Duration)) {
			give("a", time.Minute)
			time.Sleep(wait)
			give("b", time.Hour)
			time.Sleep(time.Minute)
		})
		if n := strings.Count(r.log.String(), "the identity has ended and no other has come"); n != want {
			t.Errorf("after %s the log says so %d times:\n%s", wait, n, r.log.String())
		}
	}
}
