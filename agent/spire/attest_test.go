package spire

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/attestor"
)

// token is a join token.
type token struct{ beginErr error }

func (token) Type() string { return "join_token" }
func (n token) Begin(context.Context) (attestor.Attempt, error) {
	return tokenAttempt{}, n.beginErr
}

type tokenAttempt struct{}

func (tokenAttempt) Payload() []byte { return []byte("secret") }
func (tokenAttempt) Answer(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("a join token answers no challenge")
}
func (tokenAttempt) Close() error { return nil }

// echo answers a challenge with its reverse.
type echo struct{ closed int }

func (*echo) Type() string                                      { return "echo" }
func (e *echo) Begin(context.Context) (attestor.Attempt, error) { return e, nil }
func (*echo) Payload() []byte                                   { return []byte("hello") }
func (e *echo) Close() error                                    { e.closed++; return nil }
func (*echo) Answer(_ context.Context, challenge []byte) ([]byte, error) {
	answer := bytes.Clone(challenge)
	for i, j := 0, len(answer)-1; i < j; i, j = i+1, j-1 {
		answer[i], answer[j] = answer[j], answer[i]
	}
	return answer, nil
}

// advised is echo that knows why it may be refused.
type advised struct{ echo }

func (a *advised) Begin(context.Context) (attestor.Attempt, error) { return a, nil }
func (*advised) Advice() string                                    { return "look at the token" }

func challenge(data string) *agentv1.AttestAgentResponse {
	return &agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: []byte(data)}}
}

func TestAttest(t *testing.T) {
	s := newServer(t)
	standard := s.attest
	s.attest = func(stream agentv1.Agent_AttestAgentServer) error {
		if callerSerial(stream.Context()) != 0 {
			return status.Error(codes.Internal, "attestation with a client certificate")
		}
		return standard(recorded{stream, func(req *agentv1.AttestAgentRequest) {
			if data := req.GetParams().GetData(); data.GetType() != "join_token" || string(data.GetPayload()) != "secret" {
				t.Errorf("attestation data %v", data)
			}
		}})
	}
	s.start(t)
	c := s.client(t) // its identity must not be presented
	key := newKey(t)
	a, err := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, token{}, newCSR(t, key))
	if err != nil {
		t.Fatal(err)
	}
	if !a.Reattestable || len(a.Chain) != 1 {
		t.Errorf("got %+v", a)
	}
	if b := a.Bundle; b.TrustDomain != exampleOrg || len(b.X509) != 1 || !bytes.Equal(b.DER, s.ca.cert.Raw) || b.Sequence != 7 {
		t.Errorf("bundle %+v", b)
	}
	if n := s.begun.Load(); n != 1 {
		t.Errorf("%d connections, want one for attestation and bundle", n)
	}
	<-s.ended // the connection goes with the call

	c.SetRoots(a.Bundle.X509)
	c.SetIdentity(&Identity{Chain: a.Chain, Key: key})
	if err := c.PostStatus(t.Context(), "1"); err != nil {
		t.Errorf("with the new identity: %v", err)
	}
}

// recorded shows the requests of a stream to f.
type recorded struct {
	agentv1.Agent_AttestAgentServer
	f func(*agentv1.AttestAgentRequest)
}

func (r recorded) Recv() (*agentv1.AttestAgentRequest, error) {
	req, err := r.Agent_AttestAgentServer.Recv()
	if err == nil {
		r.f(req)
	}
	return req, err
}

