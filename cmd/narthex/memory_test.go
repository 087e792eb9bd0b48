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
	l := tidier{collect: func() { tidied++ }, worth: 1 << 20}
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

func TestReadOnlyMapping(t *testing.T) {
	for line, want := range map[string]uintptr{
		"00400000-00e4f000 r-xp 00000000 fe:00 123 /usr/bin/narthex\n":           0xa4f000,
		"00e4f000-01a00000 r--p 00a4f000 fe:00 123 /usr/bin/narthex\n":           0xbb1000,
		"01a00000-01aa0000 rw-p 01600000 fe:00 123 /usr/bin/narthex\n":           0,
		"01aa0000-01ae0000 r--s 01600000 fe:00 123 /usr/bin/narthex\n":           0,
		"7f0000000000-7f0000021000 r--p 00000000 fe:00 9 /usr/share/zoneinfo\n":  0,
		"c000000000-c000400000 rw-p 00000000 00:00 0 \n":                         0,
		"00e4f000-00400000 r--p 00a4f000 fe:00 123 /usr/bin/narthex\n":           0,
		"x-y r--p 00a4f000 fe:00 123 /usr/bin/narthex\n":                         0,
		"00400000-00e4f000 r-xp 00000000 fe:00 123 /usr/bin/narthex (deleted)\n": 0,
	} {
		if _, length, ok := readOnlyMapping(line, "/usr/bin/narthex"); length != want || ok != (want > 0) {
			t.Errorf("%q: %#x, %t", line, length, ok)
		}
	}
}

// TestProgramGoesOnWithoutItsPages: the kernel brings back what is needed.
func TestProgramGoesOnWithoutItsPages(t *testing.T) {
	for range 10 {
		collectAll()
	}
}
