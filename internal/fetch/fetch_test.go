package fetch

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/fileset"
	"github.com/narthex-id/narthex/internal/testca"
)

// names returns those of files, in their order.
func names(files []fileset.File) (all []string) {
	for _, f := range files {
		all = append(all, f.Name)
	}
	return all
}

func data(files []fileset.File, name string) []byte {
	for _, f := range files {
		if f.Name == name {
			return f.Data
		}
	}
	return nil
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestX509(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	partner := testca.New(t, "partner.example")
	a.x509 = &workload.X509SVIDResponse{
		Svids:            []*workload.X509SVID{a.svid("/ns/shop/sa/web", ""), a.svid("/other", "internal"), a.svid("/third", "../../etc")},
		FederatedBundles: map[string][]byte{"spiffe://partner.example": partner.Cert.Raw},
	}
	a.serve()
	given, err := a.client().Fetch(within(t, time.Minute), Request{Kind: X509})
	if err != nil {
		t.Fatal(err)
	}
	if len(given.Identities) != 3 || len(given.Bundles) != 2 || given.Identities[1].Hint != "internal" {
		t.Fatalf("given %+v", given)
	}
	leaf, err := x509.ParseCertificate(a.x509.Svids[0].X509Svid)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := given.Identities[0].Serial, fmt.Sprintf("%x", leaf.SerialNumber); got != want {
		t.Errorf("serial %s, want %s", got, want)
	}

	files, err := (&Names{}).Files(given)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"svid.pem", "svid_key.pem", "bundle.partner.example.pem", "bundle.pem"}; !slices.Equal(names(files), want) {
		t.Errorf("files %v, want %v", names(files), want)
	}
	if _, err := tls.X509KeyPair(data(files, "svid.pem"), data(files, "svid_key.pem")); err != nil {
		t.Errorf("certificate and key: %v", err)
	}
	if block, _ := pem.Decode(data(files, "svid_key.pem")); block.Type != "PRIVATE KEY" {
		t.Errorf("the key is a %s", block.Type)
	}
	for _, f := range files {
		if want := map[bool]string{true: "-rw-------", false: "-rw-r--r--"}[f.Name == "svid_key.pem"]; f.Mode.String() != want {
			t.Errorf("%s has mode %v", f.Name, f.Mode)
		}
	}
	if !bytes.Equal(data(files, "bundle.pem"), testca.CertPEM(a.ca.Cert.Raw)) || !bytes.Equal(data(files, "bundle.partner.example.pem"), testca.CertPEM(partner.Cert.Raw)) {
		t.Error("the bundles are mixed up")
	}

	files, err = (&Names{SVID: "tls.crt", Key: "tls.key", Bundle: "ca", Federated: true, KeyMode: 0o640, CertMode: 0o444}).Files(given)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"tls.crt", "tls.key", "ca.partner.example", "ca"}; !slices.Equal(names(files), want) || files[1].Mode != 0o640 || files[0].Mode != 0o444 {
		t.Errorf("files %v, want %v", names(files), want)
	}
	if !bytes.Equal(data(files, "ca"), testca.CertPEM(a.ca.Cert.Raw, partner.Cert.Raw)) {
		t.Error("the bundle does not hold both domains' authorities, our own first")
	}

	files, err = (&Names{All: true}).Files(given)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ns/shop/sa/web/svid.pem", "internal/svid_key.pem", "third/bundle.pem"} {
		if data(files, name) == nil {
			t.Errorf("no %s in %v", name, names(files))
		}
	}
}

func TestPick(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{a.svid("/web", ""), a.svid("/other", "internal"), a.svid("/later", "internal")}}
	a.serve()
	c := a.client()
	other := spiffeid.RequireFromString("spiffe://example.org/other")
	for _, r := range []Request{{ID: other}, {Hint: "internal"}, {ID: other, Hint: "internal"}} {
		r.Kind = X509
		given, err := c.Fetch(within(t, time.Minute), r)
		if err != nil || len(given.Identities) != 1 || given.Identities[0].ID != other {
			t.Errorf("%+v: %+v, %v", r, given, err)
		}
	}
	for _, r := range []Request{{ID: spiffeid.RequireFromString("spiffe://example.org/none")}, {Hint: "none"}, {ID: spiffeid.RequireFromString("spiffe://example.org/web"), Hint: "internal"}} {
		r.Kind = X509
		_, err := c.Fetch(within(t, time.Minute), r)
		if err == nil || errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), `but spiffe://example.org/web, spiffe://example.org/other (hint "internal")`) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