func TestAttestInsecure(t *testing.T) {
	s := newServer(t).start(t)
	c := s.bareClient(t)
	csr := newCSR(t, newKey(t))
	if _, err := c.Attest(t.Context(), Trust{Insecure: true, Roots: newAuthority(t).roots()}, token{}, csr); err != nil {
		t.Errorf("insecure: %v", err)
	}
	if _, err := c.Attest(t.Context(), Trust{Roots: newAuthority(t).roots()}, token{}, csr); !errors.Is(err, ErrUnknownAuthority) {
		t.Errorf("other roots: got %v, want %v", err, ErrUnknownAuthority)
	}
	if _, err := c.Attest(t.Context(), Trust{}, token{}, csr); err == nil || !strings.Contains(err.Error(), "no trust bundle") {
		t.Errorf("neither roots nor insecure: got %v", err)
	}

	other := newServer(t)
	other.id = "spiffe://other.org/spire/server"
	other.start(t)
	if _, err := other.bareClient(t).Attest(t.Context(), Trust{Insecure: true}, token{}, csr); !errors.Is(err, ErrWrongServer) {
		t.Errorf("insecure, other trust domain: got %v, want %v", err, ErrWrongServer)
	}
}

func TestAttestChallenge(t *testing.T) {
	s := newServer(t)
	rounds := 3
	s.attest = func(stream agentv1.Agent_AttestAgentServer) error {
		first, err := stream.Recv()
		if err != nil {
			return err
		}
		// An empty challenge is one too.
		for _, c := range []string{"abc", "", "12345"}[:min(rounds, 3)] {
			if err := stream.Send(challenge(c)); err != nil {
				return err
			}
			req, err := stream.Recv()
			if err != nil {
				return err
			}
			want, _ := (*echo)(nil).Answer(stream.Context(), []byte(c))
			if got := req.GetChallengeResponse(); !bytes.Equal(got, want) {
				return status.Errorf(codes.InvalidArgument, "challenge %q answered with %q", c, got)
			}
		}
		for range rounds - 3 {
			if err := stream.Send(challenge("x")); err != nil {
				return err
			}
			if _, err := stream.Recv(); err != nil {
				return err
			}
		}
		return stream.Send(s.attested(first, "spiffe://example.org/spire/agent/echo/1"))
	}
	s.start(t)
	c := s.bareClient(t)
	node := &echo{}
	csr := newCSR(t, newKey(t))
	if _, err := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, node, csr); err != nil {
		t.Error(err)
	}
	rounds = maxChallenges + 1
	if _, err := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, node, csr); !errors.Is(err, ErrBadAnswer) {
		t.Errorf("endless challenges: got %v, want %v", err, ErrBadAnswer)
	}
	rounds = 1
	if _, err := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, token{}, csr); err == nil || !strings.Contains(err.Error(), "answers no challenge") {
		t.Errorf("challenge to a join token: got %v", err)
	}
	if node.closed != 2 {
		t.Errorf("attempt closed %d times, want 2", node.closed)
	}
}

func TestAttestRefused(t *testing.T) {
	var answer error
	s := newServer(t)
	s.attest = func(agentv1.Agent_AttestAgentServer) error { return answer }
	s.start(t)
	c := s.bareClient(t)
	attest := func(node attestor.Node) error {
		_, err := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, node, newCSR(t, newKey(t)))
		return err
	}

	answer = status.Error(codes.InvalidArgument, "failed to attest: join token does not exist or has already been used")
	err := attest(token{})
	if !errors.Is(err, ErrJoinToken) || !strings.Contains(err.Error(), "already been used") || !strings.Contains(Advice(err), "spire-server token generate") {
		t.Errorf("used token: got %v; advice %q", err, Advice(err))
	}
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("error shows the token: %v", err)
	}
	if err := attest(&echo{}); errors.Is(err, ErrJoinToken) || !strings.Contains(err.Error(), "InvalidArgument") {
		t.Errorf("invalid argument without a token: got %v", err)
	}
	answer = status.Error(codes.PermissionDenied, "failed to attest: agent is banned")
	var no *DeniedError
	if err := attest(token{}); !errors.As(err, &no) || no.Reason != AgentBanned || no.Superseded || no.Step != stepAttest {
		t.Errorf("banned: got %v", err)
	}
	answer = status.Error(codes.PermissionDenied, "failed to attest: no")
	if err := attest(token{}); !errors.As(err, &no) || no.Reason != Other {
		t.Errorf("refused: got %v", err)
	}
	if err := attest(&advised{}); !errors.As(err, &no) || !strings.HasSuffix(err.Error(), "; look at the token") {
		t.Errorf("refused with advice: got %v", err)
	}
	answer = status.Error(codes.Internal, "the token cannot be validated")
	if err := attest(&advised{}); err == nil || !strings.HasSuffix(err.Error(), "; look at the token") {
		t.Errorf("failed with advice: got %v", err)
	}
	answer = status.Error(codes.Unavailable, "away")
	if err := attest(&advised{}); err == nil || strings.Contains(err.Error(), "look at") {
		t.Errorf("unreachable with advice: got %v", err)
	}
	answer = nil
	if err := attest(token{}); !errors.Is(err, ErrBadAnswer) {
		t.Errorf("no result: got %v, want %v", err, ErrBadAnswer)
	}
	local := errors.New("token file is gone")
	if err := attest(token{beginErr: local}); !errors.Is(err, local) {
		t.Errorf("got %v, want %v", err, local)
	}
	if _, err := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, token{}, []byte("no CSR")); err == nil {
		t.Error("no error for a broken CSR")
	}
}

