package attestor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

const (
	typeJoinToken = "join_token"
	maxTokenFile  = 4 << 10 // bytes; a token of SPIRE is a UUID
)

// JoinToken is the node attestor "join_token": a secret that the SPIRE Server
// handed out, good for one attestation. Exactly one of its fields is set.
type JoinToken struct {
	Token string // the token itself
	File  string // path of a file that holds it, at most 4 KiB, read at each Begin
}

// Type returns "join_token".
func (JoinToken) Type() string { return typeJoinToken }

// Begin implements Node. White space around the token is dropped, and so is the
// word "Token:" that `spire-server token generate` prints before it.
func (t JoinToken) Begin(ctx context.Context) (Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if t.Token != "" && t.File != "" {
		return nil, errors.New("join_token: both a token and a token file are given, want one")
	}
	if t.File == "" {
		return joinAttemptOf("the token", []byte(t.Token))
	}
	content, err := readBounded(t.File, maxTokenFile)
	if err != nil {
		return nil, fmt.Errorf("join_token: %w", err)
	}
	return joinAttemptOf(t.File, content)
}

// joinAttemptOf takes the token from what a person has put in its place. What is
// no token is refused here: of the server, all would hear that it does not exist.
func joinAttemptOf(place string, content []byte) (Attempt, error) {
	token := bytes.TrimSpace(content)
	token = bytes.TrimSpace(bytes.TrimPrefix(token, []byte("Token:")))
	switch {
	case len(token) == 0:
		return nil, fmt.Errorf("join_token: %s is empty; generate a token with `spire-server token generate`", place)
	case bytes.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return nil, fmt.Errorf("join_token: %s holds more than a token; want what `spire-server token generate` prints, and nothing else", place)
	}
	return joinAttempt(token), nil
}

type joinAttempt []byte

func (a joinAttempt) Payload() []byte { return a }

// Answer always fails: the server asks nothing of a join token.
func (joinAttempt) Answer(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("join_token: the server sent a challenge, which this kind does not have; is the server's plugin another one?")
}

func (joinAttempt) Close() error { return nil }
