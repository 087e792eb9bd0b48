package spire

import (
	"crypto/ecdsa"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// signer signs what it is asked for, but for entries that refuse names.
type signer struct {
	*server
	batches []int
	result  map[string]func(*svidv1.NewX509SVIDParams) *svidv1.BatchNewX509SVIDResponse_Result // by entry
	fail    map[int]error                                                                      // by batch
	short   bool                                                                               // a result too few
}

func newSigner(t *testing.T) *signer {
	s := &signer{server: newServer(t), result: map[string]func(*svidv1.NewX509SVIDParams) *svidv1.BatchNewX509SVIDResponse_Result{}}
	s.sign = func(req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
		s.batches = append(s.batches, len(req.GetParams()))
		if err := s.fail[len(s.batches)]; err != nil {
			return nil, err
		}
		answer := &svidv1.BatchNewX509SVIDResponse{}
		for _, p := range req.GetParams() {
			if f := s.result[p.GetEntryId()]; f != nil {
				answer.Results = append(answer.Results, f(p))
			} else {
				answer.Results = append(answer.Results, s.signed(p, idOf(p.GetEntryId())))
			}
		}
		if s.short {
			answer.Results = answer.Results[1:]
		}
		return answer, nil
	}
	s.start(t)
	return s
}

func idOf(entry string) string { return "spiffe://example.org/" + entry }

func (s *signer) signed(p *svidv1.NewX509SVIDParams, id string) *svidv1.BatchNewX509SVIDResponse_Result {
	key, err := csrKey(p.GetCsr())
	if err != nil {
		return refused(codes.InvalidArgument, "malformed CSR")
	}
	return svidResult(s.ca.sign(key, id))
}

func svidResult(chain ...[]byte) *svidv1.BatchNewX509SVIDResponse_Result {
	return &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{}, Svid: &types.X509SVID{CertChain: chain}}
}

func refused(code codes.Code, message string) *svidv1.BatchNewX509SVIDResponse_Result {
	return &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{Code: int32(code), Message: message}}
}

// newRequests uses few keys for many requests: making keys is slow.
func newRequests(t *testing.T, n int) ([]SignRequest, []*ecdsa.PrivateKey) {
	keys := make([]*ecdsa.PrivateKey, 7)
	csrs := make([][]byte, len(keys))
	for i := range keys {
		keys[i] = newKey(t)
		csrs[i] = newCSR(t, keys[i])
	}
	reqs, used := make([]SignRequest, n), make([]*ecdsa.PrivateKey, n)
	for i := range reqs {
		entry := fmt.Sprintf("entry-%d", i)
		reqs[i] = SignRequest{EntryID: entry, SPIFFEID: spiffeid.RequireFromString(idOf(entry)), CSR: csrs[i%len(csrs)]}
		used[i] = keys[i%len(keys)]
	}
	return reqs, used
}

func TestSign(t *testing.T) {
	tests := map[int][]int{0: nil, 1: {1}, 500: {500}, 501: {500, 1}, 1200: {500, 500, 200}}
	for n, batches := range tests {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			s := newSigner(t)
			c := s.client(t)
			reqs, keys := newRequests(t, n)
			got, err := c.Sign(t.Context(), reqs)
			if err != nil || len(got) != n {
				t.Fatalf("got %d answers, %v", len(got), err)
			}
			for i, g := range got {
				if g.Err != nil {
					t.Fatalf("request %d: %v", i, g.Err)
				}
				if id, _, err := parseSVID(g.Chain, keys[i].Public()); err != nil || id != reqs[i].SPIFFEID {
					t.Fatalf("request %d: answered with %s, %v", i, id, err)
				}
			}
			if fmt.Sprint(s.batches) != fmt.Sprint(batches) {
				t.Errorf("batches of %v, want %v", s.batches, batches)
			}
		})
	}
}

