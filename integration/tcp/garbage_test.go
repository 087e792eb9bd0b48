//go:build integration

package tcp_test

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// garbage is one kind of what comes to a port on the Internet.
type garbage struct {
	name   string
	come   func(net.Conn) // sends it; the connection is read to its end afterwards
	reason string         // part of the reason in the access record
}

func garbages(d *door) []garbage {
	hello := clientHello()
	send := func(b []byte) func(net.Conn) { return func(c net.Conn) { _, _ = c.Write(b) } }
	finish := func(b []byte) func(net.Conn) {
		return func(c net.Conn) {
			_, _ = c.Write(b)
			_ = c.(*net.TCPConn).CloseWrite()
		}
	}
	handshake := func(config *tls.Config) func(net.Conn) {
		return func(c net.Conn) {
			secured := tls.Client(c, config)
			if secured.Handshake() == nil {
				_, _ = io.Copy(io.Discard, secured)
			}
		}
	}
	giant := d.ca.leaf("/client", func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Value: make([]byte, 100<<10)}}
	})
	chain := d.client.client()
	for len(chain.Certificates[0].Certificate) < 40 {
		chain.Certificates[0].Certificate = append(chain.Certificates[0].Certificate, d.ca.cert.Raw)
	}
	zeros := append([]byte{22, 3, 1, 0x40, 0}, make([]byte, 16<<10)...) // a whole record
	return []garbage{
		{"random", func(c net.Conn) {
			b := make([]byte, 600)
			_, _ = rand.Read(b)
			copy(b, "\xff\xfe\xfd\xfc\xfb")
			_, _ = c.Write(b)
		}, "first bytes are fffefdfcfb"},
		{"http", send([]byte("GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")), "plain HTTP"},
		{"ssh", send([]byte("SSH-2.0-OpenSSH_9.2\r\n")), "first bytes are 5353482d32"},
		{"truncated", finish(hello[:len(hello)/2]), "closed the connection during the handshake"},
		{"nothing", finish(nil), "closed the connection during the handshake"},
		{"zeros", send(zeros), "TLS handshake"},
		{"hello-and-garbage", send(append(slices.Clone(hello), "this is no record of TLS"...)), "first bytes are 7468697320"},
		{"too-large-record", send([]byte{22, 3, 1, 0xff, 0xff, 1, 2, 3, 4, 5}), "first bytes are 160301ffff"},
		{"no-certificate", handshake(&tls.Config{InsecureSkipVerify: true}), "sent no certificate"},
		{"giant-certificate", handshake(giant.client()), "certificates of "},
		{"long-chain", handshake(chain), "40 certificates"},
	}
}

// TestGarbage floods a door with all kinds of it. Good clients get through all
// the while, every refusal leaves one record with a reason, the log stays
// short, memory stays bounded, and nothing is left afterwards.
func TestGarbage(t *testing.T) {
	t.Parallel()
	const flood, before = 4000, 50
	d := newDoor(t)
	kinds := garbages(d)
	for range before { // what is kept for later is kept by now
		if err := askTLS(d.address, d.client); err != nil {
			t.Fatal(err)
		}
	}
	d.quiet()
	files, goroutines, memory := stage.OpenFiles(t, d.PID()), d.Metric("go_goroutines"), stage.RSS(t, d.PID())
	began := time.Now()
	good := d.goodClients()
	var g sync.WaitGroup
	var next atomic.Int32
	for range 16 {
		g.Go(func() {
			for i := int(next.Add(1)); i <= flood; i = int(next.Add(1)) {
				c, err := net.DialTimeout("tcp", d.address, callTime)
				if err != nil {
					t.Error(err)
					return
				}
				_ = c.SetDeadline(time.Now().Add(callTime))
				kinds[i%len(kinds)].come(c)
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			}
		})
	}
	ended := make(chan struct{})
	go func() { g.Wait(); close(ended) }()
	most := 0
	for flooding := true; flooding; {
		select {
		case <-ended:
			flooding = false
		case <-time.After(200 * time.Millisecond):
			most = max(most, stage.RSS(t, d.PID()))
		}
	}
	answered := good.stop(t)
	took := time.Since(began)
	d.quiet()
	t.Logf("%d bad connections and %d good ones in %s; memory grew by %d MiB", flood, answered, took.Round(time.Millisecond), (most-memory)>>20)
	if most-memory > 96<<20 {
		t.Errorf("memory grew by %d MiB", (most-memory)>>20)
	}
	d.hasRecords(t, before+flood+answered)
	d.hasReasons(t, d.Records(), kinds, flood)
	if lines, most := d.Count("connection refused"), refusalLines(time.Since(began)); lines > most {
		t.Errorf("%d lines in the log, at most %d are to be", lines, most)
	}
	d.leavesNothing(files, goroutines)
}

