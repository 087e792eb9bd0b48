package attestor

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

const (
	typePSAT     = "k8s_psat"
	maxPSAT      = 16 << 10 // bytes of a token file; the kubelet's have 1 to 2 KiB
	maxAudiences = 8        // named to a person
)

// PSAT is the node attestor "k8s_psat": a projected service account token,
// which the kubelet writes for this agent's pod and which the SPIRE Server
// has reviewed by the cluster's API server (TokenReview).
type PSAT struct {
	Cluster string // the cluster's name in the server's configuration
	Token   string // path of the token's file, at most 16 KiB, read at each Begin
}

// Type returns "k8s_psat".
func (PSAT) Type() string { return typePSAT }

// AgentPath implements Pathed: the node's UID follows.
func (p PSAT) AgentPath() string { return "/spire/agent/" + typePSAT + "/" + p.Cluster + "/" }

// Begin implements Node. White space around the token is dropped. A token
// that says itself that its time is over (exp, RFC 7519 §4.1.4) is an error;
// nothing else in it is looked at, and nothing is verified here.
func (p PSAT) Begin(ctx context.Context) (Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if p.Cluster == "" || p.Token == "" {
		return nil, errors.New("k8s_psat: the name of the cluster and the file of the token are required")
	}
	content, err := readBounded(p.Token, maxPSAT)
	if err != nil {
		return nil, fmt.Errorf("k8s_psat: %w; mount a projected volume with a serviceAccountToken there", err)
	}
	token := bytes.TrimSpace(content)
	switch {
	case len(token) == 0:
		return nil, fmt.Errorf("k8s_psat: %s is empty; mount a projected volume with a serviceAccountToken there", p.Token)
	case !printable(token):
		return nil, fmt.Errorf("k8s_psat: %s holds no token: there are spaces or control characters in it", p.Token)
	}
	claims := claimsOf(token)
	if exp := time.Unix(int64(claims.Expires), 0); claims.Expires > 0 && !time.Now().Before(exp) {
		return nil, fmt.Errorf("k8s_psat: the token in %s expired at %s; is it a projected serviceAccountToken, which the kubelet keeps new, and is this node's clock right?",
			p.Token, exp.UTC().Format(time.RFC3339))
	}
	payload, err := json.Marshal(psatPayload{Cluster: p.Cluster, Token: string(token)})
	if err != nil {
		return nil, errors.New("k8s_psat: the payload cannot be encoded") // without err, which may quote the token
	}
	return &psatAttempt{cluster: p.Cluster, audiences: claims.Audiences, payload: payload}, nil
}

// printable tells whether a token could be one: visible ASCII.
func printable(token []byte) bool {
	for _, c := range token {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}

// psatPayload is what the server's plugin reads, as SPIRE v1.15 has it in
// pkg/common/plugin/k8s.
type psatPayload struct {
	Cluster string `json:"cluster"`
	Token   string `json:"token"`
}

// psatClaims are what a token says of itself, unverified: good for telling a
// person what is wrong, and for nothing else.
type psatClaims struct {
	Expires   float64   `json:"exp"` // NumericDate: seconds since 1970, perhaps with a fraction
	Audiences audiences `json:"aud"`
}

// audiences is a string or a list of them, RFC 7519 §4.1.3.
type audiences []string

// UnmarshalJSON implements json.Unmarshaler.
func (a *audiences) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*a = audiences{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(a))
}

// latestExpiry is past every date that time.Time can print as RFC 3339.
const latestExpiry = 1 << 37

// claimsOf returns the claims of a JWT, none for what is no JWT: whether
// that is a token is for the API server to say.
func claimsOf(token []byte) psatClaims {
	parts := bytes.Split(token, []byte("."))
	if len(parts) != 3 {
		return psatClaims{}
	}
	body, err := base64.RawURLEncoding.DecodeString(string(parts[1]))
	if err != nil {
		return psatClaims{}
	}
	var claims psatClaims
	if json.Unmarshal(body, &claims) != nil {
		return psatClaims{}
	}
	if claims.Expires > latestExpiry {
		claims.Expires = 0
	}
	return claims
}

type psatAttempt struct {
	cluster   string
	audiences []string
	payload   []byte
}

func (a *psatAttempt) Payload() []byte { return a.payload }

// Answer always fails: the server asks nothing more of a token.
func (*psatAttempt) Answer(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("k8s_psat: the server sent a challenge, which this kind does not have; is the server's plugin another one?")
}

// Advice implements Adviser.
func (a *psatAttempt) Advice() string {
	advice := fmt.Sprintf("where that is about the token, the server needs a k8s_psat plugin with a cluster %q, whose service_account_allow_list names this pod's namespace:account", a.cluster)
	if len(a.audiences) == 0 {
		return advice
	}
	shown := a.audiences[:min(len(a.audiences), maxAudiences)]
	return fmt.Sprintf("%s and whose audience list shares one with the token's: %.200q", advice, strings.Join(shown, ", "))
}

func (*psatAttempt) Close() error { return nil }
