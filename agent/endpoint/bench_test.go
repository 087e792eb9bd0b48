package endpoint

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// rawStreams opens FetchX509SVID streams without a gRPC client, each on a
// connection of its own, so that what memory they take is the server's.
type rawStreams struct {
	tb    testing.TB
	f     *fixture
	hello []byte
	fds   []int
}

func newRawStreams(tb testing.TB, f *fixture) *rawStreams {
	return rawCalls(tb, f, workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName, nil, true)
}

// rawCalls opens streams of another method, with this request, which is the
// last or not.
func rawCalls(tb testing.TB, f *fixture, method string, request []byte, last bool) *rawStreams {
	var hello bytes.Buffer
	hello.WriteString(http2.ClientPreface)
	framer := http2.NewFramer(&hello, nil)
	must(tb, framer.WriteSettings())
	must(tb, framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: 1, BlockFragment: callHeaders(tb, method, 0), EndHeaders: true,
	}))
	message := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request)))
	must(tb, framer.WriteData(1, last, append(message, request...)))
	return &rawStreams{tb: tb, f: f, hello: hello.Bytes()}
}

// callHeaders are the headers of a call as gRPC sends them, and padding.
func callHeaders(tb testing.TB, method string, padding int) []byte {
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	encoder.SetMaxDynamicTableSize(0) // what the server's settings ask for
	fields := [][2]string{
		{":method", "POST"},
		{":scheme", "http"},
		{":path", method},
		{":authority", "localhost"},
		{"content-type", "application/grpc"},
		{"user-agent", "grpc-go/1.85.0"},
		{"te", "trailers"},
		{securityHeader, "true"},
	}
	if padding > 0 {
		fields = append(fields, [2]string{"x-padding", strings.Repeat("x", padding)})
	}
	for _, field := range fields {
		must(tb, encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]}))
	}
	return block.Bytes()
}

// open opens one more stream and reads its first answer.
func (r *rawStreams) open() {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(r.tb, err)
	r.fds = append(r.fds, fd)
	must(r.tb, unix.Connect(fd, &unix.SockaddrUnix{Name: r.f.socket}))
	_, err = unix.Write(fd, r.hello)
	must(r.tb, err)
	for {
		var header [9]byte
		r.read(fd, header[:])
		payload := make([]byte, int(binary.BigEndian.Uint32(header[:4])>>8))
		r.read(fd, payload)
		switch http2.FrameType(header[3]) {
		case http2.FrameData:
			return
		case http2.FrameSettings:
			if header[4] == 0 {
				_, err := unix.Write(fd, []byte{0, 0, 0, byte(http2.FrameSettings), byte(http2.FlagSettingsAck), 0, 0, 0, 0})
				must(r.tb, err)
			}
		}
	}
}

func (r *rawStreams) read(fd int, b []byte) {
	for len(b) > 0 {
		n, err := unix.Read(fd, b)
		if must(r.tb, err); n == 0 {
			r.tb.Fatal("the server hung up")
		}
		b = b[n:]
	}
}

func (r *rawStreams) close() {
	for _, fd := range r.fds {
		_ = unix.Close(fd)
	}
}

// memory is what is in use: live heap, stacks, and all that is resident.
type memory struct{ heap, stacks, resident float64 }

func inUse(tb testing.TB) memory {
	var m runtime.MemStats
	for range 3 { // stacks shrink, pools empty
		debug.FreeOSMemory()
	}
	runtime.ReadMemStats(&m)
	statm, err := os.ReadFile("/proc/self/statm")
	must(tb, err)
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	must(tb, err)
	return memory{float64(m.HeapAlloc), float64(m.StackInuse), float64(pages * os.Getpagesize())}
}

// heldStreamMemory opens n streams and returns the bytes each one takes.
func heldStreamMemory(tb testing.TB, f *fixture, n int) memory {
	return heldMemory(newRawStreams(tb, f), n)
}

func heldMemory(streams *rawStreams, n int) memory {
	tb := streams.tb
	defer streams.close()
	streams.fds = make([]int, 0, n+8)
	for range 8 {
		streams.open() // what is there once
	}
	before := inUse(tb)
	for range n {
		streams.open()
	}
	after := inUse(tb)
	each := func(before, after float64) float64 { return (after - before) / float64(n) }
	return memory{each(before.heap, after.heap), each(before.stacks, after.stacks), each(before.resident, after.resident)}
}

