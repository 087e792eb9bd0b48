package extauthz

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

const patience = 30 * time.Second

// stand is a set of services that runs, with rules that a test writes.
type stand struct {
	*Set
	t    *testing.T
	ca   *testca.Authority
	held *identity.Held
	stop func()

	mu     sync.Mutex // guards the following
	status int
	barred string
	asked  []policy.Request
}

func newStand(t *testing.T, services ...Service) *stand {
	t.Helper()
	s := &stand{t: t, ca: testca.New(t, "example.org"), held: identity.NewHeld("test")}
	s.present("/narthex", s.ca)
	s.Set = New(Config{
		Identities: s.held,
		Ask: func(q *policy.Request, _ bool, r *telemetry.Access) (int, string) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.asked = append(s.asked, *q)
			r.Decision = "allow"
			return s.status, ""
		},
		Bars: func(policy.Peer) string {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.barred
		},
	})
	s.change(services...)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	s.stop = func() { cancel(); running.Wait() }
	t.Cleanup(s.stop)
	return s
}

func (s *stand) present(path string, as ...*testca.Authority) {
	s.t.Helper()
	if err := s.held.Set([]identity.SVID{{Certificate: s.ca.SVID(path)}}, testca.Bundles(as...)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stand) change(services ...Service) {
	s.t.Helper()
	change, err := s.Plan(services)
	if err != nil {
		s.t.Fatal(err)
	}
	change.Commit()
}

func (s *stand) set(status int, barred string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status, s.barred = status, barred
}

// dial connects as whoever has the certificate; nil: over the Unix socket.
func (s *stand) dial(name string, cert *tls.Certificate) *grpc.ClientConn {
	s.t.Helper()
	creds, target := insecure.NewCredentials(), "passthrough:///"+s.Addr(name).String()
	if cert != nil {
		creds = credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{*cert}, InsecureSkipVerify: true})
	} else {
		target = "unix:" + s.Addr(name).String()
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(1<<24)))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// check asks and returns the status of the answer, 200 where the request may go
// on, or of the call.
func (s *stand) check(conn *grpc.ClientConn, edits ...func(*auth.AttributeContext)) (int, codes.Code) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	answer, err := auth.NewAuthorizationClient(conn).Check(ctx, envoys(edits...))
	if err != nil {
		return 0, status.Code(err)
	}
	if answer.GetOkResponse() != nil {
		return 200, codes.OK
	}
	return int(answer.GetDeniedResponse().GetStatus().GetCode()), codes.OK
}

func (s *stand) wants(conn *grpc.ClientConn, want int, code codes.Code) {
	s.t.Helper()
	if got, have := s.check(conn); got != want || have != code {
		s.t.Errorf("got %d, %s, want %d, %s", got, have, want, code)
	}
}

func onSocket(t *testing.T, name string) Service {
	t.Helper()
	dir, err := os.MkdirTemp("", "authz") // t.TempDir has names that are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return Service{Name: name, Bind: "unix:" + filepath.Join(dir, "a.sock")}
}

func patterns(t *testing.T, ids ...string) (out []policy.Pattern) {
	t.Helper()
	for _, id := range ids {
		p, err := policy.ParsePattern(id)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func overTLS(t *testing.T, clients ...string) Service {
	t.Helper()
	return Service{Name: "gateway", Bind: "127.0.0.1:0", Clients: patterns(t, clients...)}
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	at := onSocket(t, "envoy")
	s := newStand(t, at)
	conn := s.dial("envoy", nil)
	s.wants(conn, 200, codes.OK)
	if q := s.asked[0]; q.Listener != "envoy" || q.From.ID.String() != web || q.To.ID.String() != orders || q.Time.IsZero() {
		t.Errorf("asked %+v", q)
	}
	s.set(403, "")
	s.wants(conn, 403, codes.OK)
	if got, _ := s.check(conn, path("/v1/../x")); got != 400 || len(s.asked) != 2 {
		t.Errorf("got %d, and the rules were asked %d times", got, len(s.asked))
	}
	path := strings.TrimPrefix(at.Bind, "unix:")
	mode := func(want os.FileMode) {
		t.Helper()
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("mode %v, %v, want %o", info.Mode(), err, want)
		}
	}
	mode(0o660)
	at.UnixMode, at.Name = 0o600, "other"
	s.change(at)
	mode(0o600)
	s.wants(conn, 403, codes.OK) // the same connection, by its new name
	if q := s.asked[len(s.asked)-1]; q.Listener != "other" {
		t.Errorf("asked at %s", q.Listener)
	}
	if st := s.Status(); len(st) != 1 || st[0].Checks != 4 || st[0].Denied != 3 || st[0].Active != 1 {
		t.Errorf("status %+v", st)
	}
	s.change()
	s.wants(conn, 0, codes.Unavailable)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket of a removed service: %v", err)
	}
}

