package endpoint

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	rpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/attestor"
)

func TestDefaultLimits(t *testing.T) {
	l := Limits{}.withDefaults()
	if l.Connections < 1 || l.Connections > 8192 || l.ConnectionsPerUID < 1 || l.ConnectionsPerUID > l.Connections ||
		l.StreamsPerConnection < 1 || l.HouseShare < 1 || l.StreamsPerUID < 1 || l.StreamsPerUID > l.Streams || l.FirstMessage <= 0 || l.Unread <= 0 || l.AttestationTime <= 0 || l.AttestationsPerUID < 1 || l.AttestationsPerUID > l.Attestations || l.RequestsPerSecond < 1 || l.Burst < l.RequestsPerSecond {
		t.Errorf("unusable defaults %+v", l)
	}
	if l := (Limits{Connections: 1}).withDefaults(); l.ConnectionsPerUID != 1 {
		t.Errorf("one connection in all leaves %d to a user", l.ConnectionsPerUID)
	}
}

func TestConnectionLimits(t *testing.T) {
	l := newLimiter(Limits{Connections: 3, ConnectionsPerUID: 2}, false)
	now := time.Unix(1e9, 0)
	connect := func(uid uint32, wantUser bool, say string) *user {
		t.Helper()
		u, refusal, ok := l.connect(origin{uid: uid}, now)
		if !ok || (u != nil) != wantUser {
			t.Fatalf("uid %d: got %v, %v, %t", uid, u, refusal, ok)
		}
		if !wantUser {
			wantCode(t, refusal, codes.ResourceExhausted, say)
		}
		return u
	}
	a := connect(1, true, "")
	connect(1, true, "")
	connect(1, false, "uid 1 holds 2 connections")
	connect(2, true, "")
	connect(3, false, "the agent holds 3 connections")
	l.disconnect(a)
	connect(3, true, "")
	for l.refused < maxRefused {
		connect(4, false, "the agent holds 3 connections")
	}
	if _, _, ok := l.connect(origin{uid: 4}, now); ok {
		t.Error("more refused connections than there may be")
	}
	l.disconnect(nil)
	connect(4, false, "the agent holds")
}

func TestStreamLimits(t *testing.T) {
	l := newLimiter(Limits{Streams: 3, StreamsPerUID: 2}, false)
	now := time.Unix(1e9, 0)
	connect := func(uid uint32) *user {
		u, _, _ := l.connect(origin{uid: uid}, now)
		return u
	}
	a, b := connect(0), connect(1) // root is a user like others
	must(t, l.beginStream(a, now))
	must(t, l.beginStream(a, now))
	wantCode(t, l.beginStream(a, now), codes.ResourceExhausted, "uid 0 holds 2 calls")
	must(t, l.beginStream(b, now))
	wantCode(t, l.beginStream(b, now), codes.ResourceExhausted, "the agent holds 3 calls")
	l.endStream(a)
	must(t, l.beginStream(b, now))
	for range 2 {
		l.endStream(b)
	}
	l.endStream(a)
	if l.streams.taken+a.streams+b.streams != 0 {
		t.Error("streams are left counted")
	}
}

func TestRequestRate(t *testing.T) {
	l := newLimiter(Limits{RequestsPerSecond: 10, Burst: 20}, false)
	now := time.Unix(1e9, 0)
	u, _, _ := l.connect(origin{uid: 1}, now) // the first of the burst
	for i := range 19 {
		if err := l.request(u, now); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
	}
	wantCode(t, l.request(u, now), codes.ResourceExhausted, "uid 1", "more than 10 times a second")
	// Hanging up and connecting again does not help.
	l.disconnect(u)
	if _, refusal, _ := l.connect(origin{uid: 1}, now); refusal == nil {
		t.Error("a new connection began with a new burst")
	}
	now = now.Add(100 * time.Millisecond)
	must(t, l.request(u, now))
	wantCode(t, l.request(u, now), codes.ResourceExhausted)
	now = now.Add(time.Hour)
	for range 20 {
		must(t, l.request(u, now))
	}
	wantCode(t, l.request(u, now), codes.ResourceExhausted)
}

