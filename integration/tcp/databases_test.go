//go:build integration

package tcp_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// loadTime is how long databases are under load.
const loadTime = 75 * time.Second

// pgbench runs it against address, which has to go without a failed
// transaction, and returns what it said.
func pgbench(t *testing.T, address string, args ...string) string {
	t.Helper()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), loadTime+time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "pgbench", append(args, "-h", host, "-p", port, "-U", "postgres", "postgres")...)
	cmd.Env = append(os.Environ(), "PGSSLMODE=disable", "PGGSSENCMODE=disable", "PGCONNECT_TIMEOUT=60")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("pgbench %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// redis starts Redis and returns its address.
func redis(t *testing.T) string {
	t.Helper()
	address := stage.FreeAddress(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	p := stage.Start(t, "redis-server", "redis-server", []string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no", "--dir", stage.Folder(t, "redis")})
	listens(t, p, address)
	return address
}

// redisUser writes what it then reads, on one connection or on a new one each
// time.
type redisUser struct {
	address string
	name    string
	anew    bool
	conn    net.Conn
	in      *bufio.Reader
}

// do sends one command and returns the answer.
func (r *redisUser) do(args ...string) (string, error) {
	if r.conn == nil {
		c, err := net.DialTimeout("tcp", r.address, callTime)
		if err != nil {
			return "", err
		}
		r.conn, r.in = c, bufio.NewReader(c)
	}
	if err := r.conn.SetDeadline(time.Now().Add(callTime)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(r.conn, strings.Join(args, " ")+"\r\n"); err != nil {
		return "", err
	}
	answer, err := r.in.ReadString('\n')
	if err == nil && strings.HasPrefix(answer, "$") { // the length of what follows
		answer, err = r.in.ReadString('\n')
	}
	return strings.TrimSpace(answer), err
}

// use writes and reads until ended is closed, and counts what it did.
func (r *redisUser) use(t *testing.T, ended <-chan struct{}, count *atomic.Int64) {
	defer func() {
		if r.conn != nil {
			r.conn.Close()
		}
	}()
	for n := 0; ; n++ {
		select {
		case <-ended:
			return
		case <-time.After(2 * time.Millisecond):
		}
		value := fmt.Sprintf("value-%d", n)
		if answer, err := r.do("SET", r.name, value); err != nil || answer != "+OK" {
			t.Errorf("redis: %s, %dth write: %q, %v", r.name, n, answer, err)
			return
		}
		if answer, err := r.do("GET", r.name); err != nil || answer != value {
			t.Errorf("redis: %s, %dth read: %q, %v", r.name, n, answer, err)
			return
		}
		count.Add(2)
		if r.anew {
			r.conn.Close()
			r.conn = nil
		}
	}
}

// TestDatabasesUnderChange has PostgreSQL, on its Unix socket, and Redis under
// load through both proxies, while SVIDs rotate, rules and listeners change,
// the agent is restarted and killed, and both proxies are replaced by newer
// ones. No query fails.
func TestDatabasesUnderChange(t *testing.T) {
	t.Parallel()
	db := stage.NewPostgres(t)
	db.Start()
	e, addresses := newEstate(t, map[string]string{"postgres": "unix:" + filepath.Join(db.Dir, ".s.PGSQL.5432"), "redis": redis(t)})
	pgbench(t, addresses["postgres"], "-i", "-q", "-s", "1")
	ended := make(chan struct{})
	var g, load sync.WaitGroup
	seconds := strconv.Itoa(int(loadTime.Seconds()))
	load.Go(func() {
		out := pgbench(t, addresses["postgres"], "-n", "-c", "6", "-j", "2", "-T", seconds, "-R", "200")
		t.Log(lines(out, "number of transactions actually", "number of failed"))
		if !strings.Contains(out, "number of failed transactions: 0 ") {
			t.Errorf("pgbench on connections that stay:\n%s", out)
		}
	})
	load.Go(func() {
		out := pgbench(t, addresses["postgres"], "-n", "-C", "-S", "-c", "2", "-T", seconds, "-R", "20")
		t.Log(lines(out, "number of transactions actually", "number of failed"))
		if !strings.Contains(out, "number of failed transactions: 0 ") {
			t.Errorf("pgbench on new connections:\n%s", out)
		}
	})
	var commands atomic.Int64
	for i := range 4 {
		r := &redisUser{address: addresses["redis"], name: fmt.Sprintf("key-%d", i), anew: i == 3}
		g.Go(func() { r.use(t, ended, &commands) })
	}
	go func() { load.Wait(); close(ended) }()
	times := e.disturb(ended)
	g.Wait()
	wasDisturbed(t, times)
	t.Logf("%d commands of Redis", commands.Load())
	if commands.Load() < 1000 {
		t.Errorf("only %d commands of Redis", commands.Load())
	}
}

// lines returns those of text that hold one of parts.
func lines(text string, parts ...string) string {
	var found []string
	for line := range strings.SplitSeq(text, "\n") {
		if slices.ContainsFunc(parts, func(p string) bool { return strings.Contains(line, p) }) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return strings.Join(found, "; ")
}
