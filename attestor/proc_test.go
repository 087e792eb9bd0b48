package attestor

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// statOf is a /proc/PID/stat as the kernel writes it.
func statOf(pid int, comm string, start uint64) string {
	return fmt.Sprintf("%d (%s) S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %d 1000 10 18446744073709551615 1 1 0 0 0 0\n", pid, comm, start)
}

const statusHead = "Name:\tcat\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t9\n"

func TestParseStat(t *testing.T) {
	for _, comm := range []string{"cat", "a b", ") S 1 2 3 (", "a) R 1 2", "", "\n", "((", "))"} {
		pid, start, err := parseStat([]byte(statOf(9, comm, 123456)))
		if pid != 9 || start != 123456 || err != nil {
			t.Errorf("comm %q: pid %d, start %d, error %v", comm, pid, start, err)
		}
	}
	for _, bad := range []string{"", "9", "9 cat S 1", "9 (cat) S 1 2", ")9(", "x (cat) S", "-1 (cat) S", "9 (cat", strings.Replace(statOf(9, "cat", 1), " 1 1000", " x 1000", 1)} {
		if _, _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}

func TestParseStatus(t *testing.T) {
	for name, test := range map[string]struct {
		status   string
		uid, gid uint32
		groups   []uint32
		bad      string
	}{
		"root":         {status: statusHead + "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t \n", groups: []uint32{}},
		"effective":    {status: statusHead + "Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 4294967295 \n", uid: 2, gid: 6, groups: []uint32{9, 4294967295}},
		"escaped name": {status: "Name:\ta\\nUid:\\t0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t\n", uid: 2, gid: 6, groups: []uint32{}},
		"empty":        {bad: "no line begins with Uid:"},
		"two owners":   {status: "Uid:\t1\t1\t1\t1\nUid:\t2\t2\t2\t2\nGid:\t1\t1\t1\t1\n", bad: "two lines"},
		"three IDs":    {status: "Uid:\t1\t1\t1\n", bad: "3 values"},
		"too large":    {status: "Uid:\t1\t4294967296\t1\t1\n", bad: "not an ID"},
		"cut off":      {status: "Uid:\t1\t1\t1\t1", bad: "no line"},
		"no group":     {status: "Uid:\t1\t1\t1\t1\n", bad: "Gid:"},
		"bad groups":   {status: "Uid:\t1\t1\t1\t1\nGid:\t1\t1\t1\t1\nGroups:\t1 x\n", bad: "Groups:"},
		"many groups":  {status: "Uid:\t1\t1\t1\t1\nGid:\t1\t1\t1\t1\nGroups:\t" + strings.Repeat("1 ", maxGroups+1) + "\n", bad: "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			uid, gid, err := parseOwner([]byte(test.status))
			var groups []uint32
			if err == nil {
				groups, err = parseGroups([]byte(test.status))
			}
			if test.bad != "" {
				if err == nil || !strings.Contains(err.Error(), test.bad) {
					t.Fatalf("error %v, want %q", err, test.bad)
				}
				return
			}
			if uid != test.uid || gid != test.gid || !slices.Equal(groups, test.groups) || err != nil {
				t.Fatalf("%d:%d %v, error %v", uid, gid, groups, err)
			}
		})
	}
}

func TestParsePidfd(t *testing.T) {
	for text, want := range map[string]int{"pos:\t0\nPid:\t17\nNSpid:\t17\t1\n": 17, "Pid:\t-1\n": -1, "Pid:\t0\n": 0} {
		if pid, err := parsePidfd([]byte(text)); pid != want || err != nil {
			t.Errorf("%q: %d, %v", text, pid, err)
		}
	}
	for _, bad := range []string{"", "pos:\t0\n", "Pid:\tx\n", "Pid:\t1"} {
		if _, err := parsePidfd([]byte(bad)); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}

func TestReadBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := readBounded(path, 5); string(b) != "12345" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := readBounded(path, 4); b != nil || err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%q, %v", b, err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("cat", []byte(statOf(9, "cat", 7)))
	f.Add(") R 1 (", []byte("9 (cat) S 1"))
	if own, err := os.ReadFile("/proc/self/stat"); err == nil {
		f.Add("self", own)
	}
	f.Fuzz(func(t *testing.T, comm string, raw []byte) {
		if pid, start, err := parseStat([]byte(statOf(9, comm, 123456))); pid != 9 || start != 123456 || err != nil {
			t.Fatalf("comm %q: pid %d, start %d, error %v", comm, pid, start, err)
		}
		if pid, _, err := parseStat(raw); err == nil && pid <= 0 {
			t.Fatalf("PID %d", pid)
		}
	})
}

func FuzzParseStatus(f *testing.F) {
	f.Add("cat", []byte(statusHead))
	f.Add("Uid:\t0", []byte("Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9\n"))
	if own, err := os.ReadFile("/proc/self/status"); err == nil {
		f.Add("self", own)
	}
	f.Fuzz(func(t *testing.T, name string, raw []byte) {
		// Whatever a process calls itself, the owner is what the kernel says.
		escaped := strings.NewReplacer("\\", "\\\\", "\n", "\\n").Replace(name)
		status := "Name:\t" + escaped + "\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 \n"
		if uid, gid, err := parseOwner([]byte(status)); uid != 2 || gid != 6 || err != nil {
			t.Fatalf("name %q: %d:%d, %v", name, uid, gid, err)
		}
		if groups, err := parseGroups([]byte(status)); !slices.Equal(groups, []uint32{9}) || err != nil {
			t.Fatalf("name %q: %v, %v", name, groups, err)
		}
		if uid, _, err := parseOwner(raw); err == nil && !bytes.Contains(raw, []byte(strconv.FormatUint(uint64(uid), 10))) {
			// ParseUint also takes "+0" or leading zeros, which still end in the number.
			t.Fatalf("user %d is not in %q", uid, raw)
		}
		parseGroups(raw)
		parsePidfd(raw)
	})
}

// Only a proc file system that shows us under one PID, our own, is of our own
// PID namespace.
func TestProcIsOwn(t *testing.T) {
	own := fmt.Sprint(os.Getpid())
	for _, c := range []struct {
		name, status string
		want         bool
	}{
		{"ours", "Name:\ta\nNSpid:\t" + own + "\n", true},
		{"of a namespace above", "NSpid:\t4711\t" + own + "\n", false},
		{"of a namespace above, by the same number", "NSpid:\t" + own + "\t" + own + "\n", false},
		{"another process", "NSpid:\t" + own + "0\n", false},
		{"a kernel that does not say", "Name:\ta\nPid:\t" + own + "\n", false},
		{"nothing", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			t.Setenv(hostProc, root)
			if procIsOwn() {
				t.Error("a file system that is not there is ours")
			}
			if err := os.Mkdir(filepath.Join(root, "self"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, "self", "status"), []byte(c.status), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := procIsOwn(); got != c.want {
				t.Errorf("ours: %v, want %v", got, c.want)
			}
		})
	}
}

func TestParseNested(t *testing.T) {
	for status, want := range map[string]string{
		statusHead + "NSpid:\t9\n":    "false <nil>",
		statusHead + "NSpid:\t9\t1\n": "true <nil>",
		statusHead + "NSpid:\t\n":     "false parse status: NSpid: no value",
		statusHead:                    "false parse status: no line begins with NSpid:",
	} {
		nested, err := parseNested([]byte(status))
		if got := fmt.Sprint(nested, " ", err); got != want {
			t.Errorf("%q: got %s, want %s", status, got, want)
		}
	}
}