func TestSignPartly(t *testing.T) {
	s := newSigner(t)
	c := s.client(t)
	reqs, keys := newRequests(t, 12)
	type result = svidv1.BatchNewX509SVIDResponse_Result
	s.result["entry-1"] = func(*svidv1.NewX509SVIDParams) *result {
		return refused(codes.NotFound, "entry not found or not authorized")
	}
	s.result["entry-2"] = func(*svidv1.NewX509SVIDParams) *result { return refused(codes.Internal, "out of luck") }
	s.result["entry-3"] = func(p *svidv1.NewX509SVIDParams) *result { return s.signed(p, idOf("entry-4")) }
	s.result["entry-4"] = func(*svidv1.NewX509SVIDParams) *result {
		return svidResult(s.ca.sign(newKey(t).Public(), idOf("entry-4")))
	}
	s.result["entry-5"] = func(*svidv1.NewX509SVIDParams) *result { return svidResult() }
	s.result["entry-6"] = func(*svidv1.NewX509SVIDParams) *result { return &result{} }
	s.result["entry-7"] = func(*svidv1.NewX509SVIDParams) *result { return svidResult([]byte("garbage")) }
	s.result["entry-8"] = func(p *svidv1.NewX509SVIDParams) *result { // no status is a good one
		r := s.signed(p, idOf("entry-8"))
		r.Status = nil
		return r
	}
	reqs[9].CSR = []byte("garbage")
	wants := map[int]struct {
		err  error
		text string
	}{
		1: {ErrNotFound, "entry entry-1"},
		2: {nil, "Internal: out of luck"},
		3: {ErrBadAnswer, "it is for spiffe://example.org/entry-4, want spiffe://example.org/entry-3"},
		4: {ErrBadAnswer, "another key"},
		5: {ErrBadAnswer, "no certificate"},
		6: {ErrBadAnswer, "no certificate"},
		7: {ErrBadAnswer, "certificate 0"},
		9: {nil, "certificate request"},
	}
	got, err := c.Sign(t.Context(), reqs)
	if err != nil {
		t.Fatal(err)
	}
	for i, g := range got {
		want, bad := wants[i]
		if !bad {
			if g.Err != nil {
				t.Errorf("request %d: %v", i, g.Err)
			} else if id, _, err := parseSVID(g.Chain, keys[i].Public()); err != nil || id != reqs[i].SPIFFEID {
				t.Errorf("request %d: answered with %s, %v", i, id, err)
			}
			continue
		}
		if g.Err == nil || g.Chain != nil || want.err != nil && !errors.Is(g.Err, want.err) || !strings.Contains(g.Err.Error(), want.text) {
			t.Errorf("request %d: got %v, want %v with %q", i, g.Err, want.err, want.text)
		}
	}
	if len(s.batches) != 1 || s.batches[0] != 11 {
		t.Errorf("batches of %v: a broken request must not be sent", s.batches)
	}
}

// What was signed before a call failed is not lost.
func TestSignFails(t *testing.T) {
	s := newSigner(t)
	s.fail = map[int]error{2: denied(t, types.PermissionDeniedDetails_AGENT_EXPIRED)}
	c := s.client(t)
	reqs, _ := newRequests(t, 1100)
	got, err := c.Sign(t.Context(), reqs)
	var no *DeniedError
	if !errors.As(err, &no) || no.Reason != AgentExpired {
		t.Fatalf("got %v", err)
	}
	for i, g := range got {
		if (g.Err == nil) != (i < 500) || (g.Chain != nil) != (i < 500) || g.Err != nil && !errors.As(g.Err, &no) {
			t.Fatalf("request %d: %v", i, g.Err)
		}
	}
	if len(s.batches) != 2 {
		t.Errorf("batches of %v: none should follow a failed one", s.batches)
	}

	s.fail = map[int]error{3: status.Error(codes.ResourceExhausted, "too fast")}
	var call *CallError
	if _, err := c.Sign(t.Context(), reqs[:3]); !errors.As(err, &call) || call.Code != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
	s.short = true
	if _, err := c.Sign(t.Context(), reqs[:3]); !errors.Is(err, ErrBadAnswer) {
		t.Errorf("a result too few: got %v, want %v", err, ErrBadAnswer)
	}
}
