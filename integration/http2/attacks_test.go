//go:build integration

package http2_test

import (
	"encoding/binary"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

const (
	// flood is how many frames an attacker has, or pairs of them.
	flood = 10000
	// attackers come at the same time, each with a connection.
	attackers = 4
	// swelling is how much more memory they may cost altogether. The most that is
	// held is 64 KiB for each of two hundred answers that nobody reads, which is
	// half of it; the rest is for garbage.
	swelling = 24 << 20
	// slower is how many times as long as beside the slower of nginx and haproxy
	// others may wait for a small request.
	slower = 3
	// starved is how long they wait for nothing where the machine is busy with
	// other things.
	starved = 25 * time.Millisecond
	// watch is for how long those are looked at whose end is not waited for.
	watch = 300 * time.Millisecond
	// pause is between two of those requests: what they leave behind in memory is
	// not to be taken for the attackers'.
	pause = 2 * time.Millisecond
	// hurry is how long a listener of these tests waits for a client.
	hurry = 2 * time.Second
)

const (
	calm  = http2.ErrCodeEnhanceYourCalm
	small = "/bytes/1024"
)

// attacks are what clients do to keep a server busy, or its memory full.
var attacks = []struct {
	name string
	run  func(p *peer) error
	// told is whether ours says why it ends the connection, with
	// ENHANCE_YOUR_CALM. It always ends it.
	told bool
	// deaf attackers read nothing.
	deaf bool
	// late ends come when the time is over that a client has for what it is sent.
	late     bool
	settings []http2.Setting
}{
	{name: "rapid reset", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask(small, true)
			if err != nil {
				return err
			}
			return p.WriteRSTStream(id, http2.ErrCodeCancel)
		})
	}},
	{name: "CONTINUATION without end", told: true, run: func(p *peer) error {
		if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(small)}); err != nil {
			return err
		}
		field := slices.Clone(p.encodeField("x-a", "b"))
		return p.repeat(flood, func() error { return p.WriteContinuation(1, false, field) })
	}},
	{name: "empty CONTINUATION without end", told: true, run: func(p *peer) error {
		if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(small)}); err != nil {
			return err
		}
		return p.repeat(flood, func() error { return p.WriteContinuation(1, false, nil) })
	}},
	{name: "SETTINGS", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			return p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 16})
		})
	}},
	{name: "PING", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WritePing(false, [8]byte{}) })
	}},
	{name: "PING, reading nothing", deaf: true, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WritePing(false, [8]byte{}) })
	}},
	{name: "empty DATA", told: true, run: func(p *peer) error {
		id, err := p.ask(small, false)
		if err != nil {
			return err
		}
		return p.repeat(flood, func() error { return p.WriteData(id, false, nil) })
	}},
	{name: "WINDOW_UPDATE", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WriteWindowUpdate(0, 1) })
	}},
	{name: "PRIORITY", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WritePriority(p.next, http2.PriorityParam{StreamDep: 0, Weight: 1}) })
	}},
	{name: "frames of an unknown kind", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WriteRawFrame(0x42, 0, 0, nil) })
	}},
	{name: "too many streams", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			_, err := p.ask("/stall", true)
			return err
		})
	}},
	// The following make the server reset the stream.
	{name: "DATA behind the end", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask("/stall", true)
			if err != nil {
				return err
			}
			return p.WriteData(id, true, []byte("x"))
		})
	}},
	{name: "windows that overflow", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask("/stall", true)
			if err != nil {
				return err
			}
			return p.WriteWindowUpdate(id, 1<<31-1)
		})
	}},
	{name: "updates of nothing", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask("/stall", true)
			if err != nil {
				return err
			}
			return p.WriteRawFrame(http2.FrameWindowUpdate, 0, id, binary.BigEndian.AppendUint32(nil, 0))
		})
	}},
	{name: "streams that depend on themselves", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask("/stall", true)
			if err != nil {
				return err
			}
			return p.WritePriority(id, http2.PriorityParam{StreamDep: id, Weight: 1})
		})
	}},
	{name: "heads that are malformed", told: true, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			_, err := p.ask(small, true, hpack.HeaderField{Name: "connection", Value: "close"})
			return err
		})
	}},
	{name: "HPACK bombs", told: true, run: bombs},
	// The following are slow.
	{name: "windows of a byte", told: true, settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1}}, run: func(p *peer) error {
		var ids []uint32
		for range 50 {
			id, err := p.ask("/bytes/1048576", true)
			if err != nil {
				return err
			}
			ids = append(ids, id)
		}
		return p.repeat(flood/len(ids), func() error {
			for _, id := range ids {
				if err := p.WriteWindowUpdate(id, 1); err != nil {
					return err
				}
			}
			return p.out.Flush()
		})
	}},
	{name: "a head that drips", told: true, run: func(p *peer) error {
		block := slices.Clone(p.encode(small))
		if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:1]}); err != nil {
			return err
		}
		for _, b := range block[1:] {
			if err := p.out.Flush(); err != nil {
				return err
			}
			select {
			case <-p.ended:
				return nil
			case <-time.After(hurry / 4):
			}
			if err := p.WriteContinuation(1, false, []byte{b}); err != nil {
				return err
			}
		}
		return nil
	}},
	{name: "large answers, reading nothing", deaf: true, late: true, settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}}, run: func(p *peer) error {
		if err := p.WriteWindowUpdate(0, 1<<30); err != nil {
			return err
		}
		return p.repeat(50, func() error {
			_, err := p.ask("/flood/10000000", true)
			return err
		})
	}},
}

