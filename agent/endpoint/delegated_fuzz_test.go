package endpoint

import (
	"context"
	"strings"
	"testing"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func withPeer(ctx context.Context, c *conn) context.Context {
	return peer.NewContext(ctx, &peer.Peer{AuthInfo: c})
}

// FuzzParseSubject reads what a delegate can send: it is refused with a reason,
// or names a PID, or selectors that are within their bounds.
func FuzzParseSubject(f *testing.F) {
	for _, req := range []*delegatedidentityv1.SubscribeToX509SVIDsRequest{
		{}, {Pid: 7}, {Pid: -7}, {Selectors: podSelectors("web")}, {Pid: 7, Selectors: podSelectors("web")},
	} {
		data, err := proto.Marshal(req)
		must(f, err)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var req delegatedidentityv1.SubscribeToX509SVIDsRequest
		if proto.Unmarshal(data, &req) != nil {
			return
		}
		selectors, err := parseSubject(&req)
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("got %v, want InvalidArgument", err)
			}
			return
		}
		if (len(selectors) == 0) == (req.Pid == 0) || req.Pid < 0 || len(selectors) > maxSelectors {
			t.Errorf("pid %d and %d selectors were accepted", req.Pid, len(selectors))
		}
		for _, s := range selectors {
			if s.Type == "" || s.Value == "" || strings.Contains(s.Type, ":") || len(s.Type)+len(s.Value) > maxSelectorLength {
				t.Errorf("selector %q was accepted", s)
			}
		}
	})
}
