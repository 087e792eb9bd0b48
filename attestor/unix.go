package attestor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

const typeUnix = "unix"

// UnixConfig configures the unix attestor. Its zero value works.
type UnixConfig struct {
	// DiscoverPath adds the selectors path and sha256 of the program. It is
	// spire-agent's discover_workload_path, and needs the same user as the
	// workload, or CAP_SYS_PTRACE and read access to its program. Where the
	// program cannot be read, attestation by this attestor fails.
	DiscoverPath bool

	// SizeLimit is spire-agent's workload_size_limit: the size in bytes above
	// which a program is not hashed and attestation by this attestor fails.
	// 0 is no limit. Below 0 programs are never hashed and there is no sha256
	// selector.
	SizeLimit int64
}

// unixAttestor gives the selectors of SPIRE's workload attestor "unix"
// (doc/plugin_agent_workloadattestor_unix.md of SPIRE v1.15).
type unixAttestor struct {
	config  UnixConfig
	digests *digests
}

// NewUnix returns the attestor "unix". Its selectors are uid and gid (the
// effective ones), supplementary_gid for each supplementary group, and user,
// group and supplementary_group for those that have a name here; with
// DiscoverPath also path and sha256 of the program.
//
// The path is what the kernel gives for /proc/PID/exe: as the process's own
// mount namespace names it, and followed by " (deleted)" once the file was
// removed or replaced. Who may build a mount namespace may choose the path,
// so it proves little without sha256 or a selector of another kind.
func NewUnix(config UnixConfig) Workload {
	return &unixAttestor{config: config, digests: newDigests()}
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
	addID := func(idKey, nameKey string, id uint32, nameOf func(string) (string, error)) error {
		text := strconv.FormatUint(uint64(id), 10)
		add(idKey, text)
		name, err := nameOf(text)
		if err != nil {
			return fmt.Errorf("look up the name of %s %s: %w", idKey, text, err)
		}
		if name != "" {
			add(nameKey, name)
		}
		return nil
	}
	if err := addID("uid", "user", p.UID, userName); err != nil {
		return nil, err
	}
	if err := addID("gid", "group", p.GID, groupName); err != nil {
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
		if err := addID("supplementary_gid", "supplementary_group", gid, groupName); err != nil {
			return nil, err
		}
	}
	if u.config.DiscoverPath {
		path, sum, err := u.readExecutable(ctx, p)
		if err != nil {
			return nil, err
		}
		add("path", path)
		if sum != "" {
			add("sha256", sum)
		}
	}
	return found, nil
}

func readGroups(p *Process) ([]uint32, error) {
	status, err := readBounded(p.ProcPath("status"), maxStatus)
	if err != nil {
		return nil, err
	}
	return parseGroups(status)
}

// readExecutable returns the path and, unless hashing is off, the SHA-256 in
// hexadecimal of the program. Both are taken from one opened file, which must
// be the one the process executed when it was pinned: reading the path and
// the content one after the other through /proc/PID/exe could give those of
// two programs.
func (u *unixAttestor) readExecutable(ctx context.Context, p *Process) (path, sum string, err error) {
	flags := unix.O_RDONLY
	if u.config.SizeLimit < 0 {
		flags = unix.O_PATH // needs no read access to the file
	}
	f, err := os.OpenFile(p.ProcPath("exe"), flags, 0)
	if err != nil {
		return "", "", fmt.Errorf("open the program: %w", err)
	}
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return "", "", err
	}
	var st unix.Stat_t
	var statErr, linkErr error
	err = raw.Control(func(fd uintptr) {
		statErr = unix.Fstat(int(fd), &st)
		path, linkErr = os.Readlink(filepath.Join(procRoot(), "self", "fd", strconv.Itoa(int(fd))))
	})
	if err := cmp.Or(err, statErr, linkErr); err != nil {
		return "", "", fmt.Errorf("look at the program: %w", err)
	}
	if programOf(&st) != p.exe {
		return "", "", fmt.Errorf("it executes another program than when it was pinned: %w", ErrProcessGone)
	}
	if u.config.SizeLimit < 0 {
		return path, "", nil
	}
	if u.config.SizeLimit > 0 && st.Size > u.config.SizeLimit {
		return "", "", fmt.Errorf("hash %s: %d bytes is above the size limit of %d", path, st.Size, u.config.SizeLimit)
	}
	if sum, err = u.digests.of(ctx, f, versionOf(&st)); err != nil {
		return "", "", fmt.Errorf("hash %s: %w", path, err)
	}
	return path, sum, nil
}

// userName returns the name of a user ID, empty if it has none here. Other
// failures (no file descriptor left, say) are errors: a selector less would
// tell the workload that it is not registered.
func userName(uid string) (string, error) {
	u, err := user.LookupId(uid)
	var unknown user.UnknownUserIdError
	if errors.As(err, &unknown) || errors.Is(err, fs.ErrNotExist) { // a minimal image has no /etc/passwd
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return u.Username, nil
}

// groupName returns the name of a group ID as userName does for users.
func groupName(gid string) (string, error) {
	g, err := user.LookupGroupId(gid)
	var unknown user.UnknownGroupIdError
	if errors.As(err, &unknown) || errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return g.Name, nil
}
