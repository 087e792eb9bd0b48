package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"runtime/metrics"
	"sync"
	"syscall"
	"time"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// decided is what was measured of one program, mix and number of rules.
type decided struct {
	Text     int     `json:"text"`     // bytes of the rules as written
	Load     float64 `json:"load"`     // seconds of CPU time
	Peak     int     `json:"peak"`     // bytes by which the heap grew at most while loading
	Held     int     `json:"held"`     // bytes by which it was larger afterwards
	Decision float64 `json:"decision"` // ns of CPU time
	Allocs   float64 `json:"allocs"`   // by decision
	Asked    int     `json:"asked"`    // requests whose answers were compared before
	Of       int     `json:"of"`
	GaveUp   string  `json:"gave_up,omitempty"` // why there is no more
}

// Of each mix as many requests are asked, over and over.
const requestCount = 1024

const (
	rulesSeed    = 1
	requestsSeed = 2
)

// decide measures one program.
func (o *options) decide() (*decided, error) {
	mix := rulemix.Generate(rulemix.Kind(o.mix), o.rules, rulesSeed)
	requests := mix.Requests(requestCount, requestsSeed)
	want, err := answers(mix, requests)
	if err != nil {
		return nil, err
	}
	e := engines[o.engine]()
	text, err := e.write(mix)
	if err != nil {
		return nil, fmt.Errorf("write rules: %w", err)
	}
	got := &decided{Text: len(text), Of: requestCount}
	if err := o.load(e, text, got); err != nil {
		return nil, fmt.Errorf("load %d rules into %s: %w", o.rules, o.engine, err)
	}
	if err := e.prepare(requests); err != nil {
		return nil, fmt.Errorf("prepare requests: %w", err)
	}
	a := asker{engine: e, requests: requests, want: want}
	if got.Asked, err = a.ask(o.checking, requestCount); err != nil {
		return nil, err
	}
	got.Decision, got.Allocs, err = a.measure(o.asking)
	runtime.KeepAlive(text)
	return got, err
}

// answers returns what Narthex says.
func answers(mix *rulemix.Mix, requests []rulemix.Request) ([]bool, error) {
	e := &narthex{}
	text, err := e.write(mix)
	if err != nil {
		return nil, err
	}
	if err := e.load(text); err != nil {
		return nil, err
	}
	if err := e.prepare(requests); err != nil {
		return nil, err
	}
	list := make([]bool, len(requests))
	for i := range list {
		if list[i], err = e.allows(i); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// load has the program load the rules, and watches over it.
func (o *options) load(e engine, text []byte, got *decided) error {
	runtime.GC()
	runtime.GC() // what finalizers have let go
	before := heap()
	begin, used := time.Now(), cpuTime()
	done := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			got.Peak = max(got.Peak, heap()-before)
			if took := time.Since(begin); took > o.patience || got.Peak > o.memory {
				got.GaveUp = fmt.Sprintf("given up while it loaded %d rules, after %.1f s and with a heap of %.1f GB", o.rules, took.Seconds(), float64(got.Peak)/1e9)
				_ = json.NewEncoder(os.Stdout).Encode(got) // there is nobody to tell
				os.Exit(0)                                 // nothing else would end it
			}
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	})
	err := e.load(text)
	got.Load = (cpuTime() - used).Seconds()
	close(done)
	watching.Wait()
	runtime.GC()
	runtime.GC()
	got.Held = heap() - before
	got.Peak = max(got.Peak, got.Held)
	return err
}

// cpuTime is what this process has used, its garbage collector included.
func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // it fails for bad arguments only
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// heap returns the bytes of the heap that are in use or not swept yet.
func heap() int {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return int(sample[0].Value.Uint64())
}

// asker asks an engine the requests in turn. Every answer is compared.
type asker struct {
	engine   engine
	requests []rulemix.Request
	want     []bool
	next     int
}

func (a *asker) one() error {
	i := a.next
	a.next = (i + 1) % len(a.want)
	is, err := a.engine.allows(i)
	if err != nil {
		return fmt.Errorf("ask %+v: %w", a.requests[i], err)
	}
	if is != a.want[i] {
		return fmt.Errorf("the programs disagree: allowed is %t, narthex says %t, of those requests that %s: %+v", is, a.want[i], a.requests[i].Kind, a.requests[i])
	}
	return nil
}

// ask asks some requests, and no more once the time is over. It returns how
// many were asked.
func (a *asker) ask(lasting time.Duration, most int) (int, error) {
	begin := time.Now()
	for n := range most {
		if time.Since(begin) >= lasting {
			return n, nil
		}
		if err := a.one(); err != nil {
			return n, err
		}
	}
	return most, nil
}

// measure asks for some time, and eight requests at least. It returns the
// nanoseconds and the allocations of one decision.
func (a *asker) measure(lasting time.Duration) (ns, allocations float64, err error) {
	if _, err := a.ask(lasting/10, 1<<20); err != nil { // warm
		return 0, 0, err
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	begin, used := time.Now(), cpuTime()
	n, batch := 0, 8
	for took := time.Duration(0); n == 0 || took < lasting; took = time.Since(begin) {
		for range batch {
			if err := a.one(); err != nil {
				return 0, 0, err
			}
		}
		n += batch
		if took < lasting/100 {
			batch *= 2 // so that the clock is not what is measured
		}
	}
	used = cpuTime() - used
	runtime.ReadMemStats(&after)
	return float64(used) / float64(n), float64(after.Mallocs-before.Mallocs) / float64(n), nil
}
