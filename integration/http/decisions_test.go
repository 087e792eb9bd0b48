//go:build integration

package http_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// house is an inbound proxy before a service in Go, with a client that proves
// who it is.
type house struct {
	*mesh.Node
	t       *testing.T
	service *mesh.Service
	own     *mesh.SVID
	client  *http.Client
	base    string // URL
}

// newHouse starts one with these rules; more is further YAML of the listener.
func newHouse(t *testing.T, rules []string, more ...string) *house {
	t.Helper()
	h := &house{t: t, service: mesh.NewService(t)}
	ca := mesh.NewAuthority(t)
	h.own = ca.Leaf("/client")
	h.client = clientOf(t, h.own)
	h.Node = mesh.NewNode(t, "house", ca.Leaf("/server"))
	h.base = "https://" + h.Inbound("house", h.service.Address, more...)
	h.Rules(rules...)
	h.Start()
	return h
}

// do makes a request, which has to be answered.
func (h *house) do(method, path string, fields ...string) mesh.Answer {
	h.t.Helper()
	a, err := mesh.Fetch(h.client, method, h.base+path, nil, fields...)
	if err != nil {
		h.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

var orderRules = []string{
	mesh.Allow("client-reads", mesh.ID("/client"), `http: {methods: [GET, HEAD], paths: ["/v1/orders/{id}"]}`),
	mesh.Allow("client-writes-as-clerk", mesh.ID("/client"), `http: {methods: [POST], paths: ["/v1/**"], headers: {x-role: [clerk]}}`),
	mesh.Allow("client-at-shop", mesh.ID("/client"), `http: {hosts: [shop.example], paths: ["/shop/**"]}`),
	mesh.Allow("client-asks", mesh.ID("/client"), `when: 'request.path.startsWith("/cel/") && "x-reason" in request.headers'`),
	`{id: nobody-deletes, effect: deny, http: {methods: [DELETE]}}`,
	mesh.Allow("client-deletes", mesh.ID("/client"), `http: {paths: ["/v1/orders/{id}"]}`, "shadow: true"),
}

// TestDecisions: each request is decided by its method, path, host and fields,
// and leaves a record that says so.
func TestDecisions(t *testing.T) {
	t.Parallel()
	h := newHouse(t, orderRules)
	for i, c := range []struct {
		method, path string
		fields       []string
		rule         string // empty: none allows it
	}{
		{"GET", "/v1/orders/7", nil, "client-reads"},
		{"HEAD", "/v1/orders/7", nil, "client-reads"},
		{"GET", "/v1/orders/%37", nil, "client-reads"},
		{"GET", "/v1/orders/7?all=yes", nil, "client-reads"},
		{"GET", "/v1/orders/7/lines", nil, ""},
		{"GET", "/v1/orders/", nil, ""},
		{"PUT", "/v1/orders/7", nil, ""},
		{"POST", "/v1/orders", []string{"X-Role: clerk"}, "client-writes-as-clerk"},
		{"POST", "/v1/orders", []string{"X-Role: clerk", "X-Role: visitor"}, ""},
		{"POST", "/v1/orders", []string{"X-Role: clerk", "Connection: x-role"}, ""},
		{"POST", "/v1/orders", nil, ""},
		{"GET", "/shop/a", []string{"Host: shop.example"}, "client-at-shop"},
		{"GET", "/shop/a", []string{"Host: SHOP.example."}, "client-at-shop"},
		{"GET", "/shop/a", []string{"Host: other.example"}, ""},
		{"GET", "/cel/a", []string{"X-Reason: because"}, "client-asks"},
		{"GET", "/cel/a", nil, ""},
		{"DELETE", "/v1/orders/7", nil, ""},
	} {
		before, began := len(h.Records()), h.service.Began.Load()
		request := fmt.Sprintf("case-%d", i)
		got := h.do(c.method, c.path, append(c.fields, "X-Request-Id: "+request)...)
		allowed := c.rule != ""
		if want := map[bool]int{true: http.StatusOK, false: http.StatusForbidden}[allowed]; got.Status != want {
			t.Errorf("%s %s %q: %d, want %d", c.method, c.path, c.fields, got.Status, want)
		}
		if came := h.service.Began.Load() > began; came != allowed {
			t.Errorf("%s %s %q came to the service: %t", c.method, c.path, c.fields, came)
		}
		if !allowed && (len(got.Body) > 100 || !strings.Contains(got.Body, request) || strings.Contains(got.Body, "rule") || got.Header.Get("X-Request-Id") != request) {
			t.Errorf("the client is told %v %q", got.Header, got.Body)
		}
		a := h.Record(before, request, func(a telemetry.Access) bool { return a.HTTP != nil && a.HTTP.RequestID == request })
		want := telemetry.AccessHTTP{Method: c.method, Host: a.HTTP.Host, Path: a.HTTP.Path, Status: got.Status, RequestID: request, UserAgent: "Go-http-client/1.1"}
		if *a.HTTP != want || a.Rule != c.rule && c.method != http.MethodDelete || a.From != h.own.ID || a.To != mesh.ID("/server") || allowed != (a.Reason == "") || allowed != (a.Decision == "allow") {
			t.Errorf("%s %s %q: the record is %+v %+v", c.method, c.path, c.fields, a, *a.HTTP)
		}
		if a.BytesIn < 50 || a.BytesOut < 50 {
			t.Errorf("%s %s: the record has %d bytes that came and %d that went", c.method, c.path, a.BytesIn, a.BytesOut)
		}
		if strings.Contains(a.HTTP.Path, "?") || strings.Contains(a.HTTP.Path, "%37") {
			t.Errorf("the record of %s has the path %q", c.path, a.HTTP.Path)
		}
	}
	if !slices.ContainsFunc(h.Records(), func(a telemetry.Access) bool { return slices.Contains(a.Shadow, "client-deletes") }) {
		t.Error("no record names the rule in shadow")
	}
}

// TestIdentityHeader: the service learns who calls from us alone.
func TestIdentityHeader(t *testing.T) {
	t.Parallel()
	h := newHouse(t, []string{mesh.Allow("client-may", mesh.ID("/client"))}, "identity_header: {name: x-peer}")
	h.do("GET", "/a", "X-Peer: spiffe://example.org/admin", "X_Peer: spiffe://example.org/admin")
	got := h.service.Header(t, "/a")
	if peers := got["X-Peer"]; len(peers) != 1 || peers[0] != h.own.ID {
		t.Errorf("the service was told %v", got)
	}
	for name := range got {
		if strings.Contains(name, "_") {
			t.Errorf("the service was told %v", got)
		}
	}
}

// TestReloadBetweenRequests: the connection that a client keeps is decided
// anew with each request.
func TestReloadBetweenRequests(t *testing.T) {
	t.Parallel()
	may := mesh.Allow("client-may", mesh.ID("/client"), `http: {paths: ["/a"]}`)
	h := newHouse(t, []string{may})
	c := dialTLS(t, strings.TrimPrefix(h.base, "https://"), h.own)
	ask := func(path string, want int) {
		t.Helper()
		if got := askOn(t, c, "GET "+path+" HTTP/1.1\r\nHost: a.example\r\n\r\n"); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
	ask("/a", http.StatusOK)
	ask("/b", http.StatusForbidden)
	h.ChangeRules(mesh.Allow("client-may-by-now", mesh.ID("/client"), `http: {paths: ["/b"]}`))
	ask("/a", http.StatusForbidden)
	ask("/b", http.StatusOK)
	h.ChangeRules(may)
	ask("/a", http.StatusOK)
}

// askOn sends a request as it stands and returns the status of the answer, of
// which it reads all.
func askOn(t *testing.T, c net.Conn, raw string) int {
	t.Helper()
	if _, err := io.WriteString(c, raw); err != nil {
		t.Fatal(err)
	}
	// Nothing comes behind the answer that another reader would miss.
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode
}

// TestPipelinedAfterRefusal: what follows a request that is refused is served
// where that request had no body, and not where a body of it may be in the way.
func TestPipelinedAfterRefusal(t *testing.T) {
	t.Parallel()
	h := newHouse(t, []string{mesh.Allow("client-may", mesh.ID("/client"), `http: {paths: ["/a"]}`)})
	const good = "GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n"
	for _, c := range []struct {
		first string
		want  []int
	}{
		{"GET /b HTTP/1.1\r\nHost: a.example\r\n\r\n", []int{403, 200}},
		{"POST /b HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0\r\n\r\n", []int{403, 200}},
		{"POST /b HTTP/1.1\r\nHost: a.example\r\nContent-Length: 100\r\n\r\n", []int{403}},
		{fmt.Sprintf("POST /b HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n%s", len(good), good), []int{403}},
		{"POST /b HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", []int{403}},
		{"POST /b HTTP/1.1\r\nHost: a.example\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", []int{403}},
		{"GET /b HTTP/1.0\r\nHost: a.example\r\nConnection: keep-alive\r\n\r\n", []int{403}},
	} {
		began := h.service.Began.Load()
		got, err := try(func() (net.Conn, error) { return dialTLS(t, strings.TrimPrefix(h.base, "https://"), h.own), nil },
			c.first+strings.Replace(good, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1))
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q and a good request: %v, %v, want %v", c.first, got, err, c.want)
		}
		if came := int(h.service.Began.Load() - began); came != len(c.want)-1 {
			t.Errorf("%q and a good request: %d came to the service", c.first, came)
		}
	}
}

// TestTooManyRequests: who asks more than a limit allows is told when to come
// again, on the connection that it keeps.
func TestTooManyRequests(t *testing.T) {
	t.Parallel()
	h := newHouse(t, []string{mesh.Allow("client-may", mesh.ID("/client"))})
	h.Policy("rules:\n  - " + mesh.Allow("client-may", mesh.ID("/client")) + "\nlimits:\n  - " + fmt.Sprintf("{id: few, from: [%q], per: identity, rps: 0.01, burst: 3}", h.own.ID))
	h.Reload()
	statuses := map[int]int{}
	for range 10 {
		a := h.do("GET", "/a")
		statuses[a.Status]++
		if a.Status != http.StatusTooManyRequests {
			continue
		}
		if after, err := strconv.Atoi(a.Header.Get("Retry-After")); err != nil || after < 1 || after > 100 {
			t.Errorf("retry-after: %q", a.Header.Get("Retry-After"))
		}
	}
	if statuses[http.StatusOK] < 3 || statuses[http.StatusOK] > 4 || statuses[http.StatusTooManyRequests]+statuses[http.StatusOK] != 10 {
		t.Errorf("answers by status: %v", statuses)
	}
	a := h.Record(0, "429", func(a telemetry.Access) bool { return a.HTTP != nil && a.HTTP.Status == http.StatusTooManyRequests })
	if a.Limit != "few" || a.Outcome != "failure" {
		t.Errorf("the record: %+v", a)
	}
	if live := h.Live(); live != 1 {
		t.Errorf("%d connections, want the one", live)
	}
}

// TestRulesFromRequests walks from a log of requests to rules that allow just
// them.
func TestRulesFromRequests(t *testing.T) {
	t.Parallel()
	h := newHouse(t, []string{mesh.Allow("client-reads", mesh.ID("/client"), `http: {methods: [GET], paths: ["/v1/orders/{id}"]}`)}, "enforcement: audit")
	for _, request := range []string{"GET /v1/orders/7", "GET /v1/orders/8", "POST /v1/orders", "POST /v1/orders", "GET /v1/items/a/b"} {
		method, path, _ := strings.Cut(request, " ")
		if a := h.do(method, path); a.Status != http.StatusOK {
			t.Errorf("%s is refused by an audit: %d", request, a.Status)
		}
	}
	stage.Eventually(t, stage.Soon, "five records", func() error {
		if n := len(h.Records()); n < 5 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	suggested, said := policyCommand(t, 0, "suggest", "-f", h.File("rules.yaml"), h.AccessFile())
	for _, want := range []string{"5 records of decisions", "2 allowed already"} {
		if !strings.Contains(said, want) {
			t.Errorf("want %q in\n%s", want, said)
		}
	}
	next := stage.Folder(t, "next")
	stage.WriteFile(t, next+"/rules.yaml", stage.ReadFile(t, h.File("rules.yaml")), 0o644)
	stage.WriteFile(t, next+"/suggested.yaml", suggested, 0o644)
	changes, _ := policyCommand(t, 1, "diff", h.File("rules.yaml"), next, "--replay", h.AccessFile())
	for _, want := range []string{"3 of 5 records would be decided otherwise", "ALLOWED BY NOW"} {
		if !strings.Contains(changes, want) {
			t.Errorf("want %q in\n%s", want, changes)
		}
	}

	more := strings.SplitN(suggested, "rules:\n", 2)
	if len(more) != 2 {
		t.Fatalf("suggested\n%s", suggested)
	}
	h.Policy("rules:\n  - " + mesh.Allow("client-reads", mesh.ID("/client"), `http: {methods: [GET], paths: ["/v1/orders/{id}"]}`) + "\n" + more[1])
	h.Listeners[0] = strings.Replace(h.Listeners[0], "enforcement: audit", "enforcement: enforce", 1)
	h.Configure()
	h.Reload()
	for request, want := range map[string]int{
		"GET /v1/orders/7": 200, "POST /v1/orders": 200, "GET /v1/items/a/b": 200, "DELETE /v1/orders/7": 403, "GET /admin": 403,
	} {
		method, path, _ := strings.Cut(request, " ")
		if a := h.do(method, path); a.Status != want {
			t.Errorf("%s: %d, want %d\n%s", request, a.Status, want, suggested)
		}
	}
}

// policyCommand runs a policy command, which must end with that status, and
// returns what it wrote to standard output and error.
func policyCommand(t *testing.T, status int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	cmd := exec.CommandContext(t.Context(), stage.Narthex, append([]string{"policy"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != status {
		t.Errorf("policy %s: %v, want status %d\n%s%s", strings.Join(args, " "), err, status, out.String(), errs.String())
	}
	return out.String(), errs.String()
}