// What the server gives is checked before the agent relies on it.
func TestAttestChecksResult(t *testing.T) {
	key := newKey(t)
	tests := []struct {
		name   string
		result func(*server) *agentv1.AttestAgentResponse
		bundle func(*server) (*types.Bundle, error)
		want   error
		text   string
	}{
		{name: "empty step", result: func(*server) *agentv1.AttestAgentResponse { return &agentv1.AttestAgentResponse{} }, want: ErrBadAnswer},
		{name: "no SVID", result: func(*server) *agentv1.AttestAgentResponse { return attestResult() }, want: ErrBadAnswer},
		{name: "garbage", result: func(*server) *agentv1.AttestAgentResponse { return attestResult([]byte("x")) }, want: ErrBadAnswer},
		{name: "other key", result: func(s *server) *agentv1.AttestAgentResponse {
			return attestResult(s.ca.sign(newKey(t).Public(), agentID))
		}, want: ErrBadAnswer, text: "another key"},
		{name: "other trust domain", result: func(s *server) *agentv1.AttestAgentResponse {
			return attestResult(s.ca.sign(key.Public(), "spiffe://other.org/spire/agent/x"))
		}, want: ErrBadAnswer, text: "not an agent's"},
		{name: "a workload", result: func(s *server) *agentv1.AttestAgentResponse {
			return attestResult(s.ca.sign(key.Public(), "spiffe://example.org/web"))
		}, want: ErrBadAnswer, text: "not an agent's"},
		{name: "the server itself", result: func(s *server) *agentv1.AttestAgentResponse {
			return attestResult(s.ca.sign(key.Public(), serverID))
		}, want: ErrBadAnswer, text: "not an agent's"},
		{name: "two URI SANs", result: func(s *server) *agentv1.AttestAgentResponse {
			return attestResult(s.ca.sign(key.Public(), agentID, "spiffe://example.org/spire/agent/two"))
		}, want: ErrBadAnswer, text: "more than one URI"},
		{name: "other authority", result: func(*server) *agentv1.AttestAgentResponse {
			return attestResult(newAuthority(t).sign(key.Public(), agentID))
		}, want: ErrUnknownAuthority},
		{name: "bundle of another domain", bundle: func(s *server) (*types.Bundle, error) { return bundleOf("other.org", s.ca), nil }, want: ErrBadAnswer},
		{name: "empty bundle", bundle: func(*server) (*types.Bundle, error) { return bundleOf("example.org"), nil }, want: ErrBadAnswer, text: "no X.509 authority"},
		{name: "no bundle", bundle: func(*server) (*types.Bundle, error) { return nil, status.Error(codes.Internal, "no database") }, text: "get bundle"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(t)
			s.attest = func(stream agentv1.Agent_AttestAgentServer) error {
				if _, err := stream.Recv(); err != nil {
					return err
				}
				if test.result == nil {
					return stream.Send(attestResult(s.ca.sign(key.Public(), agentID)))
				}
				return stream.Send(test.result(s))
			}
			if test.bundle != nil {
				s.bundle = func() (*types.Bundle, error) { return test.bundle(s) }
			}
			s.start(t)
			c := s.bareClient(t)
			a, err := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, token{}, newCSR(t, key))
			if err == nil {
				t.Fatalf("got %+v, want an error", a)
			}
			if test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v, want %v with %q", err, test.want, test.text)
			}
		})
	}
}