// TestErrors tells answers, of which there is no other, from what is passing.
func TestErrors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name        string
		refuse      error
		svids       []*workload.X509SVID
		unavailable bool
		want        string
	}{
		{name: "denied", refuse: status.Error(codes.PermissionDenied, "no identity issued"), want: "has no identity for this process: is there an entry whose selectors match it? (no identity issued)"},
		{name: "empty", want: "has no identity for this process"},
		{name: "not served", refuse: status.Error(codes.Unimplemented, "not here"), want: "does not serve this: not here"},
		{name: "refused", refuse: status.Error(codes.InvalidArgument, "what?"), want: "what?"},
		{name: "broken", svids: []*workload.X509SVID{{SpiffeId: "spiffe://example.org/x", X509Svid: []byte("x")}}, want: "ask the Workload API"},
		{name: "away", refuse: status.Error(codes.Unavailable, "not synced yet"), unavailable: true, want: "the Workload API cannot give it now: not synced yet"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t)
			a.refuse, a.x509 = c.refuse, &workload.X509SVIDResponse{Svids: c.svids}
			a.serve()
			wait := time.Minute
			if c.unavailable {
				wait = 500 * time.Millisecond
			}
			_, err := a.client().Fetch(within(t, wait), Request{Kind: X509})
			if err == nil || !strings.Contains(err.Error(), c.want) || errors.Is(err, ErrUnavailable) != c.unavailable {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("nobody", func(t *testing.T) {
		t.Parallel()
		_, err := newAPI(t).client().Fetch(within(t, 300*time.Millisecond), Request{Kind: X509})
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), ": the Workload API does not answer: dial unix ") || !strings.Contains(err.Error(), "no such file") {
			t.Error(err)
		}
	})
}

// TestComesLater starts the agent after the client.
func TestComesLater(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{a.svid("/web", "")}}
	c := a.client()
	asked := make(chan struct{}, 100)
	given := make(chan *Given, 1)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- c.Watch(ctx, Request{Kind: X509}, func(g *Given) { given <- g }, func(error) { asked <- struct{}{} })
	}()
	<-asked
	stop := a.serve()
	first := <-given
	stop() // and goes away, and comes again with another
	<-asked
	a.set(func() { a.x509 = &workload.X509SVIDResponse{Svids: []*workload.X509SVID{a.svid("/web", "")}} })
	a.serve()
	if second := <-given; second.equal(first) {
		t.Error("the second answer is the first")
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestJWT(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.keys = []string{a.jwt.JWK(), testca.NewJWT(t, "example.org", "key-0").JWK()}
	a.tokens = a.token("/web", time.Hour)
	a.serve()
	given, err := a.client().Fetch(within(t, time.Minute), Request{Kind: JWT, Audience: []string{"orders", "billing"}})
	if err != nil {
		t.Fatal(err)
	}
	files, err := (&Names{}).Files(given)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"jwt_svid.token", "jwt_bundle.json"}; !slices.Equal(names(files), want) {
		t.Errorf("files %v, want %v", names(files), want)
	}
	i := given.Identities[0]
	if string(files[0].Data) != i.Token || files[0].Mode != 0o600 || !slices.Equal(i.Audience, []string{"orders", "billing"}) || time.Until(i.NotAfter) < 59*time.Minute {
		t.Errorf("the token of %+v", i)
	}
	if text := string(files[1].Data); strings.Index(text, "key-0") > strings.Index(text, "key-1") || !strings.Contains(text, "key-1") {
		t.Errorf("the keys are not sorted: %s", text)
	}
}

// TestJWTWithoutBundles has an agent that serves tokens alone.
func TestJWTWithoutBundles(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.tokens = a.token("/web", time.Hour)
	a.serve()
	given, err := a.client().Fetch(within(t, time.Minute), Request{Kind: JWT, Audience: []string{"orders"}})
	if err != nil || len(given.Identities) != 1 || len(given.Bundles) != 0 {
		t.Errorf("given %+v, %v", given, err)
	}
}

