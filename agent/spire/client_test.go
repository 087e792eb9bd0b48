package spire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestNewRefuses(t *testing.T) {
	for _, address := range []string{"", "spire", "spire:", ":8081", "a:b:c"} {
		if _, err := New(Config{Address: address, TrustDomain: exampleOrg}); err == nil {
			t.Errorf("address %q: no error", address)
		}
	}
	if _, err := New(Config{Address: "spire:8081"}); err == nil {
		t.Error("no trust domain: no error")
	}
}

// The table is of servers a client must not talk to, and of what it says.
func TestHandshake(t *testing.T) {
	pq := func(c *Client) { c.requirePQKEM = true }
	tests := []struct {
		name   string
		server func(*server)
		client func(*Client)
		want   error  // nil: the call passes, unless text is set
		text   string // part of the error
	}{
		{name: "ours"},
		{name: "TLS 1.2", server: func(s *server) { s.tls = func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 } }},
		{name: "TLS 1.1", server: func(s *server) {
			s.tls = func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }
		}, want: ErrUnreachable, text: "protocol version"},
		{
			name: "other trust domain", server: func(s *server) { s.id = "spiffe://other.org/spire/server" },
			want: ErrWrongServer, text: "it is spiffe://other.org/spire/server, want spiffe://example.org/spire/server",
		},
		{name: "a workload", server: func(s *server) { s.id = "spiffe://example.org/web" }, want: ErrWrongServer},
		{name: "no SPIFFE ID", server: func(s *server) { s.id = "https://example.org/" }, want: ErrWrongServer},
		{name: "two URI SANs", server: func(s *server) { s.moreIDs = []string{"spiffe://example.org/x"} }, want: ErrWrongServer},
		{name: "unknown authority", client: func(c *Client) { c.SetRoots(newAuthority(t).roots()) }, want: ErrUnknownAuthority},
		{name: "no roots", client: func(c *Client) { c.SetRoots(nil) }, text: "no X.509 authority"},
		{name: "expired", server: func(s *server) { s.expired = true }, text: "this host's clock says"},
		{name: "post-quantum", client: pq},
		{name: "no post-quantum", server: func(s *server) {
			s.tls = func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }
		}, client: pq, want: ErrNoPQKEM},
		{name: "no post-quantum, TLS 1.2", server: func(s *server) {
			s.tls = func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }
		}, client: pq, want: ErrNoPQKEM},
		{name: "refuses our certificate", server: func(s *server) {
			s.tls = func(c *tls.Config) {
				c.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { return errors.New("no") }
			}
		}, want: ErrIdentityRefused},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(t)
			if test.server != nil {
				test.server(s)
			}
			s.start(t)
			c := s.client(t)
			if test.client != nil {
				test.client(c)
			}
			err := c.PostStatus(t.Context(), "1")
			if test.want == nil && test.text == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
				t.Fatalf("got %v, want %v with %q", err, test.want, test.text)
			}
			if !strings.HasPrefix(err.Error(), "post agent status: server "+s.addr+": ") {
				t.Errorf("error without step and address: %v", err)
			}
			if strings.Contains(err.Error(), "desc = ") {
				t.Errorf("error with gRPC's wrapping: %v", err)
			}
			if test.name != "no roots" && Advice(err) == "" {
				t.Errorf("no advice for %v", err)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	s := newServer(t).start(t)
	c := s.client(t)
	if err := c.PostStatus(t.Context(), "1"); err != nil {
		t.Fatal(err)
	}
	s.stop()
	err := c.PostStatus(t.Context(), "1")
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), s.addr) {
		t.Fatalf("got %v, want %v", err, ErrUnreachable)
	}
	if !strings.Contains(Advice(err), "agent.server.address") {
		t.Errorf("advice %q", Advice(err))
	}

	// The server is back: the next call is an attempt of its own and does
	// not wait for gRPC's backoff.
	again := newServer(t)
	again.ca, again.addr = s.ca, s.addr
	again.start(t)
	if err := c.PostStatus(t.Context(), "1"); err != nil {
		t.Fatal(err)
	}
}

func TestNameDoesNotResolve(t *testing.T) {
	c, err := New(Config{Address: "spire..server:8081", TrustDomain: exampleOrg}) // no query goes out for it
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ca := newAuthority(t)
	c.SetRoots(ca.roots())
	c.SetIdentity(ca.identity(t, agentID))
	if err := c.PostStatus(t.Context(), "1"); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "lookup spire..server") {
		t.Errorf("got %v, want %v and the lookup's error", err, ErrUnreachable)
	}
}

