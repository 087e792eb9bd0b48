package main

import (
	"context"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

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
		return toolVersion("NARTHEX_GHOSTUNNEL", "ghostunnel", "ghostunnel")
	case grpcGo:
		program, err := os.Executable()
		if err != nil {
			return "", err
		}
		line, err := libraryVersion(program, "grpc")
		return strings.Replace(line, "grpc", grpcGo, 1), err
	case opa, cedarGo, casbin:
		return libraryVersion(b.policies, side)
	}
	return toolVersion("NARTHEX_SPIRE", "spire", side)
}

func firstLine(cmd *exec.Cmd) (string, error) {
	said, err := cmd.CombinedOutput()
	line, _, _ := strings.Cut(strings.TrimSpace(string(said)), "\n")
	return line, err
}

// toolVersion returns the version of a tool that was built from a module.
func toolVersion(variable, module, program string) (string, error) {
	path, err := tool(variable, module, program)
	if err != nil {
		return "", err
	}
	return figures.ProgramVersion(path)
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
