package main

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

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