func TestNoAnswer(t *testing.T) {
	g := newGate()
	s := newServer(t)
	s.status = g.pass
	s.start(t)
	c := s.client(t)
	c.callTimeout = time.Second // in which the call arrives, however busy the machine
	if err := c.PostStatus(t.Context(), "1"); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "no answer in time") {
		t.Errorf("got %v, want %v", err, ErrUnreachable)
	}

	c.callTimeout = callTimeout
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the caller's own reason")
	<-g.arrived
	failed := make(chan error)
	go func() { failed <- c.PostStatus(ctx, "1") }()
	<-g.arrived
	cancel(reason)
	if err := <-failed; !errors.Is(err, reason) || errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v, want %v", err, reason)
	}
}

// A server that accepts and says nothing more is no server either.
func TestMute(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	c, err := New(Config{Address: listener.Addr().String(), TrustDomain: exampleOrg})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.callTimeout = 50 * time.Millisecond
	ca := newAuthority(t)
	c.SetRoots(ca.roots())
	c.SetIdentity(ca.identity(t, agentID))
	if err := c.PostStatus(t.Context(), "1"); !errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v, want %v", err, ErrUnreachable)
	}
}

func TestNoIdentity(t *testing.T) {
	s := newServer(t).start(t)
	c := s.bareClient(t)
	if _, err := c.Bundle(t.Context()); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("got %v, want %v", err, ErrNoIdentity)
	}
	c.SetIdentity(&Identity{Chain: [][]byte{{1}}, Key: newKey(t)})
	if _, err := c.Bundle(t.Context()); err == nil || !strings.Contains(err.Error(), "own SVID") {
		t.Errorf("broken SVID: got %v", err)
	}
}

func TestClose(t *testing.T) {
	g := newGate()
	s := newServer(t)
	s.status = g.pass
	s.start(t)
	c := s.client(t)
	failed := make(chan error)
	go func() { failed <- c.PostStatus(t.Context(), "1") }()
	<-g.arrived
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errors.Is(err, ErrClosed) {
		t.Errorf("call under way: got %v, want %v", err, ErrClosed)
	}
	if err := c.PostStatus(t.Context(), "1"); !errors.Is(err, ErrClosed) {
		t.Errorf("later call: got %v, want %v", err, ErrClosed)
	}
	if _, err := c.Attest(t.Context(), Trust{Insecure: true}, token{}, newCSR(t, newKey(t))); !errors.Is(err, ErrClosed) {
		t.Errorf("later attestation: got %v, want %v", err, ErrClosed)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// A call under way ends on the connection of the identity it began with; the
// connection ends after it, and not before.
func TestIdentityChanges(t *testing.T) {
	g := newGate()
	serials := make(chan int64, 10)
	s := newServer(t)
	s.status = func(ctx context.Context) error {
		serials <- callerSerial(ctx)
		return g.pass(ctx)
	}
	s.start(t)
	c := s.bareClient(t)
	c.SetRoots(s.ca.roots())
	old, next := s.ca.identity(t, agentID), s.ca.identity(t, agentID)

	c.SetIdentity(old)
	first, second := make(chan error), make(chan error)
	go func() { first <- c.PostStatus(t.Context(), "1") }()
	<-g.arrived
	c.SetIdentity(next)
	go func() { second <- c.PostStatus(t.Context(), "1") }()
	<-g.arrived
	if a, b := <-serials, <-serials; a == b {
		t.Errorf("both calls presented serial %d", a)
	}
	select {
	case <-s.ended:
		t.Error("connection of the old identity ended below its call")
	default:
	}

	g.release()
	if err := <-first; err != nil {
		t.Errorf("call under way: %v", err)
	}
	if err := <-second; err != nil {
		t.Errorf("next call: %v", err)
	}
	<-s.ended // or the test times out

	// The same SVID again is no change, and no identity ends the connection.
	c.SetIdentity(&Identity{Chain: next.Chain, Key: next.Key})
	if err := c.PostStatus(t.Context(), "1"); err != nil {
		t.Fatal(err)
	}
	if n := s.begun.Load(); n != 2 {
		t.Errorf("%d handshakes, want 2", n)
	}
	c.SetIdentity(nil)
	<-s.ended
	if err := c.PostStatus(t.Context(), "1"); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("got %v, want %v", err, ErrNoIdentity)
	}
}

// Each connection is a handshake of its own, though the server hands out
// tickets, and each is verified against the roots of its moment.
func TestNoResumption(t *testing.T) {
	for name, version := range map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.tls = func(c *tls.Config) { c.MaxVersion = version }
			s.start(t)
			c := s.client(t)
			for range 3 {
				c.SetIdentity(s.ca.identity(t, agentID))
				if err := c.PostStatus(t.Context(), "1"); err != nil {
					t.Fatal(err)
				}
			}
			if begun, resumed := s.begun.Load(), s.resumed.Load(); begun != 3 || resumed != 0 {
				t.Errorf("%d handshakes, %d of them resumed; want 3 and 0", begun, resumed)
			}

			// A connection that is up goes on when roots change, the next
			// one is held against the new.
			c.SetRoots(newAuthority(t).roots())
			if err := c.PostStatus(t.Context(), "1"); err != nil {
				t.Errorf("on the connection that is up: %v", err)
			}
			c.SetIdentity(s.ca.identity(t, agentID))
			if err := c.PostStatus(t.Context(), "1"); !errors.Is(err, ErrUnknownAuthority) {
				t.Errorf("got %v, want %v", err, ErrUnknownAuthority)
			}
			c.SetRoots(s.ca.roots())
			if err := c.PostStatus(t.Context(), "1"); err != nil {
				t.Errorf("with the right roots again: %v", err)
			}
		})
	}
}

