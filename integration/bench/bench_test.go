package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

func TestSeries(t *testing.T) {
	nan := math.NaN()
	for _, c := range []struct {
		name              string
		values            series
		median, low, high float64
	}{
		{"none", nil, nan, nan, nan},
		{"one", series{3}, 3, 3, 3},
		{"odd", series{9, 1, 5}, 5, 1, 9},
		{"even", series{4, 1, 3, 2}, 2.5, 1, 4},
		{"a round is missing", series{nan, 1, 3}, 2, 1, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := slices.Clone(c.values)
			low, high := c.values.spread()
			if got := c.values.median(); !same(got, c.median) || !same(low, c.low) || !same(high, c.high) {
				t.Errorf("median %v, spread %v–%v; want %v, %v–%v", got, low, high, c.median, c.low, c.high)
			}
			if !slices.EqualFunc(before, c.values, same) {
				t.Errorf("the values were reordered: %v", c.values)
			}
		})
	}
}

func same(a, b float64) bool { return a == b || math.IsNaN(a) && math.IsNaN(b) }

// The ratio is that of each round, not of the medians: the second round here
// was three times as slow for both.
func TestRatioIsByRound(t *testing.T) {
	ours, theirs := series{1, 3, 1.2}, series{2, 6, 2.4}
	if got := ours.over(theirs); !slices.Equal(got, series{0.5, 0.5, 0.5}) {
		t.Errorf("ratios %v", got)
	}
	if got := (series{1, 2}).over(series{0, 4}); !slices.Equal(got, series{0.5}) {
		t.Errorf("a zero was not passed over: %v", got)
	}
}

func TestQuantile(t *testing.T) {
	for _, c := range []struct{ q, want float64 }{{0, 1}, {0.5, 3}, {0.99, 5}, {1, 5}} {
		if got := quantile([]float64{5, 1, 4, 2, 3}, c.q); got != c.want {
			t.Errorf("quantile %v is %v, want %v", c.q, got, c.want)
		}
	}
}

func TestParseStat(t *testing.T) {
	for _, c := range []struct {
		line        string
		pid, parent int
		bad         bool
	}{
		{"42 (nginx) S 7 42 42 0", 42, 7, false},
		{"42 (a ) (b) S 7 42 42 0", 42, 7, false},
		{"42 (x\n) R 1 2", 42, 1, false},
		{"42 nginx S 7", 0, 0, true},
		{"42 (nginx) S", 0, 0, true},
		{"x (nginx) S 7", 0, 0, true},
		{"", 0, 0, true},
	} {
		pid, parent, err := parseStat(c.line)
		if (err != nil) != c.bad || !c.bad && (pid != c.pid || parent != c.parent) {
			t.Errorf("%q: %d, %d, %v", c.line, pid, parent, err)
		}
	}
}

func TestParsePSS(t *testing.T) {
	for _, c := range []struct {
		text string
		want float64
		bad  bool
	}{
		{"55d0-7ffc ---p 00000000 00:00 0   [rollup]\nRss:   1800 kB\nPss:    233 kB\nPss_Dirty:  90 kB\n", 233 * 1024, false},
		{"Rss: 1 kB\n", 0, true},
		{"Pss: 1 MB\n", 0, true},
		{"Pss: x kB\n", 0, true},
	} {
		got, err := parsePSS([]byte(c.text))
		if got != c.want || (err != nil) != c.bad {
			t.Errorf("%q: %v, %v", c.text, got, err)
		}
	}
}

func TestDescendants(t *testing.T) {
	parents := map[int]int{1: 0, 10: 1, 12: 10, 11: 10, 13: 12, 20: 1}
	if got := descendants(10, parents); !slices.Equal(got, []int{10, 11, 12, 13}) {
		t.Errorf("descendants %v", got)
	}
}

