// Package handover passes the listening sockets of a running process to the
// one that takes its place, so that nobody who connects meanwhile is refused.
//
// The running process listens on a Unix socket and gives when asked:
//
//	given, err := handover.Serve(ctx, handover.Config{Listener: l, Giver: g, …})
//
// The new one asks at its start, opens what it needs, and says when it could
// begin; only after that does the old one stop:
//
//	from, err := handover.Ask(ctx, path, version) // ErrNobody: there is none, start as usual
//	…
//	socket := from.Take(handover.Listener, "inventory", "0.0.0.0:8443")
//	…
//	err = from.Ready(ctx) // nil: the sockets are ours
//
// The socket is a SOCK_SEQPACKET one: each message is one JSON object, and one
// file descriptor where it speaks of a socket (SCM_RIGHTS, unix(7)).
//
//	new → old  hello    the protocol and version of the new process
//	old → new  socket   one for each socket, with its descriptor
//	old → new  offered  that was all of them
//	new → old  ready    which of them it takes; it could begin now
//	old → new  yours    the old one accepts no more, and holds nothing that
//	                    only one process can have
//	new → old  begun    it serves, and its service manager knows of it: the
//	                    old one may end
//	old → new  live     while it drains: how many connections it still has
//
// In place of each answer the old process may refuse, with a reason. Whatever
// goes wrong before `ready` leaves the old one as it was; where that one can,
// it goes on also when `begun` does not come. What an old one that dies without
// a word has given already is the new one's.
//
// The new process may be in another network namespace (another container of
// the host). A TCP socket belongs to the namespace it was made in, so those of
// another one are not taken: each serves its own.
//
// Both ends ask the kernel who the other is: the same user, or root. What the
// sockets are for is the business of whoever calls.
package handover

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Protocol is the version of the protocol. A process that speaks another one
// is refused, by both ends.
const Protocol = 1

// Kind is what a socket is for.
type Kind string

// Kinds of sockets. Control is the one on which the hand-over itself is asked
// for: it is passed on by this package, so that the next process finds the
// newest under the same path.
const (
	Listener  Kind = "listener"
	Telemetry Kind = "telemetry"
	Health    Kind = "health"
	Control   Kind = "control"
)

// Socket is a listening socket with what the new process knows it by.
type Socket struct {
	Kind    Kind   `json:"kind"`
	Name    string `json:"name,omitempty"`    // of the listener
	Bind    string `json:"bind"`              // as it stands in the configuration
	Owned   bool   `json:"owned,omitempty"`   // whoever has this Unix socket removes its path at the end
	Serving bool   `json:"serving,omitempty"` // it could serve when it was offered

	Listener net.Listener `json:"-"`
}

// Bounds of what the other end can send and of how long it may take.
const (
	maxMessage = 64 << 10
	maxSockets = 4096
	stepTime   = 5 * time.Second
	// ReadyTime is how long a new process may take between its hello and its
	// ready.
	ReadyTime = 2 * time.Minute
	// LetGoTime is how long the old process may take, then, to end what must
	// not be cut off.
	LetGoTime = 20 * time.Second
	// BegunTime is how long the new process may take after that until it
	// serves. An old one that could go on in its place does so then.
	BegunTime = 10 * time.Second
)

// Steps of the protocol.
const (
	stepHello   = "hello"
	stepSocket  = "socket"
	stepOffered = "offered"
	stepReady   = "ready"
	stepYours   = "yours"
	stepBegun   = "begun"
	stepLive    = "live"
	stepRefused = "refused"
)

// message is everything that is ever sent; which fields are set depends on the
// step.
type message struct {
	Protocol int            `json:"narthex_handover"`
	Step     string         `json:"step"`
	Version  string         `json:"version,omitempty"` // hello, offered: of the program, for the log
	Socket   *Socket        `json:"socket,omitempty"`
	Taken    []int          `json:"taken,omitempty"` // ready: places in the order of the socket messages
	Live     map[string]int `json:"live,omitempty"`  // live: connections by listener name
	Reason   string         `json:"reason,omitempty"`
}

// parse reads a message. Unknown fields are errors: a newer protocol has
// another number.
func parse(data []byte) (*message, error) {
	var m message
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("not a message of the hand-over protocol: %w", err)
	}
	if m.Protocol != Protocol {
		return nil, &protocolError{m.Protocol}
	}
	if err := strict(data); err != nil {
		return nil, err
	}
	if m.Step == stepSocket && (m.Socket == nil || m.Socket.Kind == "" || m.Socket.Bind == "") {
		return nil, errors.New("a socket without kind and address")
	}
	seen := map[int]bool{}
	for _, i := range m.Taken {
		if i < 0 || i >= maxSockets || seen[i] {
			return nil, fmt.Errorf("takes socket %d, which cannot be", i)
		}
		seen[i] = true
	}
	for name, n := range m.Live {
		if n < 0 {
			return nil, fmt.Errorf("listener %q has %d connections", name, n)
		}
	}
	return &m, nil
}