// A join token works once: nothing that can be found out before may cost it.
func TestAttestSparesToken(t *testing.T) {
	s := newServer(t)
	s.bundle = func() (*types.Bundle, error) { return nil, status.Error(codes.Internal, "no database") }
	s.attest = func(agentv1.Agent_AttestAgentServer) error {
		t.Error("the token was used")
		return nil
	}
	s.start(t)
	_, err := s.bareClient(t).Attest(t.Context(), Trust{Roots: s.ca.roots()}, token{}, newCSR(t, newKey(t)))
	if err == nil || !strings.Contains(err.Error(), "attest node: get bundle: server "+s.addr) {
		t.Errorf("got %v", err)
	}
}

func TestAttestEndsWithContext(t *testing.T) {
	s := newServer(t)
	arrived := make(chan struct{})
	s.attest = func(stream agentv1.Agent_AttestAgentServer) error {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		arrived <- struct{}{}
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			return nil
		}
		return stream.Context().Err()
	}
	s.start(t)
	c := s.bareClient(t)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := c.Attest(ctx, Trust{Roots: s.ca.roots()}, token{}, newCSR(t, newKey(t)))
		failed <- err
	}()
	<-arrived
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func TestRenew(t *testing.T) {
	key := newKey(t)
	var chain func(csr []byte) ([][]byte, error)
	s := newServer(t)
	s.renew = func(csr []byte) ([][]byte, error) { return chain(csr) }
	s.start(t)
	c := s.client(t)
	tests := []struct {
		name  string
		chain func([]byte) ([][]byte, error)
		want  error
	}{
		{"renewed", func([]byte) ([][]byte, error) { return [][]byte{s.ca.sign(key.Public(), agentID)}, nil }, nil},
		{"other key", func([]byte) ([][]byte, error) { return [][]byte{s.ca.sign(newKey(t).Public(), agentID)}, nil }, ErrBadAnswer},
		{"another agent", func([]byte) ([][]byte, error) {
			return [][]byte{s.ca.sign(key.Public(), agentID+"/x")}, nil
		}, ErrBadAnswer},
		{"other authority", func([]byte) ([][]byte, error) { return [][]byte{newAuthority(t).sign(key.Public(), agentID)}, nil }, ErrUnknownAuthority},
		{"nothing", func([]byte) ([][]byte, error) { return nil, nil }, ErrBadAnswer},
	}
	for _, test := range tests {
		chain = test.chain
		got, err := c.Renew(t.Context(), newCSR(t, key))
		if !errors.Is(err, test.want) || (err == nil) != (len(got) == 1) {
			t.Errorf("%s: got %d certificates, %v; want %v", test.name, len(got), err, test.want)
		}
	}
	chain = func([]byte) ([][]byte, error) {
		return nil, denied(t, types.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	}
	var no *DeniedError
	if _, err := c.Renew(t.Context(), newCSR(t, key)); !errors.As(err, &no) || no.Reason != AgentMustReattest {
		t.Errorf("got %v", err)
	}
	if _, err := c.Renew(t.Context(), []byte("no CSR")); err == nil {
		t.Error("no error for a broken CSR")
	}
}
