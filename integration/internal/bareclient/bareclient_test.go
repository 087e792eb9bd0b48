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
func TestFetch(t *testing.T) {
	good, err := proto.Marshal(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: "spiffe://example.org/client", X509Svid: make([]byte, 900)}}})
	if err != nil {
		t.Fatal(err)
	}
	empty, err := proto.Marshal(&workload.X509SVIDResponse{})
	if err != nil {
		t.Fatal(err)
	}
	token, err := proto.Marshal(&workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: "spiffe://example.org/client", Svid: "a.b.c"}}})
	if err != nil {
		t.Fatal(err)
	}
	jwt, err := NewJWT("audience")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		call   *call
		answer func(*http2.Framer) error
		piece  int // bytes in a write
		want   string
	}{
		{"at once", &callX509, answerWith(good), 1 << 20, ""},
		{"byte by byte", &callX509, answerWith(good), 1, ""},
		{"without SVID", &callX509, answerWith(empty), 1 << 20, "holds no SVID"},
		{"a token", &jwt.call, answerWith(token), 5, ""},
		{"without token", &jwt.call, answerWith(empty), 1 << 20, "holds no JWT-SVID"},
		{"refused", &callX509, func(f *http2.Framer) error {
			var block bytes.Buffer
			e := hpack.NewEncoder(&block)
			for _, h := range [][2]string{{":status", "200"}, {"grpc-status", "7"}, {"grpc-message", "no identity issued"}} {
				if err := e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
					return err
				}
			}
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
		}, 7, "status 7: no identity issued"},
		{"reset", &callX509, func(f *http2.Framer) error { return f.WriteRSTStream(1, http2.ErrCodeCancel) }, 1 << 20, "RST_STREAM"},
		{"cut short", &callX509, func(f *http2.Framer) error {
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
			g.Go(func() error { return answerOnce(l, len(c.call.request), c.answer, c.piece) })
			stream, err := c.call.fetch(t.Context(), socket)
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

// answerOnce serves one connection: it takes a request of so many bytes, sends settings and
// the answer in pieces, and hangs up.
func answerOnce(l net.Listener, request int, answer func(*http2.Framer) error, piece int) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	got := make([]byte, request)
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

func TestAudienceOfJWT(t *testing.T) {
	for _, size := range []int{0, 1<<10 + 1} {
		if _, err := NewJWT(strings.Repeat("a", size)); err == nil {
			t.Errorf("an audience of %d bytes was taken", size)
		}
	}
}