// A user with many uids at hand (a range of subordinate ones) does not fill
// the memory.
func TestUsersAreForgotten(t *testing.T) {
	l := newLimiter(Limits{Connections: 100}, false)
	now := time.Unix(1e9, 0)
	most := 0
	for uid := range uint32(100_000) {
		if u, _, ok := l.connect(origin{uid: uid}, now); ok {
			l.disconnect(u)
		}
		most = max(most, len(l.users))
		now = now.Add(time.Millisecond)
	}
	if most > 2*100 {
		t.Errorf("knew %d users at a time", most)
	}
	if len(l.users) == 0 || l.refused != 0 {
		t.Errorf("%d users, %d refused connections after all have gone", len(l.users), l.refused)
	}
}

func TestAttestationSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(Limits{Attestations: 3, AttestationsPerUID: 2}, false)
		a, _, _ := l.connect(origin{uid: 1}, time.Now())
		b, _, _ := l.connect(origin{uid: 2}, time.Now())
		begin := func(u *user, say string) (end func()) {
			t.Helper()
			end, err := l.beginAttestation(t.Context(), u)
			if say == "" {
				must(t, err)
				return end
			}
			wantCode(t, err, codes.ResourceExhausted, say)
			return nil
		}
		first, second := begin(a, ""), begin(a, "")
		start := time.Now()
		begin(a, "2 callers of uid 1")
		if waited := time.Since(start); waited != attestationWait {
			t.Errorf("waited %s for a slot", waited)
		}
		third := begin(b, "")
		begin(b, "3 callers are being attested")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(attestationWait/2, cancel)
		if _, err := l.beginAttestation(ctx, b); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v for a caller that went away", err)
		}
		waiting := make(chan func())
		go func() { waiting <- begin(a, "") }()
		synctest.Wait()
		first()
		(<-waiting)()
		second()
		third()
		if len(l.attestations)+len(a.attestations)+len(b.attestations) != 0 {
			t.Error("slots are left taken")
		}
	})
}

func TestLogIsBounded(t *testing.T) {
	l := newLimiter(Limits{}, false)
	now := time.Unix(1e9, 0)
	u, _, _ := l.connect(origin{uid: 1}, now)
	lines := 0
	for range 1000 {
		if _, ok := l.mayLog(u, now); ok {
			lines++
		}
	}
	if lines != logBurst {
		t.Errorf("%d lines at once", lines)
	}
	if muted, ok := l.mayLog(u, now.Add(time.Second)); !ok || muted != 1000-logBurst {
		t.Errorf("a second later: %d muted, %t", muted, ok)
	}
}

func TestDenialsAreNotRepeated(t *testing.T) {
	l := newLimiter(Limits{}, false)
	start := time.Unix(1e9, 0)
	u, _, _ := l.connect(origin{uid: 1}, start)
	tests := []struct {
		after time.Duration
		same  uint64
		muted int
		ok    bool
	}{
		{0, 1, 0, true},
		{3 * time.Second, 1, 0, false},
		{4 * time.Second, 2, 0, true}, // another one
		{59 * time.Second, 1, 0, false},
		{60 * time.Second, 1, 2, true},
		{61 * time.Second, 1, 0, false},
		{time.Hour, 1, 1, true},
	}
	for _, tt := range tests {
		if muted, ok := l.mayTell(u, tt.same, start.Add(tt.after)); muted != tt.muted || ok != tt.ok {
			t.Errorf("denial %d after %s: %d, %t; want %d, %t", tt.same, tt.after, muted, ok, tt.muted, tt.ok)
		}
	}
	for same := range uint64(2 * maxDenials) {
		l.mayTell(u, same, start.Add(2*time.Hour))
	}
	if len(u.denials) != maxDenials {
		t.Errorf("%d denials are kept, want %d", len(u.denials), maxDenials)
	}
	if left := u.denied(start.Add(3 * time.Hour)); left != 0 {
		t.Errorf("%d denials that ended long ago are kept", left)
	}
}

// The caller reads why it is refused, and those that were there are served on.
func TestTooManyConnections(t *testing.T) {
	f := serve(t, func(c *Config) { c.Limits = Limits{Connections: 2, ConnectionsPerUID: 1} })
	f.register(f.entry("a", "/a"))
	first := f.fetch(testContext(t))
	_, err := first.Recv()
	must(t, err)
	_, err = f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.ResourceExhausted, "holds 1 connections to the agent")
	f.sign(time.Hour)
	if _, err := first.Recv(); err != nil {
		t.Error(err)
	}
}

