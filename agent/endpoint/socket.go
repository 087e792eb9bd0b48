package endpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/narthex-id/narthex/internal/socket"
)

// socketMode lets every local process connect; attestation decides.
const socketMode = 0o777

// listenUnix makes the Workload API's socket, and its directory where that is
// missing.
func listenUnix(addr string) (*socket.Listener, error) {
	path, err := socket.Path(addr)
	if err != nil {
		return nil, err
	}
	if err := makeParents(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := socket.Listen(path, socketMode)
	if errors.Is(err, socket.ErrServed) {
		err = fmt.Errorf("%w: stop it or choose another path", err)
	}
	return l, err
}

// makeParents makes dir and what is missing above it with mode 0755, whatever
// the umask. Directories that exist are left as they are.
func makeParents(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeParents(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil { //nolint:gosec // every user of the node has to reach the socket in it
		if errors.Is(err, fs.ErrExist) {
			return nil // somebody else made it meanwhile
		}
		return err
	}
	return os.Chmod(dir, 0o755)
}