func TestMutualTLS(t *testing.T) {
	t.Parallel()
	const gateway = "spiffe://example.org/ns/istio/sa/gateway"
	s := newStand(t, overTLS(t, "spiffe://example.org/ns/*/sa/gateway"))
	cert := s.ca.SVID("/ns/istio/sa/gateway")
	conn := s.dial("gateway", &cert)
	s.wants(conn, 200, codes.OK)

	s.set(0, "revoked")
	s.wants(conn, 0, codes.Unauthenticated)
	s.set(0, "")
	s.wants(conn, 200, codes.OK)

	s.change(overTLS(t, "spiffe://example.org/other"))
	s.wants(conn, 0, codes.Unauthenticated)
	s.change(overTLS(t, gateway))
	s.wants(conn, 200, codes.OK)

	other := testca.New(t, "example.org")
	s.present("/narthex", other) // the client's authority was withdrawn
	s.wants(conn, 0, codes.Unauthenticated)
	s.present("/narthex", s.ca)
	s.wants(conn, 200, codes.OK)
}

func TestStrangers(t *testing.T) {
	t.Parallel()
	s := newStand(t, overTLS(t, "spiffe://example.org/gateway"))
	other := testca.New(t, "example.org")
	for name, cert := range map[string]tls.Certificate{
		"nobody":              {},
		"none of clients":     s.ca.SVID("/web"),
		"another authority":   other.SVID("/gateway"),
		"expired":             s.ca.SVID("/gateway", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
		"without a SPIFFE ID": s.ca.SVID("/gateway", func(c *x509.Certificate) { c.URIs = nil }),
	} {
		t.Run(name, func(t *testing.T) {
			s.wants(s.dial("gateway", &cert), 0, codes.Unavailable)
		})
	}
	t.Run("in plaintext", func(t *testing.T) {
		conn, err := grpc.NewClient("passthrough:///"+s.Addr("gateway").String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		s.wants(conn, 0, codes.Unavailable)
	})
	if len(s.asked) > 0 {
		t.Errorf("the rules were asked: %+v", s.asked)
	}
}

// TestClientExpires holds a connection beyond the end of its client's SVID.
func TestClientExpires(t *testing.T) {
	t.Parallel()
	s := newStand(t, overTLS(t, "spiffe://example.org/gateway"))
	v := s.sorted()[0]
	chain := []*x509.Certificate{s.ca.SVID("/gateway").Leaf}
	set := v.settings.Load()
	id, err := set.lease.Trust().Verify(chain, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	standing, err := set.lease.Trust().Stand(id, chain, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c := &client{peer: policy.PeerOf(id, chain[0]), standing: standing}
	if err := c.stands(set, chain[0].NotAfter); err != nil {
		t.Error(err)
	}
	if err := c.stands(set, chain[0].NotAfter.Add(time.Second)); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("after its end: %v", err)
	}
}

func TestWithoutIdentity(t *testing.T) {
	t.Parallel()
	s := newStand(t, overTLS(t, "spiffe://example.org/gateway"))
	s.held.Withdraw(errors.New("taken back"))
	cert := s.ca.SVID("/gateway")
	s.wants(s.dial("gateway", &cert), 0, codes.Unavailable)
	if st := s.Status(); st[0].Problem == "" {
		t.Errorf("no problem in %+v", st)
	}
}

func TestCallsThatAreNot(t *testing.T) {
	t.Parallel()
	s := newStand(t, onSocket(t, "envoy"))
	conn := s.dial("envoy", nil)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for service, want := range map[string]codes.Code{"": codes.OK, "envoy.service.auth.v3.Authorization": codes.OK, "x": codes.NotFound} {
		if _, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service}); status.Code(err) != want {
			t.Errorf("health of %q: %v", service, err)
		}
	}
	stream, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unimplemented {
		t.Errorf("reflection: %v", err)
	}
	large := func(a *auth.AttributeContext) { a.Request.Http.Body = strings.Repeat("a", maxMessage) }
	if _, code := s.check(conn, large); code != codes.ResourceExhausted {
		t.Errorf("a large question: %s", code)
	}
	s.wants(conn, 200, codes.OK)
}

func TestPlanRefuses(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	one := onSocket(t, "one")
	for name, services := range map[string][]Service{
		"no name":        {{Bind: one.Bind}},
		"no clients":     {{Name: "a", Bind: "127.0.0.1:0"}},
		"useless":        {{Name: "a", Bind: one.Bind, Clients: patterns(t, web)}},
		"strange mode":   {{Name: "a", Bind: one.Bind, UnixMode: 0o1777}},
		"twice":          {one, {Name: "two", Bind: one.Bind}},
		"taken":          {one, {Name: "a", Bind: taken.Addr().String(), Clients: patterns(t, web)}},
		"no such folder": {one, {Name: "a", Bind: "unix:/no/such/folder/a.sock"}},
	} {
		t.Run(name, func(t *testing.T) {
			set := New(Config{Identities: identity.NewHeld("test")})
			if _, err := set.Plan(services); err == nil {
				t.Fatal("is planned")
			} else if !strings.HasPrefix(err.Error(), "ext_authz: ") {
				t.Error(err)
			}
			if _, err := os.Stat(strings.TrimPrefix(one.Bind, "unix:")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a socket is left: %v", err)
			}
		})
	}
}

// TestRefusedPlan holds that what is in force stays so when a plan fails or is
// undone.
func TestRefusedPlan(t *testing.T) {
	t.Parallel()
	one, two := onSocket(t, "one"), onSocket(t, "two")
	s := newStand(t, one)
	conn := s.dial("one", nil)
	change, err := s.Plan([]Service{two})
	if err != nil {
		t.Fatal(err)
	}
	change.Undo()
	if _, err := s.Plan([]Service{two, {Name: "x"}}); err == nil {
		t.Fatal("a service without a place is planned")
	}
	s.wants(conn, 200, codes.OK)
	s.change(one, two)
	s.wants(s.dial("two", nil), 200, codes.OK)
}

func TestDrain(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	at := onSocket(t, "envoy")
	s := newStand(t, at)
	conn := s.dial("envoy", nil)
	s.wants(conn, 200, codes.OK)
	s.stop()
	s.wants(conn, 0, codes.Unavailable)
	if _, err := os.Stat(strings.TrimPrefix(at.Bind, "unix:")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if err := s.Run(t.Context()); !errors.Is(err, ErrStopped) {
		t.Errorf("run again: %v", err)
	}
	change, err := s.Plan([]Service{at})
	if err != nil {
		t.Fatal(err)
	}
	change.Commit()
	if st := s.Status(); st[0].Problem != "draining" {
		t.Errorf("status %+v", st)
	}
	_ = conn.Close()
}

// TestHandedOver passes a socket from one set to the next, while the first
// still answers whom it has.
func TestHandedOver(t *testing.T) {
	t.Parallel()
	at := onSocket(t, "envoy")
	old := newStand(t, at)
	first := old.dial("envoy", nil)
	old.wants(first, 200, codes.OK)
	given := old.Sockets()[0]
	if !given.Owned || given.Name != "envoy" {
		t.Errorf("offered %+v", given)
	}
	file, err := given.Listener.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	next := New(Config{
		Ask:  func(*policy.Request, bool, *telemetry.Access) (int, string) { return 0, "" },
		Bars: func(policy.Peer) string { return "" },
		Sockets: func(string, string) net.Listener {
			l, err := net.FileListener(file)
			if err != nil {
				t.Error(err)
			}
			return l
		},
	})
	change, err := next.Plan([]Service{at})
	if err != nil {
		t.Fatal(err)
	}
	change.Commit()
	next.OwnPaths([]string{"envoy"})
	old.LeavePaths([]string{"envoy"})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = next.Run(ctx) })
	old.stop()
	path := strings.TrimPrefix(at.Bind, "unix:")
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the old one has removed the socket: %v", err)
	}
	old.wants(first, 200, codes.OK) // connects anew, to the next one
	cancel()
	running.Wait()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// TestPlaces holds the bound of connections.
func TestPlaces(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &places{Listener: l, free: make(chan struct{}, 1), closed: make(chan struct{})}
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	dial()
	dial()
	first, err := p.Accept()
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error)
	go func() {
		c, err := p.Accept()
		if err == nil {
			err = c.Close()
		}
		second <- err
	}()
	select {
	case err := <-second:
		t.Fatalf("accepted beyond the bound: %v", err)
	default:
	}
	_ = first.Close()
	_ = first.Close() // gives its place back once
	if err := <-second; err != nil {
		t.Fatal(err)
	}
	if len(p.free) != 0 || p.live.Load() != 0 {
		t.Errorf("%d places are taken, %d live", len(p.free), p.live.Load())
	}
	p.free <- struct{}{}
	go func() {
		_, err := p.Accept()
		second <- err
	}()
	_ = p.Close()
	if err := <-second; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept of a closed one: %v", err)
	}
}
