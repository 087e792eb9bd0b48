package figures

import (
	"cmp"
	"debug/buildinfo"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine describes where the figures were measured.
type Machine struct {
	Cores  int
	CPU    string
	Memory uint64 // bytes
	Kernel string
	System string
	Golang string // the version this program was built with
}

// DescribeMachine leaves empty what it cannot find out.
func DescribeMachine() Machine {
	m := Machine{Cores: runtime.NumCPU(), Golang: runtime.Version()}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.Memory = info.Totalram * uint64(info.Unit)
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Sysname[:]) + " " + unix.ByteSliceToString(name.Release[:])
	}
	m.CPU = valueIn("/proc/cpuinfo", "model name", ":")
	m.System = strings.Trim(valueIn("/etc/os-release", "PRETTY_NAME", "="), `"`)
	return m
}

// String says it in a part of a sentence.
func (m Machine) String() string {
	return fmt.Sprintf("%d cores (%s), %d GiB of memory, %s, %s",
		m.Cores, cmp.Or(m.CPU, "unknown"), m.Memory>>30, m.Kernel, cmp.Or(m.System, "unknown system"))
}

// valueIn returns the value of the first line of a file that begins with key.
func valueIn(file, key, separator string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		k, v, ok := strings.Cut(line, separator)
		if ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// ProgramVersion returns the version of the module that a program was built
// from.
func ProgramVersion(program string) (string, error) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %s, built with %s", filepath.Base(program), info.Main.Version, info.GoVersion), nil
}