func TestFloodOfConnections(t *testing.T) {
	f := serve(t, func(c *Config) { c.Limits = Limits{Connections: 8} })
	const surplus = 20
	var held []net.Conn
	var readers sync.WaitGroup
	hungUp := make(chan struct{}, 8+maxRefused+surplus)
	for range cap(hungUp) {
		c, err := net.Dial("unix", f.socket)
		must(t, err)
		held = append(held, c)
		readers.Go(func() {
			_, _ = io.Copy(io.Discard, c)
			hungUp <- struct{}{}
		})
	}
	// The limits leave room for 72 at most; the rest is hung up on.
	for range surplus {
		must(t, waitFor(testContext(t), hungUp))
	}
	for _, c := range held {
		must(t, c.Close())
	}
	readers.Wait()
	eventually(t, "all connections are forgotten", func() bool {
		f.server.limits.mu.Lock()
		defer f.server.limits.mu.Unlock()
		return f.server.limits.connections.taken == 0 && f.server.limits.refused == 0
	})
	f.register(f.entry("a", "/a"))
	if _, err := f.fetch(testContext(t)).Recv(); err != nil {
		t.Errorf("after the flood: %v", err)
	}
}

func TestTooManyRequests(t *testing.T) {
	f := serve(t, func(c *Config) { c.Limits = Limits{RequestsPerSecond: 1, Burst: 5} })
	f.register(f.entry("a", "/a"))
	client := workload.NewSpiffeWorkloadAPIClient(f.dial())
	for {
		stream, err := client.FetchX509SVID(withHeader(testContext(t)), &workload.X509SVIDRequest{})
		must(t, err)
		if _, err = stream.Recv(); err != nil {
			wantCode(t, err, codes.ResourceExhausted, "more than 1 times a second")
			break
		}
	}
	if n := f.counter("narthex_workload_api_requests_total", "FetchX509SVID", "ResourceExhausted"); n < 1 {
		t.Errorf("counted %v refused calls", n)
	}
}

// headersOnly opens calls of a method and sends no request.
func headersOnly(tb testing.TB, socket, method string, calls, padding int) net.Conn {
	tb.Helper()
	var hello bytes.Buffer
	hello.WriteString(http2.ClientPreface)
	framer := http2.NewFramer(&hello, nil)
	must(tb, framer.WriteSettings())
	for i := range calls {
		must(tb, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(1 + 2*i), BlockFragment: callHeaders(tb, method, padding), EndHeaders: true}))
	}
	c, err := net.Dial("unix", socket)
	must(tb, err)
	tb.Cleanup(func() { _ = c.Close() })
	must(tb, c.SetDeadline(time.Now().Add(patience)))
	_, err = c.Write(hello.Bytes())
	must(tb, err)
	return c
}

// readUntil returns the next frame that is wanted.
func readUntil(tb testing.TB, c net.Conn, wanted func(http2.Frame) bool) http2.Frame {
	tb.Helper()
	framer := http2.NewFramer(nil, c)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		frame, err := framer.ReadFrame()
		must(tb, err)
		if wanted(frame) {
			return frame
		}
	}
}

// isStatus tells whether a frame ends a call with this code.
func isStatus(code codes.Code) func(http2.Frame) bool {
	return func(f http2.Frame) bool {
		headers, ok := f.(*http2.MetaHeadersFrame)
		return ok && slices.ContainsFunc(headers.Fields, func(h hpack.HeaderField) bool {
			return h.Name == "grpc-status" && h.Value == strconv.Itoa(int(code))
		})
	}
}

// Calls count from their headers on, whatever the method, and whether or not
// a request ever comes.
func TestTooManyStreams(t *testing.T) {
	for _, method := range []string{
		workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName,
		workload.SpiffeWorkloadAPI_FetchJWTSVID_FullMethodName,
		grpc_health_v1.Health_Check_FullMethodName,
		rpb.ServerReflection_ServerReflectionInfo_FullMethodName,
	} {
		t.Run(path.Base(method), func(t *testing.T) {
			f := serve(t, func(c *Config) { c.Limits = Limits{StreamsPerUID: 3} })
			f.register(f.entry("a", "/a"))
			c := headersOnly(t, f.socket, method, 4, 0)
			readUntil(t, c, isStatus(codes.ResourceExhausted))
			_, err := f.fetch(testContext(t)).Recv()
			wantCode(t, err, codes.ResourceExhausted, "holds 3 calls to the agent open")
			must(t, c.Close())
			eventually(t, "the calls are forgotten", func() bool {
				f.server.limits.mu.Lock()
				defer f.server.limits.mu.Unlock()
				return f.server.limits.streams.taken == 0
			})
			if _, err := f.fetch(testContext(t)).Recv(); err != nil {
				t.Errorf("after the flood: %v", err)
			}
		})
	}
}