// The clocks of a process that computes in a child of its own show the work,
// and its memory is there.
func TestProcessesAreMeasured(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `sh -c 'while :; do :; done' & wait`)
	keeper := newKeeper()
	defer keeper.close()
	p, err := keeper.start(cmd, os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool {
		used, err := cpuTime(p.pid())
		return err == nil && used > 50*time.Millisecond
	})
	if used, err := memory(p.pid()); err != nil || used < 1024 {
		t.Errorf("memory %v, %v", used, err)
	}
	p.stop()
	if _, err := cpuTime(p.pid()); err == nil {
		t.Error("an ended process was measured")
	}
}

// Whoever ends, all that was started has ended.
func TestKeeperEndsAll(t *testing.T) {
	keeper := newKeeper()
	var list []*process
	for range 3 {
		p, err := keeper.start(exec.Command("sh", "-c", "sleep 600 & sleep 600"), os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	pids, err := tree(list[0].pid())
	if err != nil {
		t.Fatal(err)
	}
	keeper.close()
	for _, p := range list {
		if p.running() {
			t.Errorf("process %d still runs", p.pid())
		}
	}
	waitUntil(t, func() bool {
		for _, pid := range pids {
			if text, err := os.ReadFile("/proc/" + itoa(pid) + "/stat"); err == nil && !strings.Contains(string(text), ") Z ") {
				return false
			}
		}
		return true
	})
	if _, err := keeper.start(exec.Command("true"), os.DevNull); err == nil {
		t.Error("a closed keeper started a process")
	}
}

// waitUntil asks ok until it is true.
func waitUntil(t *testing.T, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for !ok() {
		if pause(ctx, 5*time.Millisecond) != nil {
			t.Fatal("not within 20 s")
		}
	}
}

// The client reads what a Workload API answers, however it is cut into reads.
func TestFetchX509SVID(t *testing.T) {
	good, err := proto.Marshal(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: clientID, X509Svid: make([]byte, 900)}}})
	if err != nil {
		t.Fatal(err)
	}
	empty, err := proto.Marshal(&workload.X509SVIDResponse{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		answer func(*http2.Framer) error
		piece  int // bytes in a write
		want   string
	}{
		{"at once", answerWith(good), 1 << 20, ""},
		{"byte by byte", answerWith(good), 1, ""},
		{"without SVID", answerWith(empty), 1 << 20, "holds no SVID"},
		{"refused", func(f *http2.Framer) error {
			var block bytes.Buffer
			e := hpack.NewEncoder(&block)
			for _, h := range [][2]string{{":status", "200"}, {"grpc-status", "7"}, {"grpc-message", "no identity issued"}} {
				if err := e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
					return err
				}
			}
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
		}, 7, "status 7: no identity issued"},
		{"reset", func(f *http2.Framer) error { return f.WriteRSTStream(1, http2.ErrCodeCancel) }, 1 << 20, "RST_STREAM"},
		{"cut short", func(f *http2.Framer) error {
			return f.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, nil)
		}, 1 << 20, "unexpected EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var g errgroup.Group
			g.Go(func() error { return answerOnce(l, c.answer, c.piece) })
			stream, err := fetchX509SVID(t.Context(), socket)
			if got := fmt.Sprint(err); (c.want == "") != (err == nil) || !strings.Contains(got, c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if err == nil {
				if err := stream.Close(); err != nil {
					t.Error(err)
				}
			}
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// answerWith answers with headers and a message in two frames.
func answerWith(message []byte) func(*http2.Framer) error {
	return func(f *http2.Framer) error {
		framed := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
		half := len(framed) / 2
		return errors.Join(
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x88}, EndHeaders: true}),
			f.WriteData(1, false, framed[:half]),
			f.WriteData(1, false, framed[half:]))
	}
}

// answerOnce serves one connection: it takes the request, sends settings and
// the answer in pieces, and hangs up.
func answerOnce(l net.Listener, answer func(*http2.Framer) error, piece int) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	got := make([]byte, len(request))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	var all bytes.Buffer
	f := http2.NewFramer(&all, nil)
	if err := errors.Join(f.WriteSettings(), answer(f)); err != nil {
		return err
	}
	for all.Len() > 0 {
		if _, err := c.Write(all.Next(piece)); err != nil {
			return err
		}
	}
	if _, err := io.ReadFull(c, got[:len(settingsAck)]); err != nil {
		return err
	}
	return nil
}
