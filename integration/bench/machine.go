package main

import (
	"context"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine describes where the figures were measured.
type machine struct {
	cores  int
	cpu    string
	memory uint64 // bytes
	kernel string
	system string
	golang string
}

// describeMachine leaves empty what it cannot find out.
func describeMachine() machine {
	m := machine{cores: runtime.NumCPU(), golang: runtime.Version()}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.memory = info.Totalram * uint64(info.Unit)
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.kernel = unix.ByteSliceToString(name.Sysname[:]) + " " + unix.ByteSliceToString(name.Release[:])
	}
	m.cpu = valueIn("/proc/cpuinfo", "model name", ":")
	m.system = strings.Trim(valueIn("/etc/os-release", "PRETTY_NAME", "="), `"`)
	return m
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

// versions returns the version of each side that was measured.
func (b *bench) versions(ctx context.Context) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	versions := map[string]string{}
	for _, sides := range b.results {
		for side := range sides {
			if versions[side] != "" {
				continue
			}
			v, err := b.version(ctx, side)
			if err != nil {
				return nil, fmt.Errorf("version of %s: %w", side, err)
			}
			versions[side] = v
		}
	}
	return versions, nil
}

func (b *bench) version(ctx context.Context, side string) (string, error) {
	switch side {
	case ours:
		return firstLine(exec.CommandContext(ctx, b.narthex, "version"))
	case nginx:
		line, err := firstLine(exec.CommandContext(ctx, "nginx", "-v"))
		return strings.Replace(strings.TrimPrefix(line, "nginx version: "), "/", " ", 1), err
	case haproxy:
		line, err := firstLine(exec.CommandContext(ctx, "haproxy", "-v"))
		fields := strings.Fields(line) // HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https://haproxy.org/
		if err == nil && len(fields) < 3 {
			err = fmt.Errorf("cannot read %q", line)
		}
		if err != nil {
			return "", err
		}
		return "haproxy " + fields[2], nil
	case ghostunnel:
		return moduleVersion("NARTHEX_GHOSTUNNEL", "ghostunnel", "ghostunnel")
	case opa, cedarGo, casbin:
		return libraryVersion(b.policies, side)
	}
	return moduleVersion("NARTHEX_SPIRE", "spire", side)
}

func firstLine(cmd *exec.Cmd) (string, error) {
	said, err := cmd.CombinedOutput()
	line, _, _ := strings.Cut(strings.TrimSpace(string(said)), "\n")
	return line, err
}

// moduleVersion returns the version of the module that a program was built
// from.
func moduleVersion(variable, module, program string) (string, error) {
	path, err := tool(variable, module, program)
	if err != nil {
		return "", err
	}
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %s, built with %s", program, info.Main.Version, info.GoVersion), nil
}

// libraryVersion returns the version of a library that a program has in it, a
// module whose path ends in that name, or in that and /v2.
func libraryVersion(program, name string) (string, error) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return "", err
	}
	for _, module := range info.Deps {
		if strings.HasSuffix(module.Path, "/"+name) || strings.HasSuffix(module.Path, "/"+name+"/v2") {
			return name + " " + module.Version, nil
		}
	}
	return "", fmt.Errorf("%s has no module %s", program, name)
}