func TestRequestThatNeverComes(t *testing.T) {
	f := serve(t, func(c *Config) { c.Limits = Limits{FirstMessage: 500 * time.Millisecond} })
	for _, method := range []string{workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName, grpc_health_v1.Health_Check_FullMethodName} {
		readUntil(t, headersOnly(t, f.socket, method, 1, 0), isStatus(codes.DeadlineExceeded))
	}
	// A call that was opened properly stays.
	f.register(f.entry("a", "/a"))
	stream := f.fetch(testContext(t))
	_, err := stream.Recv()
	must(t, err)
	readUntil(t, headersOnly(t, f.socket, workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName, 1, 0), isStatus(codes.DeadlineExceeded))
	f.sign(time.Hour)
	if _, err := stream.Recv(); err != nil {
		t.Error(err)
	}
}

// A client that writes and never reads is hung up on.
func TestAnswersThatAreNotRead(t *testing.T) {
	f := serve(t, func(c *Config) { c.Limits = Limits{Unread: 50 * time.Millisecond} })
	c := headersOnly(t, f.socket, workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName, 1, 0)
	framer := http2.NewFramer(c, nil)
	var err error
	for err == nil {
		err = framer.WritePing(false, [8]byte{})
	}
	if !isReset(err) {
		t.Errorf("the server did not hang up: %v", err)
	}
}

// flowControlled makes as many calls of a method as a connection may have, of a
// client that reads what comes and by its window takes no byte of an answer.
func flowControlled(tb testing.TB, socket, method string, request []byte) net.Conn {
	tb.Helper()
	var hello bytes.Buffer
	hello.WriteString(http2.ClientPreface)
	framer := http2.NewFramer(&hello, nil)
	must(tb, framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
	message := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request))), request...)
	for id := uint32(1); id < 2*unreadCalls; id += 2 {
		must(tb, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: callHeaders(tb, method, 0), EndHeaders: true}))
		must(tb, framer.WriteData(id, true, message))
	}
	c, err := net.Dial("unix", socket)
	must(tb, err)
	tb.Cleanup(func() { _ = c.Close() })
	must(tb, c.SetDeadline(time.Now().Add(patience)))
	_, err = c.Write(hello.Bytes())
	must(tb, err)
	return c
}

const unreadCalls = 32

// counts returns how many calls are counted, and how many bytes of answers.
func (l *limiter) counts(uid int) (calls, unread int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u := l.users[origin{uid: uint32(uid)}]; u != nil {
		unread = u.unread
	}
	return l.streams.taken, unread
}

// Calls that have ended count until their answers are taken, and a client whose
// window says that it takes none is hung up on.
func TestAnswersThatAreNotTaken(t *testing.T) {
	f := serve(t, func(c *Config) { c.Limits = Limits{Unread: 500 * time.Millisecond} })
	c := flowControlled(t, f.socket, grpc_health_v1.Health_Check_FullMethodName, nil)
	eventually(t, "all calls count", func() bool { calls, _ := f.server.limits.counts(os.Geteuid()); return calls == unreadCalls })
	if _, err := io.Copy(io.Discard, c); err != nil && !isReset(err) {
		t.Errorf("the server did not hang up: %v", err)
	}
	eventually(t, "nothing is left", func() bool {
		calls, unread := f.server.limits.counts(os.Geteuid())
		return calls == 0 && unread == 0
	})
}

