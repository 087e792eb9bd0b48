package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/narthex-id/narthex/internal/fetch"
	"github.com/narthex-id/narthex/internal/fileset"
)

// givenJSON is the JSON of what was given.
type givenJSON struct {
	Identities []identityJSON        `json:"identities,omitempty"`
	Bundles    map[string]bundleJSON `json:"bundles,omitempty"` // by trust domain
	Written    []string              `json:"written,omitempty"`
}

type identityJSON struct {
	SPIFFEID  string     `json:"spiffe_id"`
	Hint      string     `json:"hint,omitempty"`
	Audience  []string   `json:"audience,omitempty"`
	Serial    string     `json:"serial,omitempty"` // hexadecimal
	NotBefore *time.Time `json:"not_before,omitempty"`
	NotAfter  time.Time  `json:"not_after"`
	Chain     string     `json:"chain,omitempty"` // PEM
	Token     string     `json:"token,omitempty"`
}

type bundleJSON struct {
	X509 string          `json:"x509,omitempty"` // PEM
	JWT  json.RawMessage `json:"jwt,omitempty"`  // JWK Set
	WIT  json.RawMessage `json:"wit,omitempty"`  // JWK Set
}

// printGiven prints a summary, or all but private keys in JSON. Tokens are left
// out where they were written to files.
func printGiven(w io.Writer, g *fetch.Given, format, dir string, files []fileset.File) error {
	written := make([]string, 0, len(files))
	for i := range files {
		written = append(written, filepath.Join(dir, files[i].Name))
	}
	if format == "json" {
		return printGivenJSON(w, g, written)
	}
	var b strings.Builder
	for i := range g.Identities {
		printIdentity(&b, &g.Identities[i], len(written) == 0)
	}
	for i := range g.Bundles {
		bundle := &g.Bundles[i]
		fmt.Fprintf(&b, "bundle of %s: %s\n", bundle.TrustDomain, strings.Join(held(bundle), ", "))
	}
	for _, name := range written {
		fmt.Fprintf(&b, "wrote %s\n", name)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// held says what a bundle has of the kinds that were asked for.
func held(b *fetch.Bundle) (parts []string) {
	for _, kind := range []struct {
		data []byte
		n    int
		what string
	}{{b.X509, b.Certificates, "X.509 authority certificate"}, {b.JWT, b.JWTKeys, "JWT key"}, {b.WIT, b.WITKeys, "WIT key"}} {
		if len(kind.data) > 0 {
			parts = append(parts, count(kind.n, kind.what))
		}
	}
	if parts == nil {
		return []string{"nothing"}
	}
	return parts
}

func printIdentity(w io.Writer, i *fetch.Identity, token bool) {
	fmt.Fprintf(w, "%s\n", i.ID)
	if i.Hint != "" {
		fmt.Fprintf(w, "  hint      %q\n", i.Hint)
	}
	if len(i.Audience) > 0 {
		fmt.Fprintf(w, "  audience  %s\n", strings.Join(quoted(i.Audience), ", "))
	}
	if i.Serial != "" {
		fmt.Fprintf(w, "  serial    %s\n", i.Serial)
	}
	if !i.NotBefore.IsZero() {
		fmt.Fprintf(w, "  from      %s\n", i.NotBefore.UTC().Format(time.RFC3339))
	}
	fmt.Fprintf(w, "  until     %s, %s\n", i.NotAfter.UTC().Format(time.RFC3339), timeLeft(i.NotAfter))
	if i.Token != "" && token {
		fmt.Fprintf(w, "%s\n", i.Token)
	}
}

// quoted keeps what somebody has registered from steering a terminal.
func quoted(list []string) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = fmt.Sprintf("%q", s)
	}
	return out
}

func timeLeft(end time.Time) string {
	d := time.Until(end).Round(time.Second)
	if d <= 0 {
		return "ended " + (-d).String() + " ago"
	}
	return d.String() + " left"
}

func printGivenJSON(w io.Writer, g *fetch.Given, written []string) error {
	out := givenJSON{Written: written}
	for k := range g.Identities {
		i := &g.Identities[k]
		j := identityJSON{
			SPIFFEID: i.ID.String(), Hint: i.Hint, Audience: i.Audience, Serial: i.Serial, NotAfter: i.NotAfter, Chain: string(i.Chain),
		}
		if !i.NotBefore.IsZero() {
			j.NotBefore = &i.NotBefore
		}
		if len(written) == 0 {
			j.Token = i.Token
		}
		out.Identities = append(out.Identities, j)
	}
	if len(g.Bundles) > 0 {
		out.Bundles = map[string]bundleJSON{}
	}
	for i := range g.Bundles {
		b := &g.Bundles[i]
		out.Bundles[b.TrustDomain.Name()] = bundleJSON{X509: string(b.X509), JWT: b.JWT, WIT: b.WIT}
	}
	// One line each, so that what --watch prints can be read line by line.
	return json.NewEncoder(w).Encode(out)
}
