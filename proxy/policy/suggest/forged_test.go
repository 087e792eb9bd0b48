package suggest

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

// TestForgedRecords: what somebody else has written into a log becomes no rule,
// and no part of one.
func TestForgedRecords(t *testing.T) {
	t.Parallel()
	const rule = "\n  - {id: forged, effect: allow, from: [\"spiffe://example.org/**\"]}\n"
	direction, plaintext := connection(web), connection(web)
	direction.Direction = "inbound" + rule
	plaintext.Plaintext = true // whoever that was, it was not web
	pathless, long := connection("spiffe://example.org"), connection("spiffe://example.org/"+strings.Repeat("x", 500))
	listener := connection(web)
	listener.Listener = "orders]" + rule
	for _, a := range []telemetry.Access{
		direction, plaintext, listener, pathless, long,
		request(web, "GET"+rule, "/v1"), request(web, "get", "/v1"), request(web, "#", "/v1"), request(web, "*X", "/v1"), request(web, "'", "/v1"),
		request(web, "GET], paths: [/**]}}"+rule, "/v1"), request(web, "GET", "/v1"+rule), request(web, "GET", "/v1\"]}"),
	} {
		s := New(Options{})
		s.Add(&a)
		rules := s.Rules()
		if len(rules) == 0 {
			continue
		}
		text := s.Text(rules)
		p, err := policy.Parse("suggested.yaml", []byte(text))
		if err == nil {
			err = s.Check(text)
		}
		if err != nil {
			t.Errorf("%+v: %v\n%s", a, err, text)
			continue
		}
		q := policy.Request{Listener: "orders", From: policy.Peer{ID: spiffeid.RequireFromString(cron)}, To: policy.Peer{ID: spiffeid.RequireFromString(orders)}}
		named := policy.Request{Listener: "orders", From: policy.Peer{ID: spiffeid.RequireFromString(web)}, To: q.To}
		if p.Rules() != 1 || p.Admit(&q) != policy.Never || a.Plaintext && p.Admit(&named) != policy.Never {
			t.Errorf("%+v: %s", a, text)
		}
	}
}
