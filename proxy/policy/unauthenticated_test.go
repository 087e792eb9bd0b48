package policy

import (
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestAllowsUnauthenticated: whether plaintext can pass at all is known
// without a connection.
func TestAllowsUnauthenticated(t *testing.T) {
	us := spiffeid.RequireFromString(orders)
	const open = "{id: a, effect: allow, from: [unauthenticated]}"
	for _, tt := range []struct {
		name, rules    string
		known, unknown bool // with our SVID known to be orders, and not known
	}{
		{"nobody speaks of it", "{id: a, effect: allow, from: ['spiffe://example.org/**']}", false, false},
		{"allowed", open, true, true},
		{"allowed here", "{id: a, effect: allow, on: [orders], from: [unauthenticated]}", true, true},
		{"allowed elsewhere", "{id: a, effect: allow, on: [carts], from: [unauthenticated]}", false, false},
		{"allowed to us", "{id: a, effect: allow, from: [unauthenticated], to: ['" + orders + "']}", true, true},
		{"allowed to another", "{id: a, effect: allow, from: [unauthenticated], to: ['" + web + "']}", false, true},
		{"denied to all", open + ", {id: d, effect: deny}", false, false},
		{"denied outbound", open + ", {id: d, effect: deny, at: outbound}", true, true},
		{"denied elsewhere", open + ", {id: d, effect: deny, on: [carts]}", true, true},
		{"denied to others", open + ", {id: d, effect: deny, from: ['spiffe://example.org/**']}", true, true},
		{"denied to us", open + ", {id: d, effect: deny, from: [unauthenticated], to: ['" + orders + "']}", false, true},
	} {
		p, err := Parse("test.yaml", []byte("version: 1\nrules: ["+tt.rules+"]\n"))
		if err != nil {
			t.Fatal(tt.name, err)
		}
		if got := p.AllowsUnauthenticated("orders", us); got != tt.known {
			t.Errorf("%s: %v to a known SVID", tt.name, got)
		}
		if got := p.AllowsUnauthenticated("orders", spiffeid.ID{}); got != tt.unknown {
			t.Errorf("%s: %v to an unknown SVID", tt.name, got)
		}
	}
	if (*Policy)(nil).AllowsUnauthenticated("orders", us) {
		t.Error("no policy allows it")
	}
}

func TestRulesForPlaintext(t *testing.T) {
	p, err := Parse("test.yaml", []byte("version: 1\nrules:\n- {id: b, effect: allow, on: [y, x], from: [unauthenticated]}\n- {id: a, effect: allow, from: [unauthenticated]}\n- {id: c, effect: deny, on: [x], from: [unauthenticated]}\n- {id: d, effect: allow, on: [x], from: ['"+web+"']}\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []Mention{{"x", "b", "test.yaml", 3, 4}, {"y", "b", "test.yaml", 3, 4}}
	if got := p.Unauthenticated(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if (*Policy)(nil).Unauthenticated() != nil {
		t.Error("no policy names listeners")
	}
}

// TestTheMarkCounts: what rules say of plaintext is for peers that are marked
// so; a peer of whom nothing is known, as a mistake would leave it, is allowed
// by nothing, and an ID beside the mark means nothing.
func TestTheMarkCounts(t *testing.T) {
	p, err := Parse("test.yaml", []byte("version: 1\nrules: [{id: plain, effect: allow, on: [plain], from: [unauthenticated]}, {id: web, effect: allow, on: [web], from: ['"+web+"']}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromString(web)
	for _, tt := range []struct {
		from Peer
		on   string
		want bool
	}{
		{Peer{Unauthenticated: true}, "plain", true},
		{Peer{Unauthenticated: true}, "web", false},
		{Peer{Unauthenticated: true, ID: id}, "plain", true},
		{Peer{Unauthenticated: true, ID: id}, "web", false},
		{Peer{}, "plain", false},
		{Peer{}, "web", false},
		{Peer{ID: id}, "plain", false},
		{Peer{ID: id}, "web", true},
	} {
		q := request(web, orders)
		q.From, q.Listener = tt.from, tt.on
		e := p.Explain(&q)
		if e.Decision.Allow != tt.want {
			t.Errorf("%+v on %s: %+v", tt.from, tt.on, e)
		}
		for _, note := range e.Rules {
			if note.Matched && !tt.want {
				t.Errorf("%+v on %s: %+v", tt.from, tt.on, note)
			}
		}
	}
}
