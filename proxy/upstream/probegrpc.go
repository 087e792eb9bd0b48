package upstream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
)

const (
	// maxService bounds the name of a service that a check asks about.
	maxService = 255
	// maxReply bounds what is read of the answer, in bytes: it is one number.
	maxReply = 4 << 10
	// prefix is how many bytes come before a message: a flag and its length.
	prefix = 5
)

// checkGRPC returns why a gRPC service cannot be asked about, or nil.
func (h *Health) checkGRPC() error {
	switch {
	case !h.GRPC && h.Service == "":
		return nil
	case !h.GRPC:
		return errors.New("health: a service without grpc")
	case h.Path != "":
		return errors.New("health: a path and grpc: want one of them")
	case h.Interval == 0:
		return errors.New("health: grpc without an interval")
	case len(h.Service) > maxService || !visible(h.Service):
		return fmt.Errorf("health: service %q: want at most %d visible ASCII characters", h.Service, maxService)
	}
	return nil
}

// askGRPC asks how the service is, over a connection that stands, in plaintext:
// a call of one message each way, as gRPC has it over HTTP/2. It returns why the
// answer is not good, or nil. What the far end sent is in no error but for the
// statuses.
func (t *target) askGRPC(ctx context.Context, c net.Conn) error {
	service := t.key.health.Service
	message, err := proto.Marshal(&health.HealthCheckRequest{Service: service})
	if err != nil {
		return fmt.Errorf("grpc health of %q: %w", service, err)
	}
	call := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	r := &http.Request{
		Method: http.MethodPost, Header: http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}},
		Body: io.NopCloser(bytes.NewReader(call)), ContentLength: int64(len(call)),
	}
	if err := askHTTP2(ctx, c, t.healthHost(), health.Health_Check_FullMethodName, r, func(answer *http.Response) error { return readCheck(ctx, answer) }); err != nil {
		return fmt.Errorf("grpc health of %q: %w", service, err)
	}
	return nil
}

// readCheck returns why the answer to a check is not good, or nil.
func readCheck(ctx context.Context, answer *http.Response) error {
	if answer.StatusCode != http.StatusOK {
		return statusError(answer.StatusCode)
	}
	if !strings.HasPrefix(answer.Header.Get("Content-Type"), "application/grpc") {
		return errNotGRPC
	}
	message, err := io.ReadAll(io.LimitReader(answer.Body, prefix+maxReply+1))
	if err != nil {
		return unanswered(ctx, err)
	}
	word := answer.Header.Get("Grpc-Status") // of an answer without a message
	if word == "" {
		word = answer.Trailer.Get("Grpc-Status")
	}
	code, err := strconv.ParseUint(word, 10, 32)
	switch {
	case err != nil || len(message) > prefix+maxReply:
		return errNotGRPC
	case codes.Code(code) != codes.OK:
		return unserved(codes.Code(code))
	case len(message) < prefix || message[0] != 0 || uint64(binary.BigEndian.Uint32(message[1:])) != uint64(len(message)-prefix):
		return errNotGRPC
	}
	var reply health.HealthCheckResponse
	if proto.Unmarshal(message[prefix:], &reply) != nil {
		return errNotGRPC
	}
	if reply.GetStatus() != health.HealthCheckResponse_SERVING {
		return fmt.Errorf("answered %s", reply.GetStatus())
	}
	return nil
}

// errNotGRPC is about an answer of HTTP/2 that is none to a check.
var errNotGRPC = errors.New("the answer is none of grpc.health.v1: use health without grpc")

// unserved says what the status of a check that failed means.
func unserved(code codes.Code) error {
	switch code {
	case codes.Unimplemented:
		return errors.New("it has no health service (grpc.health.v1): add one, or use health without grpc")
	case codes.NotFound:
		return errors.New("its health service does not know that name: use one it knows, or none for the server as a whole")
	}
	return fmt.Errorf("status %s", code)
}
