package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

// What this program is when it is started as one end of the calls of gRPC, so
// that its CPU time can be told from that of the harness. An address follows,
// and the folder of certificates where it speaks TLS.
const (
	roleService = "grpc-service"
	roleClient  = "grpc-client"
)

// runGRPC is one end of the calls.
func runGRPC(role, address string, certs []string) error {
	secure, err := grpcCredentials(role, certs)
	if err != nil {
		return err
	}
	if role == roleClient {
		return callGRPC(address, secure, os.Stdin, os.Stdout)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	end := startGRPC(l, secure)
	defer end()
	select {} // until it is told to end
}

// grpcCredentials are mutual TLS between the two identities of the benchmark,
// or none.
func grpcCredentials(role string, certs []string) (credentials.TransportCredentials, error) {
	if len(certs) == 0 {
		return insecure.NewCredentials(), nil
	}
	own, other := "server", clientID
	if role == roleClient {
		own, other = "client", serverID
	}
	svid, err := x509svid.Load(filepath.Join(certs[0], own+".pem"), filepath.Join(certs[0], own+".key"))
	if err != nil {
		return nil, err
	}
	bundle, err := x509bundle.Load(spiffeid.RequireTrustDomainFromString(trustDomain), filepath.Join(certs[0], "ca.pem"))
	if err != nil {
		return nil, err
	}
	authorize := tlsconfig.AuthorizeID(spiffeid.RequireFromString(other))
	config := tlsconfig.MTLSServerConfig(svid, bundle, authorize)
	if role == roleClient {
		config = tlsconfig.MTLSClientConfig(svid, bundle, authorize)
	}
	config.MinVersion, config.CurvePreferences, config.SessionTicketsDisabled = tls.VersionTLS13, []tls.CurveID{tls.X25519}, true
	return credentials.NewTLS(config), nil
}

// The one method of the service, which answers what it is asked.
const (
	grpcService = "bench.Echo"
	grpcMethod  = "Unary"
	grpcPath    = "/" + grpcService + "/" + grpcMethod
)

// grpcMessage is what is sent in each direction, with 128 bytes in it.
func grpcMessage() *wrapperspb.BytesValue { return wrapperspb.Bytes(make([]byte, 128)) }

// grpcQuestion is one call as the benchmark's own client makes it. A message
// has five bytes before it: that it is not compressed, and its length.
func grpcQuestion() *h2Question {
	message, err := proto.Marshal(grpcMessage())
	if err != nil {
		panic(err) // cannot happen: the message is constant
	}
	body := append([]byte{0, 0, 0, 0, byte(len(message))}, message...)
	return &h2Question{
		method: "POST", path: grpcPath, body: body, down: len(body), calls: true,
		fields: [][2]string{{"content-type", "application/grpc"}, {"user-agent", "narthex-bench/1.0"}, {"te", "trailers"}},
	}
}

// startGRPC serves on l until end is called.
func startGRPC(l net.Listener, secure credentials.TransportCredentials) (end func()) {
	s := grpc.NewServer(grpc.Creds(secure))
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: grpcService,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: grpcMethod, Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			in := new(wrapperspb.BytesValue)
			return in, decode(in)
		}}},
	}, nil)
	var serving errgroup.Group
	serving.Go(func() error { return s.Serve(l) })
	return func() {
		s.Stop()
		_ = serving.Wait() // it ends for no other reason, or calls fail and say so
	}
}

// callGRPC makes as many calls as asked says, line after line, and tells the
// 99th percentile of the µs that they took.
func callGRPC(address string, secure credentials.TransportCredentials, asked io.Reader, told io.Writer) error {
	c, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(secure), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return err
	}
	defer c.Close()
	for {
		var n, atATime int
		if _, err := fmt.Fscanln(asked, &n, &atATime); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		took, err := makeCalls(c, n, atATime)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintln(told, figures.Quantile(took, 0.99)); err != nil {
			return err
		}
	}
}

func makeCalls(c *grpc.ClientConn, n, atATime int) ([]float64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), connectionTimeout)
	defer cancel()
	var all waits
	g, ctx := errgroup.WithContext(ctx)
	for range atATime {
		g.Go(func() error {
			message, answer := grpcMessage(), new(wrapperspb.BytesValue)
			took := make([]float64, 0, n/atATime)
			for range n / atATime {
				begin := time.Now()
				if err := c.Invoke(ctx, grpcPath, message, answer); err != nil {
					return err
				}
				took = append(took, microseconds(time.Since(begin)))
			}
			all.add(took)
			return nil
		})
	}
	err := g.Wait()
	return all.list, err
}
