package proxy

import (
	"errors"
	"math"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// This file is about hosts that are gone without a word while there is
// something to send to them. What was sent and not acknowledged for the idle
// timeout has not moved, so that it ends the connection; TCP alone goes on for
// a quarter of an hour (tcp_retries2). Silent connections are the business of
// keep-alive.
//
// No shorter time will do: TCP_USER_TIMEOUT also ends the connections of
// peers that live and take nothing for that long, as they may.

// noticeLoss is for the hosts of clients. The option stands on the listening
// socket, of which every accepted one inherits it (tcp(7)).
func (l *listener) noticeLoss(s *settings) {
	if socket, ok := l.socket.(*net.TCPListener); ok && s != nil {
		if err := setUserTimeout(socket, s); err != nil {
			l.proxy.log.Error("cannot set how the loss of clients' hosts is noticed", "listener", l.name, "error", err)
		}
	}
}

// noticeTargetLoss is for a target's host. Our own is not lost without us.
func noticeTargetLoss(up net.Conn, s *settings) {
	if tcp, ok := up.(*net.TCPConn); ok && !tcp.RemoteAddr().(*net.TCPAddr).IP.IsLoopback() {
		_ = setUserTimeout(tcp, s) // fails on a closed socket, which the copies find out
	}
}

func setUserTimeout(socket syscall.Conn, s *settings) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	idle := max(0, s.Timeouts.Idle) // 0: never
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(min(idle.Milliseconds(), math.MaxInt32)))
	})
	return errors.Join(err, set)
}
