package attestor

import (
	"errors"
	"io/fs"
	"os/user"
	"strconv"
	"sync"
	"time"
)

const (
	// nameKept is for how long the name of an ID counts as known. Looking it
	// up reads a file for each ID, a fifth of what an attestation takes, and
	// callers come in bursts.
	nameKept = time.Second
	// maxNames is how many are known at most: a caller may have thousands of
	// groups.
	maxNames = 1024
)

// names are those of users, or of groups. What was looked up is known for
// nameKept.
type names struct {
	lookUp func(id string) (string, error)

	mu    sync.Mutex // guards the following
	known map[uint32]name
}

// name is that of one ID, empty if it has none here.
type name struct {
	text  string
	until time.Time
}

func newNames(lookUp func(id string) (string, error)) *names {
	return &names{lookUp: lookUp, known: map[uint32]name{}}
}

// of returns the name of an ID, empty if it has none here. Other failures (no
// file descriptor left, say) are errors: a selector less would tell the
// workload that it is not registered.
func (n *names) of(id uint32) (string, error) {
	now := time.Now()
	n.mu.Lock()
	known, ok := n.known[id]
	n.mu.Unlock()
	if ok && now.Before(known.until) {
		return known.text, nil
	}
	text, err := n.lookUp(strconv.FormatUint(uint64(id), 10))
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.known) >= maxNames {
		clear(n.known)
	}
	n.known[id] = name{text, now.Add(nameKept)}
	return text, nil
}

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
