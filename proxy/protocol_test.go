package proxy

import (
	"slices"
	"testing"
)

// TestProtocolWords: h2c and h2 are one protocol, whose word depends on the
// direction.
func TestProtocolWords(t *testing.T) {
	t.Parallel()
	for word, want := range map[string]Protocol{"auto": ProtocolAuto, "http1": ProtocolHTTP1, "h2": ProtocolHTTP2, "h2c": ProtocolHTTP2} {
		var p Protocol
		if err := p.UnmarshalText([]byte(word)); err != nil || p != want {
			t.Errorf("%s: %v, %v", word, p, err)
		}
		if word != "h2c" && want.String() != word {
			t.Errorf("%s is printed as %s", word, want)
		}
	}
	var p Protocol
	if err := p.UnmarshalText([]byte("http2")); err == nil || err.Error() != `"http2": want auto, http1, h2c or h2` {
		t.Errorf("%v", err)
	}
}

// TestVersionsByDefault: an HTTP listener of which nothing is said takes HTTP/2
// and HTTP/1.1, and what is said stays as it is.
func TestVersionsByDefault(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		given    HTTP
		versions []string
		streams  int
	}{
		{HTTP{}, []string{"h2", "http/1.1"}, 250},
		{HTTP{Versions: []string{"http/1.1"}, MaxStreams: 1}, []string{"http/1.1"}, 1},
		{HTTP{Versions: []string{"http/1.1", "h2"}, MaxStreams: 1000}, []string{"http/1.1", "h2"}, 1000},
	} {
		if err := test.given.check(true); err != nil {
			t.Errorf("%+v: %v", test.given, err)
		}
		got := test.given.withDefaults()
		if !slices.Equal(got.Versions, test.versions) || got.MaxStreams != test.streams {
			t.Errorf("%+v became %+v", test.given, got)
		}
		if len(test.given.Versions) > 0 && &got.Versions[0] == &test.given.Versions[0] {
			t.Errorf("%+v: the settings share their list with the caller", test.given)
		}
	}
}
