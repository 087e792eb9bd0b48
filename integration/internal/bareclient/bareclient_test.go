package bareclient

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

// The client reads what a Workload API answers, however it is cut into reads.
func TestFetchX509SVID(t *testing.T) {
	good, err := proto.Marshal(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: "spiffe://example.org/client", X509Svid: make([]byte, 900)}}})
	if err != nil {
		t.Fatal(err)
	}
	empty, err := proto.Marshal(&workload.X509SVIDResponse{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		answer func(*http2.Framer) error
		piece  int // bytes in a write
		want   string
	}{
		{"at once", answerWith(good), 1 << 20, ""},
		{"byte by byte", answerWith(good), 1, ""},
		{"without SVID", answerWith(empty), 1 << 20, "holds no SVID"},
		{"refused", func(f *http2.Framer) error {
			var block bytes.Buffer
			e := hpack.NewEncoder(&block)
			for _, h := range [][2]string{{":status", "200"}, {"grpc-status", "7"}, {"grpc-message", "no identity issued"}} {
				if err := e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
					return err
				}
			}
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
		}, 7, "status 7: no identity issued"},
		{"reset", func(f *http2.Framer) error { return f.WriteRSTStream(1, http2.ErrCodeCancel) }, 1 << 20, "RST_STREAM"},
		{"cut short", func(f *http2.Framer) error {
			return f.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, nil)
		}, 1 << 20, "unexpected EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var g errgroup.Group
			g.Go(func() error { return answerOnce(l, c.answer, c.piece) })
			stream, err := FetchX509SVID(t.Context(), socket)
			if got := fmt.Sprint(err); (c.want == "") != (err == nil) || !strings.Contains(got, c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if err == nil {
				if err := stream.Close(); err != nil {
					t.Error(err)
				}
			}
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// answerWith answers with headers and a message in two frames.
func answerWith(message []byte) func(*http2.Framer) error {
	return func(f *http2.Framer) error {
		framed := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
		half := len(framed) / 2
		return errors.Join(
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x88}, EndHeaders: true}),
			f.WriteData(1, false, framed[:half]),
			f.WriteData(1, false, framed[half:]))
	}
}

// answerOnce serves one connection: it takes the request, sends settings and
// the answer in pieces, and hangs up.
func answerOnce(l net.Listener, answer func(*http2.Framer) error, piece int) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	got := make([]byte, len(fetchX509SVID.request))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	var all bytes.Buffer
	f := http2.NewFramer(&all, nil)
	if err := errors.Join(f.WriteSettings(), answer(f)); err != nil {
		return err
	}
	for all.Len() > 0 {
		if _, err := c.Write(all.Next(piece)); err != nil {
			return err
		}
	}
	if _, err := io.ReadFull(c, got[:len(settingsAck)]); err != nil {
		return err
	}
	return nil
}
