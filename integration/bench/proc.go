package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

// cpuTime returns the CPU time, user and system, that the process pid and all
// its descendants have used, ended threads included.
func cpuTime(pid int) (time.Duration, error) {
	pids, err := tree(pid)
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, p := range pids {
		used, err := figures.CPUTime(p)
		if err != nil {
			return 0, err
		}
		sum += used
	}
	return sum, nil
}

// memory returns the bytes of memory that the process pid and all its
// descendants hold. Pages that several processes share count once, in shares
// (PSS). What the kernel holds for their sockets is not in it.
func memory(pid int) (float64, error) {
	pids, err := tree(pid)
	if err != nil {
		return 0, err
	}
	var sum float64
	for _, p := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p))
		if err != nil {
			return 0, fmt.Errorf("read the memory of process %d: %w", p, err)
		}
		pss, err := parsePSS(text)
		if err != nil {
			return 0, fmt.Errorf("read the memory of process %d: %w", p, err)
		}
		sum += pss
	}
	return sum, nil
}

// parsePSS reads the Pss line of a smaps_rollup file, in bytes.
func parsePSS(text []byte) (float64, error) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), "Pss:")
		if !ok {
			continue
		}
		fields := strings.Fields(rest)
		if len(fields) != 2 || fields[1] != "kB" {
			return 0, fmt.Errorf("the line %q is not a number of kB", lines.Text())
		}
		kib, err := strconv.ParseUint(fields[0], 10, 52)
		if err != nil {
			return 0, err
		}
		return float64(kib) * 1024, nil
	}
	return 0, errors.New("no Pss line")
}

// tree returns pid and its descendants.
func tree(pid int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	parents := map[int]int{}
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it ended between the two looks
		}
		if err != nil {
			return nil, err
		}
		p, parent, err := parseStat(string(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		parents[p] = parent
	}
	if _, ok := parents[pid]; !ok {
		return nil, fmt.Errorf("process %d has ended", pid)
	}
	return descendants(pid, parents), nil
}

// descendants returns pid and all below it. parents maps processes to their
// parents.
func descendants(pid int, parents map[int]int) []int {
	list := []int{pid}
	for i := 0; i < len(list); i++ {
		for child, parent := range parents {
			if parent == list[i] && !slices.Contains(list, child) {
				list = append(list, child)
			}
		}
	}
	slices.Sort(list[1:])
	return list
}

// parseStat reads the process and its parent from a /proc/PID/stat line. The
// program's name stands between them in parentheses, and may hold anything,
// spaces and parentheses included.
func parseStat(line string) (pid, parent int, err error) {
	open, end := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 0 || end < open {
		return 0, 0, fmt.Errorf("no program name in %q", line)
	}
	after := strings.Fields(line[end+1:])
	if len(after) < 2 {
		return 0, 0, fmt.Errorf("no parent in %q", line)
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(line[:open])); err != nil {
		return 0, 0, err
	}
	parent, err = strconv.Atoi(after[1])
	return pid, parent, err
}
