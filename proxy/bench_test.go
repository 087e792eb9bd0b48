package proxy

import (
	"crypto/tls"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"
)

// benchProxy starts a proxy for a benchmark and returns its address and a
// client's configuration.
func benchProxy(b *testing.B) (addr string, p *running, cc *tls.Config) {
	b.Helper()
	ca := testca.New(b, "example.org")
	p = run(b, Config{
		Listeners: []Listener{inbound("orders", serve(b, echo))}, Policy: rulesOf(b, allowAll),
		Identities: source(b, ca.SVID("/orders"), ca), Log: hclog.NewNullLogger(),
	})
	go func() { // nobody else takes the records
		for range p.records {
		}
	}()
	b.Cleanup(func() { p.stop(); close(p.records) })
	return p.addr("orders"), p, clientConfig(ca.SVID("/web"))
}

// BenchmarkHandshake is one connection with both ends' work: handshake,
// decision, dial, one byte each way, close.
func BenchmarkHandshake(b *testing.B) {
	addr, _, cc := benchProxy(b)
	buf := make([]byte, 1)
	for b.Loop() {
		c, err := tls.Dial("tcp", addr, cc)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
		_ = c.Close()
	}
}

// BenchmarkEcho is 128 bytes there and back on a live connection.
func BenchmarkEcho(b *testing.B) {
	addr, _, cc := benchProxy(b)
	c := dialTLS(b, addr, cc)
	_ = c.SetDeadline(time.Time{})
	buf := make([]byte, 128)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStreams is a request of HTTP/2 and its answer, of 100 that are asked
// for at a time, towards services of either version.
func BenchmarkStreams(b *testing.B) {
	for _, p := range []Protocol{ProtocolHTTP1, ProtocolHTTP2} {
		b.Run(p.String(), func(b *testing.B) {
			const atOnce = 100
			c := crowdOf(b, p)
			stream := uint32(1)
			b.ReportAllocs()
			for b.Loop() {
				if (stream/2+1)%atOnce == 0 {
					c.ask(stream-2*(atOnce-1), atOnce)
				}
				stream += 2
			}
		})
	}
}

// BenchmarkAskAgain asks 1,000 live connections of one proxy once.
func BenchmarkAskAgain(b *testing.B) {
	addr, p, cc := benchProxy(b)
	const live = 1000
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range live / 8 {
				c, err := tls.Dial("tcp", addr, cc)
				if err != nil {
					b.Error(err)
					return
				}
				b.Cleanup(func() { _ = c.Close() })
				if err := trySay(c, "x"); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for b.Loop() {
		if n := p.ask(p.table.of(nil)); n.all != live || n.closed != 0 {
			b.Fatalf("asked %d, closed %d", n.all, n.closed)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/live, "ns/connection")
}
