package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// request is all that a client of FetchX509SVID sends at first. The Workload
// API is gRPC, which is HTTP/2; a gRPC client would do the same at several
// times the cost, on cores that the agent needs.
var request = func() []byte {
	var headers bytes.Buffer
	encode := hpack.NewEncoder(&headers)
	for _, f := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", "/SpiffeWorkloadAPI/FetchX509SVID"}, {":authority", "localhost"},
		{"content-type", "application/grpc"}, {"te", "trailers"}, {"workload.spiffe.io", "true"},
	} {
		_ = encode.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a bytes.Buffer takes all
	}
	var all bytes.Buffer
	all.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&all, nil)
	for _, err := range []error{
		f.WriteSettings(),
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers.Bytes(), EndHeaders: true}),
		f.WriteData(1, true, make([]byte, 5)), // an empty message: not compressed, of no bytes
	} {
		if err != nil {
			panic(err) // cannot happen: the frames are constant and a bytes.Buffer takes all
		}
	}
	return all.Bytes()
}()

// fetchX509SVID connects to a Workload API and waits for the first answer,
// which has to hold an SVID. The stream stays open until the connection is
// closed.
func fetchX509SVID(ctx context.Context, socket string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	if err := firstAnswerOn(c); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func firstAnswerOn(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write(request); err != nil {
		return err
	}
	f := http2.NewFramer(c, c)
	f.SetReuseFrames()
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var message []byte
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				err = f.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				err = f.WritePing(true, frame.Data)
			}
		case *http2.MetaHeadersFrame:
			if frame.StreamEnded() {
				err = refused(frame)
			}
		case *http2.DataFrame:
			message = append(message, frame.Data()...)
			if len(message) >= 5 && len(message) >= 5+int(binary.BigEndian.Uint32(message[1:])) {
				return holdsSVID(message[5:])
			}
		case *http2.RSTStreamFrame:
			err = fmt.Errorf("the stream was reset: %s", frame.ErrCode)
		case *http2.GoAwayFrame:
			err = fmt.Errorf("the agent went away: %s", frame.ErrCode)
		}
		if err != nil {
			return err
		}
	}
}

// refused says why a call ended.
func refused(frame *http2.MetaHeadersFrame) error {
	var status, message string
	for _, h := range frame.Fields {
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
