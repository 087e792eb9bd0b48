package csi

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Bounds on what a caller may cost.
const (
	maxMessage       = 64 << 10
	maxHeaders       = 16 << 10
	maxCalls         = 16 // under way on one connection
	maxConnections   = 16 // on each socket; kubelet makes one for each call
	handshakeTimeout = 5 * time.Second
	drainTimeout     = 5 * time.Second
)

// door is one socket with the server behind it.
type door struct {
	path    string
	private bool // its directory is the driver's own
	log     hclog.Logger
	server  *grpc.Server
	socket  *listener // nil: closed
}

func newServer() *grpc.Server {
	return grpc.NewServer(
		grpc.Creds(insecure.NewCredentials()), // Accept asks the kernel who connects
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxCalls),
		grpc.ConnectionTimeout(handshakeTimeout),
	)
}

// open makes the socket, in the place of one that nobody serves.
func (d *door) open() error {
	s, err := listen(d.path, d.private, d.log)
	if err != nil {
		return err
	}
	if d.socket != nil {
		_ = d.socket.Close() // its file is gone
	}
	d.socket = s
	return nil
}

// stands reports whether the socket's file is there and is the door's own.
func (d *door) stands() bool { return d.socket != nil && d.socket.Stands() }

// serve answers on the socket as it is now, until it is closed.
func (d *door) serve(g *errgroup.Group) {
	socket := d.socket
	g.Go(func() error {
		err := d.server.Serve(netutil.LimitListener(socket, maxConnections))
		if err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, grpc.ErrServerStopped) {
			return nil
		}
		return fmt.Errorf("serve kubelet on %s: %w", socket.Addr(), err)
	})
}

// close removes the socket's file, if it is still the door's own, and ends the
// server.
func (d *door) close() error {
	if d == nil {
		return nil
	}
	var err error
	if d.socket != nil {
		err = d.socket.Remove()
		_ = d.socket.Close()
	}
	hurry := time.AfterFunc(drainTimeout, d.server.Stop)
	d.server.GracefulStop()
	hurry.Stop()
	return err
}
