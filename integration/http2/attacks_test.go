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
	// swelling is how much more memory they may cost altogether.
	swelling = 48 << 20
	// delay of a small request is nothing to speak of where four attackers, and
	// whatever else the machine does, have two cores to share with it.
	delay = 250 * time.Millisecond
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
	// want is how ours ends the connection; nil: it need not.
	want []ending
	// deaf attackers read nothing.
	deaf     bool
	settings []http2.Setting
}{
	{name: "rapid reset", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask(small, true)
			if err != nil {
				return err
			}
			return p.WriteRSTStream(id, http2.ErrCodeCancel)
		})
	}},
	{name: "CONTINUATION without end", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(small)}); err != nil {
			return err
		}
		field := slices.Clone(p.encodeField("x-a", "b"))
		return p.repeat(flood, func() error { return p.WriteContinuation(1, false, field) })
	}},
	{name: "empty CONTINUATION without end", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(small)}); err != nil {
			return err
		}
		return p.repeat(flood, func() error { return p.WriteContinuation(1, false, nil) })
	}},
	{name: "SETTINGS", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			return p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 16})
		})
	}},
	{name: "PING", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WritePing(false, [8]byte{}) })
	}},
	{name: "PING, reading nothing", deaf: true, want: []ending{{}}, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WritePing(false, [8]byte{}) })
	}},
	{name: "empty DATA", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		id, err := p.ask(small, false)
		if err != nil {
			return err
		}
		return p.repeat(flood, func() error { return p.WriteData(id, false, nil) })
	}},
	{name: "WINDOW_UPDATE", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WriteWindowUpdate(0, 1) })
	}},
	{name: "PRIORITY", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WritePriority(p.next, http2.PriorityParam{StreamDep: 0, Weight: 1}) })
	}},
	{name: "frames of an unknown kind", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error { return p.WriteRawFrame(0x42, 0, 0, nil) })
	}},
	{name: "too many streams", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			_, err := p.ask("/stall", true)
			return err
		})
	}},
	// The following make the server reset the stream.
	{name: "DATA behind the end", want: []ending{{goaway: true, code: calm}, {goaway: true, code: http2.ErrCodeStreamClosed}}, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask("/stall", true)
			if err != nil {
				return err
			}
			return p.WriteData(id, true, []byte("x"))
		})
	}},
	{name: "windows that overflow", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask("/stall", true)
			if err != nil {
				return err
			}
			return p.WriteWindowUpdate(id, 1<<31-1)
		})
	}},
	{name: "updates of nothing", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask("/stall", true)
			if err != nil {
				return err
			}
			return p.WriteRawFrame(http2.FrameWindowUpdate, 0, id, binary.BigEndian.AppendUint32(nil, 0))
		})
	}},
	{name: "streams that depend on themselves", want: []ending{{goaway: true, code: calm}, {goaway: true, code: http2.ErrCodeProtocol}}, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			id, err := p.ask("/stall", true)
			if err != nil {
				return err
			}
			return p.WritePriority(id, http2.PriorityParam{StreamDep: id, Weight: 1})
		})
	}},
	{name: "heads that are malformed", want: []ending{{goaway: true, code: calm}}, run: func(p *peer) error {
		return p.repeat(flood, func() error {
			_, err := p.ask(small, true, hpack.HeaderField{Name: "connection", Value: "close"})
			return err
		})
	}},
	{name: "HPACK bombs", run: bombs}, // each is answered: its fields are too large
	// The following are slow.
	{name: "windows of a byte", settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1}}, run: func(p *peer) error {
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
	{name: "large answers, reading nothing", deaf: true, want: []ending{{}}, settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}}, run: func(p *peer) error {
		if err := p.WriteWindowUpdate(0, 1<<30); err != nil {
			return err
		}
		return p.repeat(50, func() error {
			_, err := p.ask("/flood/10000000", true)
			return err
		})
	}},
	{name: "a head that drips", want: []ending{{goaway: true, code: calm}, {goaway: true, code: http2.ErrCodeNo}, {goaway: true, code: http2.ErrCodeProtocol}}, run: func(p *peer) error {
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
	start func(t *testing.T, service string) (r *route, pids []int)
}{
	{"nginx", func(t *testing.T, service string) (*route, []int) {
		address := stage.FreeAddress(t)
		p := stage.Nginx(t, fmt.Sprintf(`client_header_timeout %[1]s; client_body_timeout %[1]s; keepalive_timeout %[1]s; send_timeout %[1]s;
server { listen %[2]s http2; location / { proxy_pass http://%[3]s; } }`, hurry, address, service))
		stage.Listens(t, p, address)
		return &route{address: address}, []int{p.PID()}
	}},
	{"haproxy", func(t *testing.T, service string) (*route, []int) {
		return &route{address: haproxyFront(t, service)}, nil
	}},
	{"narthex inbound", func(t *testing.T, service string) (*route, []int) {
		return hurried(t, way{in: true}, far{address: service})
	}},
	{"narthex inbound, by HTTP/2", func(t *testing.T, service string) (*route, []int) {
		return hurried(t, way{in: true}, far{address: service, all: true})
	}},
	{"narthex outbound", func(t *testing.T, service string) (*route, []int) {
		return hurried(t, way{out: true}, far{address: service})
	}},
}

func hurried(t *testing.T, w way, f far) (r *route, pids []int) {
	t.Helper()
	r = w.open(t, f, fmt.Sprintf("timeouts: {handshake: %[1]s, head: %[1]s, stall: %[1]s, idle: %[1]s}", hurry))
	for _, n := range r.nodes() {
		pids = append(pids, n.PID())
	}
	return r, pids
}

// TestAttacks: an attacker's connection is ended, no other client is made to
// wait for long meanwhile, and memory stays what it was. What nginx and haproxy
// do about the same is shown beside it. Nothing else runs at the same time,
// because it is about time.
func TestAttacks(t *testing.T) {
	for _, a := range attacked {
		t.Run(a.name, func(t *testing.T) {
			r, pids := a.start(t, mesh.NewService(t).Address)
			for i := range attacks {
				t.Run(attacks[i].name, func(t *testing.T) { beAttacked(t, r, pids, i) })
			}
			for _, n := range r.nodes() {
				stage.Eventually(t, stage.Soon, "nobody is left", func() error {
					if live := n.Live(); live > 0 {
						return fmt.Errorf("%d connections are open", live)
					}
					return nil
				})
			}
		})
	}
}

func beAttacked(t *testing.T, r *route, pids []int, which int) {
	a, ours := attacks[which], len(r.nodes()) > 0
	good := r.client(t)
	defer good.CloseIdleConnections()
	before := visit(t, r, good, nil)
	var growths []func() int
	for _, pid := range pids {
		growths = append(growths, stage.Growth(t, pid))
	}
	over, meanwhile := make(chan struct{}), make(chan []time.Duration, 1)
	go func() { meanwhile <- visit(t, r, good, over) }()

	patience := 300 * time.Millisecond // for those about whom nothing is asked
	if ours && a.want != nil {
		patience = mesh.CallTime
	}
	var endings [attackers]ending
	var told [attackers]string
	began := time.Now()
	var g sync.WaitGroup
	for i := range attackers {
		g.Go(func() {
			p, err := connect(r)
			if err == nil {
				defer p.Close()
				err = p.hello(a.settings...)
			}
			if err != nil {
				t.Error(err)
				return
			}
			if a.deaf {
				endings[i] = p.deafEnd(a.run(p), patience)
				return
			}
			go p.read()
			_ = a.run(p) // which fails where the connection is ended meanwhile
			endings[i] = p.end(patience)
			told[i] = p.told()
		})
	}
	g.Wait()
	took := time.Since(began)
	close(over)
	during := <-meanwhile
	most := 0
	for _, growth := range growths {
		most = max(most, growth())
	}
	t.Logf("%s (%s) within %s; others waited %s, %s before, at most %s; memory grew by %d KiB",
		endings[0], told[0], took.Round(time.Millisecond), median(during), median(before), slices.Max(during), most>>10)
	if !ours {
		return
	}
	for i, e := range endings {
		if a.want != nil && !slices.Contains(a.want, e) {
			t.Errorf("an attacker is told %s (%s), want one of %v", e, told[i], a.want)
			break
		}
	}
	if most > swelling {
		t.Errorf("memory grew by %d KiB, want no more than %d KiB", most>>10, swelling>>10)
	}
	if now, want := median(during), max(delay, 10*median(before)); now > want {
		t.Errorf("others waited %s, want no more than %s", now, want)
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
		if took = append(took, time.Since(began)); len(took) < 30 {
			continue
		}
		select {
		case <-over:
			return took
		default:
		}
		if over == nil {
			return took
		}
	}
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}
