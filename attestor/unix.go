package attestor

import (
	"context"
	"fmt"
	"strconv"
)

const typeUnix = "unix"

// UnixConfig configures the unix attestor. Its zero value works.
type UnixConfig struct {
	// DiscoverPath adds the selectors path and sha256 of the program; see
	// NewUnix for when there is a path. It is spire-agent's
	// discover_workload_path, and needs the same user as the workload, or
	// CAP_SYS_PTRACE and read access to its program. Where the program cannot
	// be read, attestation by this attestor fails.
	DiscoverPath bool

	// SizeLimit is spire-agent's workload_size_limit: the size in bytes above
	// which a program is not hashed and attestation by this attestor fails.
	// 0 is 512 MiB, where spire-agent has no limit: anybody may execute a
	// sparse file of any size. Below 0 programs are never hashed and there is no sha256
	// selector.
	SizeLimit int64
}

// unixAttestor gives the selectors of SPIRE's workload attestor "unix"
// (doc/plugin_agent_workloadattestor_unix.md of SPIRE v1.15).
type unixAttestor struct {
	config  UnixConfig
	users   *names
	groups  *names
	digests *digests
	looks   *slots // executables being looked at
}

// NewUnix returns the attestor "unix". Its selectors are uid and gid (the
// effective ones), supplementary_gid for each supplementary group, and user,
// group and supplementary_group for those that have a name here, or had one a
// second ago; with DiscoverPath also path and sha256 of the program.
//
// The kernel gives the path of a program as the process's own mount namespace
// names it, and every user may make a mount namespace in which a program of
// theirs has the path of another. So there is a path selector only where that
// path names the same file (device and inode) in the agent's mount namespace
// or, where HOST_PROC is set, in that of the host's init. It is missing for a
// program that was removed or replaced since it was started, and for programs
// inside containers, which have file systems of their own: those are told by
// sha256, or by a selector of another kind. spire-agent gives the path in all
// of these cases.
func NewUnix(config UnixConfig) Workload {
	return &unixAttestor{
		config: config, users: newNames(userName), groups: newNames(groupName),
		digests: newDigests(), looks: newSlots(looksPerUser, looksInAll),
	}
}

// Type returns "unix".
func (*unixAttestor) Type() string { return typeUnix }

// Attest implements Workload.
func (u *unixAttestor) Attest(ctx context.Context, p *Process) ([]Selector, error) {
	var found []Selector
	add := func(key, value string) {
		found = append(found, Selector{Type: typeUnix, Value: key + ":" + value})
	}
	// Names are kept in the files and directories of this system, and most
	// IDs of a container have none here: no name, no selector.
	addID := func(idKey, nameKey string, id uint32, names *names) error {
		text := strconv.FormatUint(uint64(id), 10)
		add(idKey, text)
		name, err := names.of(id)
		if err != nil {
			return fmt.Errorf("look up the name of %s %s: %w", idKey, text, err)
		}
		if name != "" {
			add(nameKey, name)
		}
		return nil
	}
	if err := addID("uid", "user", p.UID, u.users); err != nil {
		return nil, err
	}
	if err := addID("gid", "group", p.GID, u.groups); err != nil {
		return nil, err
	}
	groups, err := readGroups(p)
	if err != nil {
		return nil, err
	}
	for _, gid := range groups {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := addID("supplementary_gid", "supplementary_group", gid, u.groups); err != nil {
			return nil, err
		}
	}
	if u.config.DiscoverPath {
		exe, err := u.executableOf(ctx, p)
		if err != nil {
			return nil, err
		}
		if exe.path != "" {
			add("path", exe.path)
		}
		if exe.sum != "" {
			add("sha256", exe.sum)
		}
	}
	return found, nil
}

func readGroups(p *Process) ([]uint32, error) {
	b := buffers.Get().(*buffer)
	defer b.free()
	status, err := b.whole(p.ProcPath("status"), maxStatus)
	if err != nil {
		return nil, err
	}
	return parseGroups(status)
}