// TestJWTIsRenewed has tokens of two seconds, and keys that change.
func TestJWTIsRenewed(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.keys = []string{a.jwt.JWK()}
	a.tokens = a.token("/web", 2*time.Second)
	a.serve()
	ctx, cancel := context.WithCancel(t.Context())
	given := make(chan *Given, 100)
	ended := make(chan error, 1)
	go func() {
		ended <- a.client().Watch(ctx, Request{Kind: JWT, Audience: []string{"orders"}}, func(g *Given) { given <- g }, func(err error) { t.Log(err) })
	}()
	seen := map[string]bool{}
	for len(seen) < 3 {
		g := <-given
		if left := time.Until(g.Ends()); left <= 0 {
			t.Errorf("a token ended %s ago", -left)
		}
		seen[g.Identities[0].Token] = true
	}
	a.set(func() { a.jwt.KeyID = "key-2"; a.keys = []string{a.jwt.JWK()}; a.tokens = a.token("/web", time.Hour) })
	for {
		g := <-given
		header, _, _ := strings.Cut(g.Identities[0].Token, ".")
		if bytes.Contains(g.Bundles[0].JWT, []byte("key-2")) && time.Until(g.Ends()) > time.Minute {
			t.Logf("token %s…", header)
			break
		}
	}
	cancel()
	<-ended
}

func TestBundles(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.keys = []string{a.jwt.JWK()}
	a.serve()
	given, err := a.client().Fetch(within(t, time.Minute), Request{Kind: Bundles})
	if err != nil {
		t.Fatal(err)
	}
	files, err := (&Names{}).Files(given)
	if want := []string{"bundle.example.org.pem", "jwt_bundle.example.org.json"}; err != nil || !slices.Equal(names(files), want) {
		t.Errorf("files %v, want %v; %v", names(files), want, err)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.serve()
	c := a.client()
	token := a.jwt.SVID("/web", time.Now(), time.Hour, "orders")
	svid, err := c.Validate(within(t, time.Minute), token, "orders")
	if err != nil || svid.ID.Path() != "/web" {
		t.Errorf("%v, %v", svid, err)
	}
	a.set(func() { a.refuse = status.Error(codes.InvalidArgument, "token has expired") })
	if _, err := c.Validate(within(t, time.Minute), token, "orders"); err == nil || err.Error() != "not valid: token has expired" {
		t.Error(err)
	}
	if _, err := c.Validate(within(t, time.Minute), strings.Repeat("x", MaxToken+1), "orders"); err == nil || !strings.Contains(err.Error(), "65537 bytes") {
		t.Error(err)
	}
	a.set(func() { a.refuse = status.Error(codes.Unavailable, "not yet") })
	if _, err := c.Validate(within(t, 300*time.Millisecond), token, "orders"); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
}

func TestTarget(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		"/run/api.sock":                "unix:///run/api.sock",
		"unix:/run/api.sock":           "unix:///run/api.sock",
		"unix:///run/api.sock":         "unix:///run/api.sock",
		"tcp://127.0.0.1:8080":         "tcp://127.0.0.1:8080",
		"tcp://host:8080":              "",
		"tcp:nonsense":                 "",
		"unix:":                        "",
		"":                             "",
		"http://x/y":                   "",
		"/" + strings.Repeat("x", 107): "",
	} {
		got, err := target(address)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", address, got, err, want)
		}
	}
}

func TestNamesCheck(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		names Names
		want  string
	}{
		{Names{}, ""},
		{Names{SVID: "tls.crt", KeyMode: 0o640, CertMode: 0o444}, ""},
		{Names{SVID: "a/b"}, `file name "a/b"`},
		{Names{Key: "..data"}, `file name "..data"`},
		{Names{KeyMode: 0o644}, "mode 0644 of keys and tokens"},
		{Names{CertMode: 0o755}, "mode 0755 of certificates"},
	} {
		err := c.names.Check()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%+v: %v", c.names, err)
		}
	}
}

// FuzzDirectory has any hint, and any SPIFFE ID: no file is outside of the
// directory, or takes its own name.
func FuzzDirectory(f *testing.F) {
	for _, hint := range []string{"", "internal", "..", "../x", "..data", "a/b", "\x00"} {
		f.Add(hint, "spiffe://example.org/ns/web")
	}
	f.Fuzz(func(t *testing.T, hint, id string) {
		parsed, err := spiffeid.FromString(id)
		if err != nil || parsed.Path() == "" {
			return
		}
		dir := directory(&Identity{ID: parsed, Hint: hint})
		if dir == "" || strings.HasPrefix(dir, "/") || slices.Contains(strings.Split(dir, "/"), "..") || slices.Contains(strings.Split(dir, "/"), "") {
			t.Errorf("hint %q, %s: directory %q", hint, id, dir)
		}
	})
}
