package agent

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// stockRead bounds what is read of a spire-agent's command line and
// configuration.
const stockRead = 1 << 20

// stockAgentOn returns the PID of a spire-agent that runs on a data directory;
// "" where none does. Where its configuration cannot be understood, one that
// can see the directory counts: it is better not to start than to be evicted.
func stockAgentOn(proc, dataDir string, dir fs.FileInfo) (string, error) {
	all, err := os.ReadDir(proc)
	if err != nil {
		return "", err
	}
	for _, p := range all {
		pid := p.Name()
		if strings.Trim(pid, "0123456789") != "" {
			continue
		}
		at := filepath.Join(proc, pid)
		args, ok := stockAgent(at)
		if !ok {
			continue
		}
		for _, its := range stockDataDirs(at, args, dataDir) {
			if info, err := os.Stat(its); err == nil && os.SameFile(info, dir) {
				return pid, nil
			}
		}
	}
	return "", nil
}

// stockAgent returns the command line of a process, and whether it is a
// spire-agent that runs. It is root's or ours: nobody else could have written
// the files that are ours, and whoever likes can call a process by this name.
func stockAgent(at string) (args []string, ok bool) {
	info, err := os.Stat(at)
	if err != nil { // it has ended
		return nil, false
	}
	if uid := owner(info); uid != 0 && uid != os.Geteuid() {
		return nil, false
	}
	line, err := readBounded(filepath.Join(at, "cmdline"))
	if err != nil {
		return nil, false
	}
	args = strings.Split(strings.TrimSuffix(line, "\x00"), "\x00")
	if len(args) < 2 || args[1] != "run" {
		return nil, false
	}
	exe, _ := os.Readlink(filepath.Join(at, "exe"))
	for _, name := range []string{args[0], strings.TrimSuffix(exe, " (deleted)")} {
		if filepath.Base(name) == "spire-agent" {
			return args, true
		}
	}
	return nil, false
}

// dataDirKey finds data_dir in a configuration, HCL or JSON. It is a key of the
// agent block alone.
var dataDirKey = regexp.MustCompile(`(?i)\bdata_dir"?\s*[:=]\s*"([^"\n]*)"`)

// stockDataDirs returns the paths at which we would reach the data_dir of a
// spire-agent. What is written in comments counts too, and so does its working
// directory, the default. If it cannot be told, seen is its path, as it is for
// us.
func stockDataDirs(at string, args []string, seen string) []string {
	if dir, ok := flagOf(args, "dataDir"); ok {
		return []string{under(at, dir)}
	}
	file, ok := flagOf(args, "config")
	if !ok {
		file = "conf/agent/agent.conf"
	}
	found := []string{under(at, ".")}
	text, err := readBounded(under(at, file))
	if err != nil {
		return append(found, under(at, seen))
	}
	for _, m := range dataDirKey.FindAllStringSubmatch(text, -1) {
		if strings.ContainsAny(m[1], `$\`) { // a variable, or escaped
			m[1] = seen
		}
		found = append(found, under(at, m[1]))
	}
	return found
}

// flagOf returns the value of a flag as package flag reads it.
func flagOf(args []string, name string) (string, bool) {
	for i, a := range args {
		a, dashed := strings.CutPrefix(a, "-")
		if !dashed {
			continue
		}
		a = strings.TrimPrefix(a, "-")
		if value, ok := strings.CutPrefix(a, name+"="); ok {
			return value, true
		}
		if a == name && i+1 < len(args) {
			return args[i+1], true
		}
	}
	return "", false
}

// under is where we reach a path of a process: from its root, or from its
// working directory. Both are links of the kernel's, so the path is not cleaned.
func under(at, path string) string {
	if filepath.IsAbs(path) {
		return at + "/root" + path
	}
	return at + "/cwd/" + path
}

// readBounded reads a file that may be one of root's in a container, who can put
// a pipe there to have us wait for ever.
func readBounded(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, stockRead))
	return string(data), err
}