// BenchmarkHeldStream tells what a stream costs that waits for news: one
// connection, one FetchX509SVID stream.
func BenchmarkHeldStream(b *testing.B) {
	f := serve(b)
	f.register(f.entry("a", "/a"))
	for b.Loop() {
		m := heldStreamMemory(b, f, 1000)
		b.ReportMetric(m.heap, "heap-B/stream")
		b.ReportMetric(m.stacks, "stack-B/stream")
		b.ReportMetric(m.resident, "resident-B/stream")
	}
}

// BenchmarkHeldStreamFollowed is one whose caller's labels are followed; what
// the attestor of the test keeps is counted too.
func BenchmarkHeldStreamFollowed(b *testing.B) {
	l := newLabels("k8s", "label:a")
	f := serve(b, func(c *Config) { c.Attestors = append(c.Attestors, l) })
	f.register(f.entry("a", "/a"))
	for b.Loop() {
		l.asked = nil
		m := heldStreamMemory(b, f, 1000)
		b.ReportMetric(m.heap, "heap-B/stream")
		b.ReportMetric(m.stacks, "stack-B/stream")
		b.ReportMetric(m.resident, "resident-B/stream")
	}
}

// BenchmarkHeldSecretStream is one of an Envoy that has its SVID and a bundle.
func BenchmarkHeldSecretStream(b *testing.B) {
	f := serve(b)
	f.register(f.entry("a", "/a"))
	for b.Loop() {
		m := heldMemory(rawEnvoys(b, f), 1000)
		b.ReportMetric(m.heap, "heap-B/stream")
		b.ReportMetric(m.stacks, "stack-B/stream")
		b.ReportMetric(m.resident, "resident-B/stream")
	}
}

func rawEnvoys(tb testing.TB, f *fixture) *rawStreams {
	request, err := proto.Marshal(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "ROOTCA"}})
	must(tb, err)
	return rawCalls(tb, f, secretservice.SecretDiscoveryService_DeltaSecrets_FullMethodName, request, false)
}

// The bound finds a buffer of 32 KiB on each side of each connection, not a
// new field.
func TestHeldStreamMemory(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	if m := heldStreamMemory(t, f, 200); m.heap+m.stacks > 64<<10 {
		t.Errorf("a held stream takes %.0f bytes of heap and %.0f of stack", m.heap, m.stacks)
	}
	if m := heldMemory(rawEnvoys(t, f), 200); m.heap+m.stacks > 64<<10 {
		t.Errorf("a held stream of SDS takes %.0f bytes of heap and %.0f of stack", m.heap, m.stacks)
	}
}

// BenchmarkFetch is one workload that asks once on a connection that it
// keeps, as one that polls does.
func BenchmarkFetch(b *testing.B) {
	f := serve(b, quick)
	f.register(f.entry("a", "/a"))
	client := workload.NewSpiffeWorkloadAPIClient(f.dial())
	for b.Loop() {
		fetchOnce(b, client)
	}
}

// BenchmarkConnectAndFetch is one that connects for it, as tools do.
func BenchmarkConnectAndFetch(b *testing.B) {
	f := serve(b, quick)
	f.register(f.entry("a", "/a"))
	streams := newRawStreams(b, f)
	for b.Loop() {
		streams.open()
		streams.close()
		streams.fds = streams.fds[:0]
	}
}

// BenchmarkUpdate is an SVID's rotation on its way to 200 streams.
func BenchmarkUpdate(b *testing.B) {
	f := serve(b, quick)
	f.register(f.entry("a", "/a"))
	var got sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	got.Add(200)
	for range 200 {
		stream := f.fetch(ctx)
		go func() {
			for {
				if _, err := stream.Recv(); err != nil {
					return
				}
				got.Done()
			}
		}()
	}
	got.Wait()
	for b.Loop() {
		got.Add(200)
		f.sign(time.Hour)
		got.Wait()
	}
}

func quick(c *Config) {
	c.Limits = Limits{RequestsPerSecond: 1e9}
	c.Log = hclog.NewNullLogger()
}

func fetchOnce(b *testing.B, client workload.SpiffeWorkloadAPIClient) {
	ctx, cancel := context.WithCancel(withHeader(context.Background()))
	defer cancel()
	stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(b, err, codes.OK)
}
