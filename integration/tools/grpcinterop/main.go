// Command grpcinterop is both ends of gRPC's own interoperability tests
// (google.golang.org/grpc/interop), by mutual TLS where files are named.
// `call` runs one case and ends with a status other than 0 when it fails.
//
//	grpcinterop serve ADDRESS [CERT KEY CA]
//	grpcinterop call CASE ADDRESS [CERT KEY CA]
//	grpcinterop cases
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
)

// patience bounds one case.
const patience = 20 * time.Second

// cases are those about how calls are carried; the others are about
// credentials and load balancing.
var cases = map[string]func(context.Context, *grpc.ClientConn, testgrpc.TestServiceClient){
	"empty_unary":                 on(interop.DoEmptyUnaryCall),
	"large_unary":                 on(interop.DoLargeUnaryCall),
	"client_streaming":            on(interop.DoClientStreaming),
	"server_streaming":            on(interop.DoServerStreaming),
	"ping_pong":                   on(interop.DoPingPong),
	"large_unary_gzip":            on(interop.DoLargeUnaryCall, grpc.UseCompressor(gzip.Name)),
	"client_streaming_gzip":       on(interop.DoClientStreaming, grpc.UseCompressor(gzip.Name)),
	"server_streaming_gzip":       on(interop.DoServerStreaming, grpc.UseCompressor(gzip.Name)),
	"ping_pong_gzip":              on(interop.DoPingPong, grpc.UseCompressor(gzip.Name)),
	"empty_stream":                on(interop.DoEmptyStream),
	"timeout_on_sleeping_server":  on(interop.DoTimeoutOnSleepingServer),
	"cancel_after_begin":          on(interop.DoCancelAfterBegin),
	"cancel_after_first_response": on(interop.DoCancelAfterFirstResponse),
	"status_code_and_message":     on(interop.DoStatusCodeAndMessage),
	"special_status_message":      on(interop.DoSpecialStatusMessage),
	"custom_metadata":             on(interop.DoCustomMetadata),
	"unimplemented_method": func(ctx context.Context, cc *grpc.ClientConn, _ testgrpc.TestServiceClient) {
		interop.DoUnimplementedMethod(ctx, cc)
	},
	"unimplemented_service": func(ctx context.Context, cc *grpc.ClientConn, _ testgrpc.TestServiceClient) {
		interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(cc))
	},
}

func on(do func(context.Context, testgrpc.TestServiceClient, ...grpc.CallOption), how ...grpc.CallOption) func(context.Context, *grpc.ClientConn, testgrpc.TestServiceClient) {
	return func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) { do(ctx, c, how...) }
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "grpcinterop:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "cases":
		fmt.Println(strings.Join(slices.Sorted(maps.Keys(cases)), "\n"))
		return nil
	case len(args) >= 2 && args[0] == "serve":
		return serve(args[1], args[2:])
	case len(args) >= 3 && args[0] == "call":
		return call(args[1], args[2], args[3:])
	}
	return errors.New("want serve ADDRESS [CERT KEY CA], call CASE ADDRESS [CERT KEY CA], or cases")
}

func serve(address string, files []string) error {
	creds, err := identity(files)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	s := grpc.NewServer(grpc.Creds(creds))
	testgrpc.RegisterTestServiceServer(s, interop.NewTestServer())
	return s.Serve(l)
}

func call(name, address string, files []string) error {
	do, ok := cases[name]
	if !ok {
		return fmt.Errorf("no case %q", name)
	}
	creds, err := identity(files)
	if err != nil {
		return err
	}
	cc, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds))
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	do(ctx, cc, testgrpc.NewTestServiceClient(cc)) // ends the process where it fails
	return nil
}

// identity reads CERT KEY CA. The far end has to be localhost by its
// certificate, as those of the tests are.
func identity(files []string) (credentials.TransportCredentials, error) {
	if len(files) == 0 {
		return insecure.NewCredentials(), nil
	}
	if len(files) != 3 {
		return nil, errors.New("want CERT KEY CA")
	}
	own, err := tls.LoadX509KeyPair(files[0], files[1])
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(files[2])
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("no certificate in %s", files[2])
	}
	return credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{own},
		RootCAs:      roots, ClientCAs: roots,
		ClientAuth: tls.RequireAndVerifyClientCert,
		ServerName: "localhost",
	}), nil
}