// encodeField returns one field without indexing it.
func (p *peer) encodeField(name, value string) []byte {
	p.block.Reset()
	_ = p.coder.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: true}) // into memory
	return p.block.Bytes()
}

// bombs are heads of few bytes that mean many: a long field is put into the
// table once, and named a thousand times in each.
func bombs(p *peer) error {
	if _, err := p.ask(small, true, hpack.HeaderField{Name: "x-long", Value: strings.Repeat("y", 3900)}); err != nil {
		return err
	}
	return p.repeat(flood/10, func() error {
		block := append(slices.Clone(p.encode(small)), strings.Repeat("\xbe", 4000)...) // index 62, the newest of the table
		p.next += 2
		return p.WriteHeaders(http2.HeadersFrameParam{StreamID: p.next - 2, BlockFragment: block, EndHeaders: true, EndStream: true})
	})
}

// attacked are those who are.
var attacked = []struct {
	name  string
	start func(t *testing.T, service string) *route
}{
	{"nginx", func(t *testing.T, service string) *route {
		address := stage.FreeAddress(t)
		p := stage.Nginx(t, fmt.Sprintf(`client_header_timeout %[1]s; client_body_timeout %[1]s; keepalive_timeout %[1]s; send_timeout %[1]s;
server { listen %[2]s http2; location / { proxy_pass http://%[3]s; } }`, hurry, address, service))
		stage.Listens(t, p, address)
		return &route{address: address}
	}},
	{"haproxy", func(t *testing.T, service string) *route { return &route{address: haproxyFront(t, service)} }},
	{"narthex inbound", func(t *testing.T, service string) *route {
		return hurried(t, way{in: true}, far{address: service})
	}},
	{"narthex inbound, by HTTP/2", func(t *testing.T, service string) *route {
		return hurried(t, way{in: true}, far{address: service, all: true})
	}},
	{"narthex outbound", func(t *testing.T, service string) *route {
		return hurried(t, way{out: true}, far{address: service})
	}},
}

func hurried(t *testing.T, w way, f far) *route {
	t.Helper()
	return w.open(t, f, fmt.Sprintf("timeouts: {handshake: %[1]s, head: %[1]s, stall: %[1]s, idle: %[1]s}", hurry))
}

// TestAttacks: an attacker's connection is ended, no other client is made to
// wait for long meanwhile, and memory stays what it was. What nginx and haproxy
// do about the same is shown beside it, and how long others wait is held against
// theirs. Nothing else runs at the same time, because it is about time.
func TestAttacks(t *testing.T) {
	theirs := make([]time.Duration, len(attacks))
	var late []*attack
	var ours []*mesh.Node
	for _, target := range attacked {
		r := target.start(t, mesh.NewService(t).Address)
		ours = append(ours, r.nodes()...)
		for i := range attacks {
			t.Run(target.name+"/"+attacks[i].name, func(t *testing.T) {
				a := &attack{which: i, target: target.name, r: r}
				a.run(t, &theirs[i])
				if attacks[i].late && len(r.nodes()) > 0 {
					late = append(late, a)
				}
			})
		}
	}
	for _, a := range late {
		a.checkEnds(t, mesh.CallTime)
	}
	for _, n := range ours {
		stage.Eventually(t, stage.Soon, "nobody is left", func() error {
			if live := n.Live(); live > 0 {
				return fmt.Errorf("%d connections are open", live)
			}
			return nil
		})
	}
}

// attack is one of them, by so many attackers at a time.
type attack struct {
	which  int
	target string
	r      *route
	peers  [attackers]*peer
	broken [attackers]error // what writing came to
}