// What a user's answers hold is bounded in bytes too, however long they are.
func TestLongAnswersThatAreNotTaken(t *testing.T) {
	const most = 1 << 20
	f := serve(t, func(c *Config) { c.Limits = Limits{UnreadBytes: most} })
	request, err := proto.Marshal(&rpb.ServerReflectionRequest{MessageRequest: &rpb.ServerReflectionRequest_FileContainingSymbol{
		FileContainingSymbol: secretservice.SecretDiscoveryService_ServiceDesc.ServiceName, // more than pooled
	}})
	must(t, err)
	c := flowControlled(t, f.socket, rpb.ServerReflection_ServerReflectionInfo_FullMethodName, request)
	readUntil(t, c, isStatus(codes.ResourceExhausted))
	if _, unread := f.server.limits.counts(os.Geteuid()); unread > most || unread < most/2 {
		t.Errorf("%d bytes are held, of %d", unread, most)
	}
	must(t, c.Close())
	eventually(t, "nothing is left", func() bool {
		calls, unread := f.server.limits.counts(os.Geteuid())
		return calls == 0 && unread == 0
	})
	if _, err := grpc_health_v1.NewHealthClient(f.dial()).Check(testContext(t), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Errorf("after the flood: %v", err)
	}
}

// Headers are held for as long as a call, and so are small.
func TestLargeHeaders(t *testing.T) {
	f := serve(t)
	c := headersOnly(t, f.socket, workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName, 1, maxHeaders)
	readUntil(t, c, func(f http2.Frame) bool { return f.Header().Type == http2.FrameRSTStream })
	if n := f.server.Streams(); n != 0 {
		t.Errorf("%d streams are open", n)
	}
}

// One stream of reflection may ask no more often than as many calls.
func TestReflectionIsLimited(t *testing.T) {
	f := serve(t, func(c *Config) { c.Limits = Limits{RequestsPerSecond: 1, Burst: 10} })
	stream, err := rpb.NewServerReflectionClient(f.dial()).ServerReflectionInfo(testContext(t))
	must(t, err)
	answers := 0
	for ; ; answers++ {
		// Where the stream has ended, Recv tells why.
		_ = stream.Send(&rpb.ServerReflectionRequest{MessageRequest: &rpb.ServerReflectionRequest_ListServices{}})
		if _, err = stream.Recv(); err != nil {
			break
		}
		if answers > 1000 {
			t.Fatal("the stream is not limited")
		}
	}
	wantCode(t, err, codes.ResourceExhausted, "more than 1 times a second")
	if answers < 5 {
		t.Errorf("%d answers of a burst of 10", answers)
	}
}

// stuck is an attestor that takes its time.
type stuck struct{ entered chan struct{} }

func (stuck) Type() string { return "stuck" }
func (s stuck) Attest(ctx context.Context, _ *attestor.Process) ([]attestor.Selector, error) {
	s.entered <- struct{}{}
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestTooManyAttestations(t *testing.T) {
	attestations := stuck{make(chan struct{}, 1)}
	f := serve(t, func(c *Config) {
		c.Attestors = []attestor.Workload{attestations}
		c.Limits = Limits{AttestationsPerUID: 1}
	})
	first := f.fetch(testContext(t))
	<-attestations.entered
	_, err := f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.ResourceExhausted, "are being attested")
	// An attestation in progress does not hold the end up.
	must(t, f.stop())
	_, err = first.Recv()
	wantCode(t, err, codes.Unavailable)
}

// An attestor that hangs holds up neither its caller nor the next one.
func TestAttestationThatHangs(t *testing.T) {
	attestations := stuck{make(chan struct{}, 2)}
	f := serve(t, func(c *Config) {
		c.Attestors = []attestor.Workload{attestations}
		c.Limits = Limits{AttestationsPerUID: 1, AttestationTime: 20 * time.Millisecond}
	})
	for range 2 {
		_, err := f.fetch(testContext(t)).Recv()
		wantCode(t, err, codes.Unavailable, "workload attestation failed")
	}
}

// A client may send what it likes: the connection ends, the server does not.
func TestStrangers(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	for _, send := range []string{
		"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		preface + "\xff\xff\xff\x00\x00\x00\x00\x00\x00",
		preface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + "\x00\xff\xff\x01\x04\x00\x00\x00\x01garbage",
	} {
		c, err := net.Dial("unix", f.socket)
		must(t, err)
		_, err = io.WriteString(c, send)
		must(t, err)
		must(t, c.(*net.UnixConn).CloseWrite())
		must(t, c.SetReadDeadline(time.Now().Add(patience)))
		if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, net.ErrClosed) && !isReset(err) {
			t.Errorf("%q: the server did not hang up: %v", send, err)
		}
		must(t, c.Close())
	}
	if _, err := f.fetch(testContext(t)).Recv(); err != nil {
		t.Errorf("after the strangers: %v", err)
	}
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
