package attestor

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// jwt is a token with these claims and a signature nobody looks at.
func jwt(claims string) string {
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(`{"alg":"RS256"}`)) + "." + enc([]byte(claims)) + "." + enc([]byte("signature"))
}

var _ Pathed = PSAT{}

func TestPSAT(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	soon := time.Now().Add(time.Hour).Unix()
	good := jwt(fmt.Sprintf(`{"aud":["spire-server"],"exp":%d}`, soon))
	old := jwt(`{"aud":["spire-server"],"exp":1700000000}`)
	for name, test := range map[string]struct {
		node   PSAT
		token  string // in the payload
		advice string // part of it
		err    string
	}{
		"token":           {node: PSAT{"demo", write("good", "\n"+good+"\r\n")}, token: good, advice: `"spire-server"`},
		"one audience":    {node: PSAT{"demo", write("one", jwt(`{"aud":"api"}`))}, token: jwt(`{"aud":"api"}`), advice: `"api"`},
		"many audiences":  {node: PSAT{"demo", write("two", jwt(`{"aud":["a","b"]}`))}, token: jwt(`{"aud":["a","b"]}`), advice: `"a, b"`},
		"never expires":   {node: PSAT{"demo", write("never", jwt(`{"exp":1e300}`))}, token: jwt(`{"exp":1e300}`), advice: `cluster "demo"`},
		"no JWT":          {node: PSAT{"demo", write("opaque", "opaque")}, token: "opaque", advice: "service_account_allow_list"},
		"claims no JSON":  {node: PSAT{"demo", write("claims", jwt(`{`))}, token: jwt(`{`), advice: "plugin"},
		"expired":         {node: PSAT{"demo", write("old", old)}, err: "old expired at 2023-11-14T22:13:20Z"},
		"empty":           {node: PSAT{"demo", write("empty", " \n")}, err: "empty is empty"},
		"two lines":       {node: PSAT{"demo", write("lines", good+"\n"+good)}, err: "holds no token"},
		"binary":          {node: PSAT{"demo", write("binary", good+"\xff")}, err: "holds no token"},
		"huge":            {node: PSAT{"demo", write("huge", good+strings.Repeat("x", maxPSAT))}, err: "longer than 16384 bytes"},
		"missing":         {node: PSAT{"demo", filepath.Join(dir, "absent")}, err: "no such file or directory; mount a projected volume"},
		"without cluster": {node: PSAT{"", write("c", good)}, err: "are required"},
		"without file":    {node: PSAT{"demo", ""}, err: "are required"},
	} {
		t.Run(name, func(t *testing.T) {
			attempt, err := test.node.Begin(t.Context())
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("error %v, want %q", err, test.err)
				}
				if strings.Contains(err.Error(), good[:20]) || strings.Contains(err.Error(), old[:20]) {
					t.Fatalf("the error shows the token: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer attempt.Close()
			var payload map[string]string
			if err := json.Unmarshal(attempt.Payload(), &payload); err != nil {
				t.Fatal(err)
			}
			if len(payload) != 2 || payload["cluster"] != "demo" || payload["token"] != test.token {
				t.Fatalf("payload %s", attempt.Payload())
			}
			advice := attempt.(Adviser).Advice()
			if !strings.Contains(advice, test.advice) || strings.Contains(advice, test.token) {
				t.Fatalf("advice %q, want %q", advice, test.advice)
			}
			if _, err := attempt.Answer(t.Context(), []byte("{}")); err == nil {
				t.Fatal("answered a challenge")
			}
		})
	}
}

func TestPSATIsReadAtEachBegin(t *testing.T) {
	var node Node = PSAT{Cluster: "demo", Token: filepath.Join(t.TempDir(), "token")}
	if node.Type() != "k8s_psat" {
		t.Fatalf("type %q", node.Type())
	}
	for _, token := range []string{"first", "second"} {
		if err := os.WriteFile(node.(PSAT).Token, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		attempt, err := node.Begin(t.Context())
		if err != nil || !strings.Contains(string(attempt.Payload()), token) {
			t.Fatalf("Begin: %v, %v", attempt, err)
		}
	}
}

func TestPSATHonoursContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (PSAT{Cluster: "demo", Token: "x"}).Begin(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
}

func FuzzPSAT(f *testing.F) {
	f.Add([]byte(jwt(`{"aud":["spire-server"],"exp":1700000000}`)))
	f.Add([]byte(jwt(`{"aud":"x","exp":9e99}`)))
	f.Add([]byte("a.b.c"))
	f.Add([]byte(" "))
	path := filepath.Join(f.TempDir(), "token")
	f.Fuzz(func(t *testing.T, content []byte) {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		attempt, err := (PSAT{Cluster: "demo", Token: path}).Begin(t.Context())
		if err != nil {
			return
		}
		var payload psatPayload
		if err := json.Unmarshal(attempt.Payload(), &payload); err != nil {
			t.Fatal(err)
		}
		if payload.Token != strings.TrimSpace(string(content)) {
			t.Fatalf("payload %q of %q", payload.Token, content)
		}
		if n := len(attempt.(Adviser).Advice()); n > 1<<10 {
			t.Fatalf("advice of %d bytes", n)
		}
	})
}