// run has them come, and looks at how others fare. theirs is how long those
// wait beside nginx and haproxy, whichever is slower.
func (a *attack) run(t *testing.T, theirs *time.Duration) {
	ours, kind := len(a.r.nodes()) > 0, attacks[a.which]
	good := a.r.client(t)
	defer good.CloseIdleConnections()
	before := median(visit(t, a.r, good, nil))
	var growths []func() int
	for _, n := range a.r.nodes() {
		growths = append(growths, stage.Growth(t, n.PID()))
	}
	over, meanwhile := make(chan struct{}), make(chan []time.Duration, 1)
	go func() { meanwhile <- visit(t, a.r, good, over) }()
	began := time.Now()
	a.come(t)
	within := watch
	if ours {
		within = mesh.CallTime
	}
	var ends [attackers]ending
	if ours && kind.late {
		<-time.After(watch)
	} else {
		ends = a.ends(within)
	}
	took := time.Since(began).Round(time.Millisecond)
	close(over)
	during := <-meanwhile
	most := slices.Max(during)
	now := median(during)
	grown := 0
	for _, growth := range growths {
		grown = max(grown, growth())
	}
	t.Logf("%s (%s) within %s; others waited %s, %s before, at most %s; memory grew by %d KiB", ends[0], a.peers[0].told(), took, now, before, most, grown>>10)
	if !ours {
		*theirs = max(*theirs, now)
		a.leave()
		return
	}
	if !kind.late {
		a.check(t, ends)
	}
	if grown > swelling {
		t.Errorf("memory grew by %d KiB, want no more than %d KiB", grown>>10, swelling>>10)
	}
	if want := slower**theirs + max(starved, 10*before); now > want {
		t.Errorf("others waited %s, want no more than %s: beside nginx or haproxy it was %s", now, want, *theirs)
	}
}

// come connects the attackers, and has them do what they do.
func (a *attack) come(t *testing.T) {
	t.Helper()
	kind := attacks[a.which]
	for i := range a.peers {
		p, err := connect(a.r)
		if err == nil {
			err = p.hello(kind.settings...)
		}
		if err != nil {
			t.Fatal(err)
		}
		a.peers[i] = p
	}
	var g sync.WaitGroup
	for i, p := range a.peers {
		if !kind.deaf {
			go p.read()
		}
		g.Go(func() { a.broken[i] = kind.run(p) }) // which fails where the connection is ended meanwhile
	}
	g.Wait()
}

// ends waits for how their connections end.
func (a *attack) ends(within time.Duration) (all [attackers]ending) {
	var g sync.WaitGroup
	for i, p := range a.peers {
		g.Go(func() {
			if attacks[a.which].deaf {
				all[i] = p.deafEnd(a.broken[i], within)
			} else {
				all[i] = p.end(within)
			}
		})
	}
	g.Wait()
	return all
}

// checkEnds wants their connections to end within a time.
func (a *attack) checkEnds(t *testing.T, within time.Duration) {
	t.Helper()
	began := time.Now()
	a.check(t, a.ends(within))
	t.Logf("%s, %s: ended %s later", a.target, attacks[a.which].name, time.Since(began).Round(time.Second))
}

func (a *attack) check(t *testing.T, ends [attackers]ending) {
	t.Helper()
	want := ending{goaway: attacks[a.which].told}
	if want.goaway {
		want.code = calm
	}
	for i, e := range ends {
		if e != want {
			t.Errorf("%s, %s: an attacker is told %s (%s), want %s", a.target, attacks[a.which].name, e, a.peers[i].told(), want)
			break
		}
	}
	a.leave()
}

func (a *attack) leave() {
	for _, p := range a.peers {
		_ = p.Close()
	}
}

// deafEnd waits until writing fails: one that reads nothing learns it so.
func (p *peer) deafEnd(broken error, within time.Duration) ending {
	_ = p.SetDeadline(time.Now().Add(within))
	for broken == nil {
		<-time.After(10 * time.Millisecond)
		if broken = p.WritePriority(p.next+2, http2.PriorityParam{Weight: 1}); broken == nil {
			broken = p.out.Flush()
		}
	}
	if ne, ok := broken.(interface{ Timeout() bool }); ok && ne.Timeout() {
		return ending{silent: true}
	}
	return ending{}
}

// visit asks for something small again and again, until over and at least so
// often that a median means something, and returns how long each took.
func visit(t *testing.T, r *route, client *http.Client, over <-chan struct{}) (took []time.Duration) {
	for {
		began := time.Now()
		if _, err := mesh.FetchOK(client, r.url(small)); err != nil {
			t.Errorf("another client: %v", err)
			return append(took, time.Minute)
		}
		took = append(took, time.Since(began))
		enough := len(took) >= 30
		if enough && over == nil {
			return took
		}
		select {
		case <-over:
			if enough {
				return took
			}
		case <-time.After(pause):
		}
	}
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}