// strict refuses what this protocol has no word for, and what follows a
// message.
func strict(data []byte) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&message{}); err != nil {
		return fmt.Errorf("not a message of the hand-over protocol: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("not a message of the hand-over protocol: something follows it")
	}
	return nil
}

// protocolError is a peer of another version of the protocol.
type protocolError struct{ theirs int }

func (e *protocolError) Error() string {
	return fmt.Sprintf("speaks version %d of the hand-over protocol, and this program version %d", e.theirs, Protocol)
}

// refusedError is what the old process said in place of an answer.
type refusedError struct{ reason string }

func (e *refusedError) Error() string { return "the running process refused: " + e.reason }

// line is one end of the connection.
type line struct{ conn *net.UnixConn }

// send sends m, with the descriptor of socket where it is not nil.
func (l line) send(m message, socket net.Listener) error {
	m.Protocol = Protocol
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(data) > maxMessage {
		return fmt.Errorf("a message of %d bytes is longer than the %d that are read", len(data), maxMessage)
	}
	if err := l.conn.SetWriteDeadline(time.Now().Add(stepTime)); err != nil {
		return err
	}
	if socket == nil {
		_, _, err := l.conn.WriteMsgUnix(data, nil, nil)
		return err
	}
	s, ok := socket.(syscall.Conn)
	if !ok {
		return fmt.Errorf("a %T has no descriptor", socket)
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	// Not through File(): its descriptor would be made blocking, and with it
	// the one we still accept on.
	var sendErr error
	if err := raw.Control(func(fd uintptr) {
		_, _, sendErr = l.conn.WriteMsgUnix(data, unix.UnixRights(int(fd)), nil)
	}); err != nil {
		return err
	}
	return sendErr
}

// receive reads one message, with its descriptor where it has one, until the
// deadline or until ctx ends. A descriptor that is not asked for is closed.
func (l line) receive(ctx context.Context, until time.Time, withFile bool) (*message, *os.File, error) {
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	if err := l.conn.SetReadDeadline(until); err != nil {
		return nil, nil, err
	}
	// Only now, and over when this returns: neither of the two deadlines is to
	// overwrite the other's.
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cut)
		_ = l.conn.SetReadDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-cut
		}
	}()
	data := make([]byte, maxMessage+1)
	var oob []byte
	if withFile {
		oob = make([]byte, unix.CmsgSpace(4))
	}
	n, oobn, flags, _, err := l.conn.ReadMsgUnix(data, oob)
	if err != nil {
		return nil, nil, err
	}
	file, err := fileOf(oob[:oobn])
	if err != nil {
		return nil, nil, err
	}
	m, err := parse(data[:n])
	switch {
	case n > maxMessage || flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("a message longer than %d bytes", maxMessage)
	case err == nil && m.Step == stepRefused:
		err = &refusedError{m.Reason}
	case err == nil && withFile && flags&unix.MSG_CTRUNC != 0:
		err = errors.New("its descriptors did not fit: are the open files of this process at their limit?")
	case err == nil && (m.Step == stepSocket) != (file != nil):
		err = fmt.Errorf("a %s message with the wrong number of descriptors", m.Step)
	}
	if err != nil && file != nil {
		_ = file.Close()
	}
	if err != nil {
		return nil, nil, err
	}
	return m, file, nil
}

// fileOf returns the one descriptor of a control message, nil where there is
// none.
func fileOf(oob []byte) (*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	controls, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("read descriptors: %w", err)
	}
	var files []*os.File
	for _, c := range controls {
		fds, err := unix.ParseUnixRights(&c)
		if err != nil {
			continue // other ancillary data, which nobody asked for
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	if len(files) == 1 {
		return files[0], nil
	}
	for _, f := range files {
		_ = f.Close()
	}
	if len(files) == 0 {
		return nil, nil
	}
	return nil, fmt.Errorf("%d descriptors in one message", len(files))
}

// trusted reports who the other end of c is, as an error when it is neither
// our own user nor root. For a listening socket it is who made it.
func trusted(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("ask who is there: %w", credErr)
	}
	if own := os.Geteuid(); cred.Uid != 0 && int(cred.Uid) != own {
		return fmt.Errorf("process %d is of uid %d: only uid %d and root hand over to each other", cred.Pid, cred.Uid, own)
	}
	return nil
}