// refusalLines bounds how many refusals the log tells of in that time: ten at
// once, then one a second.
func refusalLines(took time.Duration) int { return 10 + int(took/time.Second) + 2 }

// hasRecords waits until each of so many connections has left its record.
func (d *door) hasRecords(t *testing.T, connections int) {
	t.Helper()
	stage.Eventually(t, stage.Soon, "each connection has left its record", func() error {
		if n := len(d.Records()); n != connections {
			return fmt.Errorf("%d records of %d connections", n, connections)
		}
		return nil
	})
}

// hasReasons wants as many refusals of each kind as there were.
func (d *door) hasReasons(t *testing.T, records []telemetry.Access, kinds []garbage, flood int) {
	t.Helper()
	got, want := map[string]int{}, map[string]int{}
	for i := 1; i <= flood; i++ {
		want[kinds[i%len(kinds)].reason]++
	}
	for _, a := range records {
		if a.Outcome == "success" {
			continue
		}
		at := slices.IndexFunc(kinds, func(k garbage) bool { return strings.Contains(a.Reason, k.reason) })
		if at < 0 {
			t.Errorf("a refusal that was not asked for: %+v", a)
			continue
		}
		got[kinds[at].reason]++
	}
	for reason, n := range want {
		if got[reason] != n {
			t.Errorf("%d records say %q, want %d", got[reason], reason, n)
		}
	}
}

// goodClient comes to the door again and again while others do what they do.
type goodClient struct {
	g       sync.WaitGroup
	stopped chan struct{}
	times   []time.Duration
	errs    []error
}

func (d *door) goodClients() *goodClient {
	c := &goodClient{stopped: make(chan struct{})}
	c.g.Go(func() {
		for len(c.errs) < 20 {
			select {
			case <-c.stopped:
				return
			default:
			}
			began := time.Now()
			if err := askTLS(d.address, d.client); err != nil {
				c.errs = append(c.errs, fmt.Errorf("after %s: %w", time.Since(began), err))
			}
			c.times = append(c.times, time.Since(began))
		}
	})
	return c
}

// slowest is how long a good client may have to wait on a machine that is busy
// with bad ones.
const slowest = 30 * time.Second

// stop ends it and returns how many calls there were.
func (c *goodClient) stop(t *testing.T) int {
	t.Helper()
	close(c.stopped)
	c.g.Wait()
	for _, err := range c.errs {
		t.Errorf("a good client: %v", err)
	}
	if len(c.times) == 0 {
		t.Fatal("no good client came")
	}
	slices.Sort(c.times)
	worst := c.times[len(c.times)-1]
	t.Logf("%d good clients: half of them within %s, all within %s", len(c.times), c.times[len(c.times)/2], worst)
	if worst > slowest {
		t.Errorf("a good client waited for %s", worst)
	}
	return len(c.times)
}

// TestHalfOpen holds ten thousand connections that say nothing, or half of a
// hello. Good clients get through, and those that say nothing are gone when
// their time is over.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	const silent = 10_000
	d := newDoor(t)
	hello := clientHello()
	files, goroutines, memory := stage.OpenFiles(t, d.PID()), d.Metric("go_goroutines"), stage.RSS(t, d.PID())
	began := time.Now()
	good := d.goodClients()
	conns := make([]net.Conn, 0, silent)
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for i := range silent {
		c, err := net.DialTimeout("tcp", d.address, callTime)
		if err != nil {
			t.Fatalf("after %d: %v", i, err)
		}
		conns = append(conns, c)
		if i%2 == 0 {
			_, _ = c.Write(hello[:len(hello)/2])
		}
	}
	grown := stage.RSS(t, d.PID()) - memory
	answered := good.stop(t)
	t.Logf("%d half-open connections cost %d KiB each", silent, grown/silent/1024)
	if grown/silent > 32<<10 {
		t.Errorf("each half-open connection cost %d KiB", grown/silent/1024)
	}
	d.quiet()
	d.hasRecords(t, silent+answered)
	for _, a := range d.Records() {
		if a.Decision == "" && !strings.Contains(a.Reason, "hello") && !strings.Contains(a.Reason, "handshake") {
			t.Errorf("a silent client's record: %+v", a)
			break
		}
	}
	if lines, most := d.Count("connection refused"), refusalLines(time.Since(began)); lines > most {
		t.Errorf("%d lines in the log, at most %d are to be", lines, most)
	}
	d.leavesNothing(files+20, goroutines)
}
