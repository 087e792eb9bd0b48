package main

import (
	"math"
	"syscall"
)

// openFiles returns how many files this process may have open. It is the hard
// limit: the Go runtime raises the soft one to it when a program starts.
func openFiles() uint64 {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1024 // cannot happen; what every system gives
	}
	return limit.Cur
}

const (
	filesOfConnection = 2  // the client's and the target's
	fewestKept        = 64 // files for everything else: listeners, logs, figures, look-ups of names, health checks
	mostKept          = 1024
)

// maxConnections returns the limit over all listeners: the one that is asked
// for, or for 0 as many as the open files leave room for.
func maxConnections(asked int, files uint64) int {
	if asked > 0 {
		return asked
	}
	return int(max(1, min(files-min(files, keptFiles(files)), math.MaxInt32)/filesOfConnection))
}

// keptFiles is how many files are not for connections.
func keptFiles(files uint64) uint64 { return min(max(files/8, fewestKept), mostKept) }

// logLimits says how many connections there can be, and what is promised and
// cannot be held.
func (r *proxyRunner) logLimits() {
	files := openFiles()
	most := maxConnections(r.config.Proxy.MaxConnections, files)
	r.log.Info("connections are limited", "max_connections", most, "open_files", files)
	if room := maxConnections(0, files); most > room {
		r.log.Warn("proxy.max_connections is more than the limit of open files has room for: raise the limit (LimitNOFILE= of a systemd unit, ulimit -Hn), or lower it", "max_connections", most, "room", room, "open_files", files)
	}
}
