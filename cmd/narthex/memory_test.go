package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestTidiesOnceWorkHasCeased: neither while there is work, nor again without
// new garbage, nor so often that it costs much.
func TestTidiesOnceWorkHasCeased(t *testing.T) {
	tidied := 0
	l := tidier{collect: func() { tidied++ }}
	now := time.Now()
	for _, step := range []struct {
		what      string
		allocated uint64
		want      int
	}{
		{"started", 3 << 20, 1},
		{"nothing to do", 3<<20 + 100, 1},
		{"no garbage worth it", 3<<20 + 200_000, 1},
		{"worked", 20 << 20, 2},
	} {
		for range quietTimes + 1 { // the first of which sees what is new
			now = now.Add(quietFor)
			l.look(now, step.allocated)
		}
		if tidied != step.want {
			t.Errorf("%s: tidied up %d times by now, want %d", step.what, tidied, step.want)
		}
	}
	for n := range uint64(4 * quietTimes) {
		now = now.Add(quietFor)
		l.look(now, (20+2*n)<<20)
	}
	if tidied != 2 {
		t.Error("tidied up while there was work")
	}
	l.next = now.Add(time.Hour)
	for range quietTimes + 1 {
		now = now.Add(quietFor)
		l.look(now, 90<<20)
	}
	if tidied != 2 {
		t.Error("tidied up again though the last time took so long")
	}
}

func TestMemoryLimit(t *testing.T) {
	for _, c := range []struct {
		name, cgroup string
		files        map[string]string
		want         uint64
		ok           bool
	}{
		{"none says anything", "0::/\n", nil, 0, false},
		{"a container's", "0::/\n", map[string]string{"memory.max": "134217728\n"}, 128 << 20, true},
		{"no limit", "0::/\n", map[string]string{"memory.max": "max\n"}, 0, false},
		{"the smallest of all levels", "0::/a/b/c\n", map[string]string{"a/memory.max": "1000\n", "a/b/memory.max": "2000\n", "a/b/c/memory.max": "max\n"}, 1000, true},
		{"beside version 1", "12:memory:/x\n0::/a\n", map[string]string{"x/memory.max": "1\n", "a/memory.max": "500\n"}, 500, true},
		{"version 1 alone", "12:memory:/x\n", map[string]string{"x/memory.max": "1\n"}, 0, false},
		{"nonsense", "0::/\n", map[string]string{"memory.max": "much\n"}, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			write := func(path, text string) {
				path = filepath.Join(root, path)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write("proc/self/cgroup", c.cgroup)
			for path, text := range c.files {
				write(filepath.Join("sys/fs/cgroup", path), text)
			}
			got, ok := memoryLimit(root)
			if ok != c.ok || ok && got != c.want {
				t.Errorf("%d, %v; want %d, %v", got, ok, c.want, c.ok)
			}
		})
	}
	if limit, ok := memoryLimit(t.TempDir()); ok {
		t.Errorf("a limit of %d without /proc", limit)
	}
}
