package attestor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const token = "6c8ef3a2-7f0d-4f1a-9d5c-1f1f4f6a2b11"

func TestJoinToken(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, test := range map[string]struct {
		node JoinToken
		err  string // empty: the payload is the token
	}{
		"token":            {node: JoinToken{Token: token}},
		"token with space": {node: JoinToken{Token: " " + token + "\n"}},
		"file":             {node: JoinToken{File: write("good", "\n"+token+"\r\n")}},
		"as printed":       {node: JoinToken{File: write("printed", "Token: "+token+"\n")}},
		"no space":         {node: JoinToken{Token: "Token:" + token}},
		"word alone":       {node: JoinToken{File: write("word", "Token: \n")}, err: "word is empty"},
		"two":              {node: JoinToken{File: write("two", token+"\n"+token)}, err: "two holds more than a token"},
		"json":             {node: JoinToken{File: write("json", `{"value": "`+token+`"}`)}, err: "json holds more than a token"},
		"control":          {node: JoinToken{Token: token + "\x00"}, err: "the token holds more than a token"},
		"nothing":          {err: "token is empty"},
		"blank token":      {node: JoinToken{Token: " \n"}, err: "token is empty"},
		"both":             {node: JoinToken{Token: token, File: "x"}, err: "want one"},
		"empty file":       {node: JoinToken{File: write("empty", " \n")}, err: "empty is empty"},
		"no file":          {node: JoinToken{File: filepath.Join(dir, "absent")}, err: "no such file"},
		"huge file":        {node: JoinToken{File: write("huge", token+strings.Repeat("x", maxTokenFile))}, err: "longer than 4096 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			attempt, err := test.node.Begin(t.Context())
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) || strings.Contains(err.Error(), token) {
					t.Fatalf("error %v, want %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer attempt.Close()
			if string(attempt.Payload()) != token {
				t.Fatalf("payload %q", attempt.Payload())
			}
			if _, err := attempt.Answer(t.Context(), []byte("{}")); err == nil {
				t.Fatal("answered a challenge")
			}
		})
	}
}

func TestJoinTokenFileIsReadAtEachBegin(t *testing.T) {
	var node Node = JoinToken{File: filepath.Join(t.TempDir(), "token")}
	if node.Type() != "join_token" {
		t.Fatalf("type %q", node.Type())
	}
	for _, token := range []string{"first", "second"} {
		if err := os.WriteFile(node.(JoinToken).File, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		attempt, err := node.Begin(t.Context())
		if err != nil || string(attempt.Payload()) != token {
			t.Fatalf("Begin: %v, %v", attempt, err)
		}
	}
}

func TestJoinTokenHonoursContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (JoinToken{Token: token}).Begin(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
}