func TestDenied(t *testing.T) {
	tests := map[types.PermissionDeniedDetails_Reason]Reason{
		types.PermissionDeniedDetails_UNKNOWN:             Other,
		types.PermissionDeniedDetails_AGENT_EXPIRED:       AgentExpired,
		types.PermissionDeniedDetails_AGENT_NOT_ACTIVE:    AgentNotActive,
		types.PermissionDeniedDetails_AGENT_NOT_ATTESTED:  AgentNotAttested,
		types.PermissionDeniedDetails_AGENT_MUST_REATTEST: AgentMustReattest,
		types.PermissionDeniedDetails_AGENT_BANNED:        AgentBanned,
		99: Other,
	}
	var answer error
	s := newServer(t)
	s.status = func(context.Context) error { return answer }
	s.start(t)
	c := s.client(t)
	for detail, reason := range tests {
		answer = denied(t, detail)
		var got *DeniedError
		if err := c.PostStatus(t.Context(), "1"); !errors.As(err, &got) || got.Reason != reason || got.Superseded ||
			got.Address != s.addr || got.Message != "no" || got.Step != stepStatus {
			t.Errorf("%s: got %#v (%v)", detail, got, err)
		}
		if text := Advice(got); text == "" {
			t.Errorf("%s: no advice", detail)
		}
		if !strings.Contains(got.Error(), got.Reason.String()) {
			t.Errorf("error %q lacks the reason", got)
		}
	}
	answer = status.Error(codes.PermissionDenied, "policy")
	var got *DeniedError
	if err := c.PostStatus(t.Context(), "1"); !errors.As(err, &got) || got.Reason != Other {
		t.Errorf("without details: got %v", err)
	}
	answer = status.Error(codes.Internal, "database is locked")
	var call *CallError
	if err := c.PostStatus(t.Context(), "1"); !errors.As(err, &call) || call.Code != codes.Internal || !strings.Contains(err.Error(), "Internal: database is locked") {
		t.Errorf("internal: got %v", err)
	}
	if n := s.begun.Load(); n != 1 {
		t.Errorf("%d connections: an answer, even a bad one, must not cost the connection", n)
	}
}

// The server drops an old SVID before the agent can set the new one. A denial
// of the old one is then no news.
func TestSuperseded(t *testing.T) {
	g := newGate()
	s := newServer(t)
	s.status = func(ctx context.Context) error {
		if err := g.pass(ctx); err != nil {
			return err
		}
		return denied(t, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	}
	s.start(t)
	c := s.client(t)
	failed := make(chan error)
	post := func() { failed <- c.PostStatus(t.Context(), "1") }
	check := func(what string, want bool) {
		t.Helper()
		var got *DeniedError
		if err := <-failed; !errors.As(err, &got) || got.Reason != AgentNotActive || got.Superseded != want {
			t.Errorf("%s: got %#v (%v), want superseded %t", what, got, err, want)
		}
	}

	go post()
	<-g.arrived
	c.SetIdentity(s.ca.identity(t, agentID))
	g.release()
	check("identity was replaced", true)

	go post()
	check("identity is the newest", false)

	if _, err := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, token{}, newCSR(t, newKey(t))); err != nil {
		t.Fatal(err)
	}
	go post()
	check("attested, identity not set yet", true)
	c.SetIdentity(s.ca.identity(t, agentID))
	go post()
	check("attested, identity set", false)
}

func TestAdvice(t *testing.T) {
	if got := Advice(errors.New("disk is full")); got != "" {
		t.Errorf("advice for a foreign error: %q", got)
	}
	if got := Advice(&DeniedError{Reason: AgentNotActive, Superseded: true}); !strings.HasPrefix(got, "nothing") {
		t.Errorf("advice for a superseded SVID: %q", got)
	}
}
