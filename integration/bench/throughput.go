package main

import (
	"context"
	"crypto/tls"
	"time"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

// throughput is a row that counts the CPU time of a proxy by what it carried.
type throughput struct {
	row   *row
	kinds []*proxyKind
	curve func(*proxyKind) tls.CurveID // the key exchange
	how   manner
	units int           // what is done in a round
	per   int           // so many of them make one unit of the row
	each  time.Duration // the row's unit of time

	// prepare makes ready to do n units. Work is what is measured; end takes
	// down what prepare made.
	prepare func(ctx context.Context, c client, n int) (work func() error, end func(), err error)
}

const gigabyte = 1_000_000_000

var throughputs = []throughput{
	{row: rowHandshake, kinds: allProxies, curve: classical, units: 2000, per: 1, each: time.Microsecond, prepare: prepareHandshakes},
	{row: rowHandshakeLogged, kinds: allProxies, curve: classical, how: logged, units: 2000, per: 1, each: time.Microsecond, prepare: prepareHandshakes},
	{row: rowHandshakeTickets, kinds: allProxies, curve: classical, how: ticketed, units: 2000, per: 1, each: time.Microsecond, prepare: prepareHandshakes},
	{row: rowHandshakePQ, kinds: []*proxyKind{kindNarthex, kindGhostunnel}, curve: postQuantum, units: 2000, per: 1, each: time.Microsecond, prepare: prepareHandshakes},
	{row: rowEcho, kinds: allProxies, curve: classical, units: 64_000, per: 1, each: time.Microsecond, prepare: prepareEchoes},
	{row: rowBulkUp, kinds: allProxies, curve: classical, units: gigabyte, per: gigabyte, each: time.Second, prepare: prepareBulk(opSink)},
	{row: rowBulkDown, kinds: allProxies, curve: classical, units: gigabyte, per: gigabyte, each: time.Second, prepare: prepareBulk(opSource)},
}

// The same beside many silent connections, of one proxy alone.
var (
	throughputHandshakeBeside = throughput{row: rowHandshakeBeside, units: 1000, per: 1, each: time.Microsecond, prepare: prepareHandshakes}
	throughputEchoBeside      = throughput{row: rowEchoBeside, units: 32_000, per: 1, each: time.Microsecond, prepare: prepareEchoes}
)

func classical(*proxyKind) tls.CurveID { return tls.X25519 }

// postQuantum is classical for the peers, none of which can do better.
func postQuantum(kind *proxyKind) tls.CurveID {
	if kind.name == ours {
		return tls.X25519MLKEM768
	}
	return tls.X25519
}

func prepareHandshakes(ctx context.Context, c client, n int) (func() error, func(), error) {
	return func() error { return c.handshakes(ctx, n) }, func() {}, nil
}

func prepareEchoes(ctx context.Context, c client, n int) (func() error, func(), error) {
	return c.echoes(ctx, 16, 128, n)
}

func prepareBulk(op byte) func(context.Context, client, int) (func() error, func(), error) {
	return func(ctx context.Context, c client, n int) (func() error, func(), error) {
		return c.bulk(ctx, op, 4, uint64(n))
	}
}

// run measures the row. The proxies run side by side and work one after the
// other.
func (t throughput) run(ctx context.Context, b *bench) error {
	proxies, end, err := b.startProxies(ctx, b.proxies(t.kinds), t.how, t.curve)
	if err != nil {
		return err
	}
	defer end()
	n := b.scaled(t.units)
	for _, p := range proxies { // warm
		if _, err := t.work(ctx, p, n/5); err != nil {
			return p.complain(err)
		}
	}
	return b.rounds(ctx, len(proxies), func(side int) error {
		p := proxies[side]
		used, err := t.work(ctx, p, n)
		if err != nil {
			return p.complain(err)
		}
		t.add(b, p, used, n)
		return nil
	})
}

// add adds what n units took to the row.
func (t throughput) add(b *bench, p *proxy, used spent, n int) {
	b.results.add(t.row, p.kind.name, used.cpu.Seconds()/t.each.Seconds()*float64(t.per)/float64(n))
	if len(used.waits) > 0 {
		b.p99.add(t.row, p.kind.name, figures.Quantile(used.waits, 0.99))
	}
}

// spent is what some work took.
type spent struct {
	cpu   time.Duration // of the proxy
	waits []float64     // µs of each request, where they were measured
}

// Before its time is read, a proxy finishes what it has left of the work:
// connections to close, records to write.
const finish = 100 * time.Millisecond

// work does n units and returns what that took.
func (t throughput) work(ctx context.Context, p *proxy, n int) (spent, error) {
	c := p.client
	c.took = &waits{}
	work, end, err := t.prepare(ctx, c, n)
	if err != nil {
		return spent{}, err
	}
	defer end()
	used, err := cpuOf(ctx, work, []*process{p.process})
	if err != nil {
		return spent{}, err
	}
	return spent{used[0], c.took.list}, nil
}

// cpuOf returns the CPU time that each group of processes used for some work.
func cpuOf(ctx context.Context, work func() error, groups ...[]*process) (used []time.Duration, err error) {
	before, err := clocks(ctx, groups)
	if err != nil {
		return nil, err
	}
	if err := work(); err != nil {
		return nil, err
	}
	used, err = clocks(ctx, groups)
	for i := range used {
		used[i] -= before[i]
	}
	return used, err
}

// clocks returns the CPU time of groups of processes once they have finished.
func clocks(ctx context.Context, groups [][]*process) ([]time.Duration, error) {
	if err := pause(ctx, finish); err != nil {
		return nil, err
	}
	sums := make([]time.Duration, len(groups))
	for i, group := range groups {
		for _, p := range group {
			used, err := cpuTime(p.pid())
			if err != nil {
				return nil, err
			}
			sums[i] += used
		}
	}
	return sums, nil
}
