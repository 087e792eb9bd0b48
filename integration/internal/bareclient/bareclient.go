// Package bareclient asks the Workload API for SVIDs. The API is gRPC, which is
// HTTP/2 (RFC 9113). A gRPC client would take the cores away from the agent
// that is measured, so this one does what FetchX509SVID and FetchJWTSVID need
// and nothing else.
package bareclient

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// call is one method with what asks for it and what reads its answer.
type call struct {
	request []byte // all that the client sends at first
	holds   func(message []byte) error
}

var callX509 = call{request("FetchX509SVID", nil), holdsSVID}

// request is preface, settings, and a call with one message.
func request(method string, message []byte) []byte {
	var headers bytes.Buffer
	encode := hpack.NewEncoder(&headers)
	for _, f := range [][2]string{
		{":method", "POST"},
		{":scheme", "http"},
		{":path", "/SpiffeWorkloadAPI/" + method},
		{":authority", "localhost"},
		{"content-type", "application/grpc"},
		{"te", "trailers"},
		{"workload.spiffe.io", "true"},
	} {
		_ = encode.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a bytes.Buffer takes all
	}
	var all bytes.Buffer
	all.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&all, nil)
	framed := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...) // not compressed
	for _, err := range []error{
		f.WriteSettings(),
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers.Bytes(), EndHeaders: true}),
		f.WriteData(1, true, framed),
	} {
		if err != nil {
			panic(err) // cannot happen: the frames are small and a bytes.Buffer takes all
		}
	}
	return all.Bytes()
}

// settingsAck is what the server's settings are answered with.
var settingsAck = []byte{0, 0, 0, byte(http2.FrameSettings), byte(http2.FlagSettingsAck), 0, 0, 0, 0}

// FetchX509SVID connects to a Workload API and waits for the first answer,
// which has to hold an SVID. The stream stays open until the connection is
// closed.
func FetchX509SVID(ctx context.Context, socket string) (net.Conn, error) {
	return callX509.fetch(ctx, socket)
}

// JWT asks for JWT-SVIDs for one audience.
type JWT struct{ call }

// NewJWT returns what asks for JWT-SVIDs for the audience, at most 1 KiB of it.
func NewJWT(audience string) (*JWT, error) {
	if len(audience) == 0 || len(audience) > 1<<10 {
		return nil, fmt.Errorf("an audience of %d bytes; want 1 to 1,024", len(audience))
	}
	message, err := proto.Marshal(&workload.JWTSVIDRequest{Audience: []string{audience}})
	if err != nil {
		return nil, err
	}
	return &JWT{call{request("FetchJWTSVID", message), holdsJWT}}, nil
}

// Fetch connects to a Workload API and waits for the answer, which has to hold
// a JWT-SVID. The connection is the caller's to close.
func (j *JWT) Fetch(ctx context.Context, socket string) (net.Conn, error) {
	return j.fetch(ctx, socket)
}

func (k *call) fetch(ctx context.Context, socket string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	if err := k.await(c); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// frameHead is the size of a frame's header, maxFrame that of the largest
// body: we announced no other.
const (
	frameHead = 9
	maxFrame  = 16 << 10
)

// answers are buffers for one connection's first frames.
var answers = sync.Pool{New: func() any { return bytes.NewBuffer(make([]byte, 0, 2*maxFrame)) }}

// await makes the call and waits for the first message of the answer.
func (k *call) await(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write(k.request); err != nil {
		return err
	}
	in := answers.Get().(*bytes.Buffer)
	defer func() { in.Reset(); answers.Put(in) }()
	var message []byte
	for {
		kind, flags, body, err := readFrame(c, in)
		if err != nil {
			return err
		}
		switch kind {
		case http2.FrameSettings:
			if !flags.Has(http2.FlagSettingsAck) {
				if _, err := c.Write(settingsAck); err != nil {
					return err
				}
			}
		case http2.FrameHeaders:
			if flags.Has(http2.FlagHeadersEndStream) {
				return refused(body)
			}
		case http2.FrameData:
			message = append(message, body...)
			if len(message) >= 5 && len(message) >= 5+int(binary.BigEndian.Uint32(message[1:])) {
				return k.holds(message[5:])
			}
		case http2.FrameRSTStream, http2.FrameGoAway:
			return fmt.Errorf("the agent ended the call with %s %x", kind, body)
		}
	}
}

// readFrame reads the next frame by way of in, in which later ones may have
// come along. The body is good until the next call.
func readFrame(c net.Conn, in *bytes.Buffer) (http2.FrameType, http2.Flags, []byte, error) {
	if err := atLeast(c, in, frameHead); err != nil {
		return 0, 0, nil, err
	}
	head := in.Next(frameHead)
	kind, flags := http2.FrameType(head[3]), http2.Flags(head[4])
	size := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
	if size > maxFrame {
		return 0, 0, nil, fmt.Errorf("a frame of %d bytes", size)
	}
	if err := atLeast(c, in, size); err != nil {
		return 0, 0, nil, err
	}
	return kind, flags, in.Next(size), nil
}

// atLeast reads until in holds n bytes.
func atLeast(c net.Conn, in *bytes.Buffer, n int) error {
	for in.Len() < n {
		in.Grow(maxFrame)
		got, err := c.Read(in.AvailableBuffer()[:maxFrame])
		in.Write(in.AvailableBuffer()[:got])
		if err != nil && in.Len() < n {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// refused says why a call ended. A server that refuses sends its status in
// the first headers.
func refused(block []byte) error {
	fields, err := hpack.NewDecoder(4096, nil).DecodeFull(block)
	if err != nil {
		return fmt.Errorf("the agent refused: %w", err)
	}
	var status, message string
	for _, h := range fields {
		switch h.Name {
		case "grpc-status":
			status = h.Value
		case "grpc-message":
			message = h.Value
		}
	}
	return fmt.Errorf("the agent refused with status %s: %s", status, message)
}

func holdsSVID(message []byte) error {
	var answer workload.X509SVIDResponse
	if err := proto.Unmarshal(message, &answer); err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if len(answer.Svids) == 0 || len(answer.Svids[0].X509Svid) == 0 {
		return errors.New("the answer holds no SVID")
	}
	return nil
}

func holdsJWT(message []byte) error {
	var answer workload.JWTSVIDResponse
	if err := proto.Unmarshal(message, &answer); err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if len(answer.Svids) == 0 || answer.Svids[0].Svid == "" {
		return errors.New("the answer holds no JWT-SVID")
	}
	return nil
}
