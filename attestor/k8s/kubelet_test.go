package k8s

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestKubelet(t *testing.T) {
	k := startKubelet(t, manyPods(2))
	c := newClient(k.cfg, nodeName)
	for range 3 {
		l, err := c.pods(t.Context(), nil)
		if err != nil || l.count != 2 || l.began.IsZero() {
			t.Fatalf("got %v, %v", l, err)
		}
	}
	if len(k.conns) != 1 {
		t.Errorf("%d connections for 3 requests", len(k.conns))
	}
}

func TestKubeletWithCertificate(t *testing.T) {
	k := startKubelet(t, manyPods(2))
	dir := t.TempDir()
	_, pair := issue(t, "agent")
	cfg := k.cfg
	cfg.Token, cfg.Certificate, cfg.Key = "", filepath.Join(dir, "agent.crt"), filepath.Join(dir, "agent.key")
	write(t, cfg.Certificate, string(pair[0]))
	write(t, cfg.Key, string(pair[1]))
	if l, err := newClient(cfg, "").pods(t.Context(), nil); err != nil || l.count != 2 {
		t.Fatalf("got %v, %v", l, err)
	}
	_, other := issue(t, "other")
	write(t, cfg.Key, string(other[1]))
	if _, err := newClient(cfg, "").pods(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "private key does not match") {
		t.Fatalf("error %v", err)
	}
}

func TestReadOnlyPort(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("a token came over plain HTTP")
		}
		_, _ = w.Write(manyPods(2))
	}))
	defer plain.Close()
	c := newClient(Kubelet{Port: plain.Listener.Addr().(*net.TCPAddr).Port, ReadOnly: true, CA: "/none", Token: "/none"}, "")
	if l, err := c.pods(t.Context(), nil); err != nil || l.count != 2 {
		t.Fatalf("got %v, %v", l, err)
	}
}

func TestDefaults(t *testing.T) {
	for want, cfg := range map[string]Kubelet{
		"https://127.0.0.1:10250/pods /var/run/secrets/kubernetes.io/serviceaccount/token /var/run/secrets/kubernetes.io/serviceaccount/ca.crt": {},
		"http://127.0.0.1:10255/pods /var/run/secrets/kubernetes.io/serviceaccount/token /var/run/secrets/kubernetes.io/serviceaccount/ca.crt":  {ReadOnly: true},
		"https://[fd00::1]:1/pods  ca": {Host: "fd00::1", Port: 1, CA: "ca", Certificate: "c", Key: "k"},
	} {
		c := newClient(cfg, "")
		if got := fmt.Sprintf("%s %s %s", c.url.String(), c.cfg.Token, c.cfg.CA); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// TestBadAnswers holds what a person reads. Each is one line, and none shows
// the token.
func TestBadAnswers(t *testing.T) {
	otherCA, _ := issue(t, "other")
	say := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
		}
	}
	for name, test := range map[string]struct {
		change func(t *testing.T, k *kubelet)
		answer http.HandlerFunc
		want   []string
		not    string // what callers are not to read
	}{
		"401": {
			change: func(t *testing.T, k *kubelet) { write(t, k.cfg.Token, "the-token-of-another") },
			want:   []string{`401 Unauthorized: "Unauthorized"; it does not accept the token in`, "not expired", "authentication.webhook.enabled"},
		},
		"401 with a certificate": {
			change: func(t *testing.T, k *kubelet) {
				_, pair := issue(t, "agent")
				k.cfg.Certificate, k.cfg.Key = k.cfg.Token+".crt", k.cfg.Token+".key"
				write(t, k.cfg.Certificate, string(pair[0]))
				write(t, k.cfg.Key, string(pair[1]))
			},
			answer: say(http.StatusUnauthorized, "Unauthorized"),
			want:   []string{"it does not accept the certificate in"},
		},
		"403": {
			answer: say(http.StatusForbidden, "Forbidden (user=system:serviceaccount:narthex:narthex, verb=get, resource=nodes, subresource(s)=[pods proxy])"),
			want:   []string{`403 Forbidden: "Forbidden (user=system:serviceaccount:narthex`, "get on nodes/pods (Kubernetes 1.33 and later", "nodes/proxy"},
		},
		"500": {answer: say(http.StatusInternalServerError, "boom\n\x1b[31mred"), want: []string{`500 Internal Server Error: "boom [31mred"`}},
		"redirect": {answer: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.2/pods", http.StatusFound)
		}, want: []string{"302 Found", "redirects are not followed"}},
		"cut list":    {answer: say(http.StatusOK, `{"kind":"PodList","items":[{"metadata":{"name":"secret-of-another"}`), want: []string{"no list of pods"}, not: "secret-of-another"},
		"garbage":     {answer: say(http.StatusOK, "<html>\nno pods</html>"), want: []string{"no list of pods: \"<\" where \"{\" should be", `it begins with "<html> no pods</html>"`}},
		"much of it":  {answer: say(http.StatusOK, strings.Repeat("\x00\xff garbage", 100_000)), want: []string{"no list of pods", `begins with "garbage garbage`}},
		"long string": {answer: say(http.StatusOK, `{"items":["`+strings.Repeat("x", 1<<20)), want: []string{"it ends in the middle"}},
		"cut off": {
			answer: func(w http.ResponseWriter, _ *http.Request) {
				list := manyPods(3)
				w.Header().Set("Content-Length", fmt.Sprint(len(list)))
				_, _ = w.Write(list[:len(list)/2])
			},
			want: []string{"it ends in the middle"},
		},
		"status": {answer: say(http.StatusOK, `{"kind":"Status","status":"Failure"}`), want: []string{`kind "Status" instead of PodList`}},
		"many headers": {answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", maxHeaders+1<<12))
		}, want: []string{"ask the kubelet at https://127.0.0.1:"}},
		"unknown authority": {change: func(t *testing.T, k *kubelet) { write(t, k.cfg.CA, string(otherCA)) }, want: []string{"unknown authority", "give kubelet.ca the CA of 127.0.0.1", "kubelet.skip_verification"}},
		"no CA":             {change: func(_ *testing.T, k *kubelet) { k.cfg.CA = "/none" }, want: []string{"ask the kubelet: CA: open /none: no such file"}},
		"empty CA":          {change: func(t *testing.T, k *kubelet) { write(t, k.cfg.CA, "") }, want: []string{"CA: no certificate in"}},
		"no token":          {change: func(_ *testing.T, k *kubelet) { k.cfg.Token = "/none" }, want: []string{"ask the kubelet: token: open /none: no such file"}},
		"empty token":       {change: func(t *testing.T, k *kubelet) { write(t, k.cfg.Token, "\n") }, want: []string{"holds none"}},
		"huge token":        {change: func(t *testing.T, k *kubelet) { write(t, k.cfg.Token, strings.Repeat("x", maxCredential+1)) }, want: []string{"longer than 1048576 bytes"}},
		"nobody there":      {change: func(t *testing.T, k *kubelet) { k.cfg.Port = refusing(t) }, want: []string{"connection refused"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := startKubelet(t, manyPods(1))
			k.answer = test.answer
			if test.change != nil {
				test.change(t, k)
			}
			l, err := newClient(k.cfg, nodeName).pods(t.Context(), nil)
			if err == nil || l != nil {
				t.Fatalf("got %v", l)
			}
			text := err.Error()
			for _, want := range test.want {
				if !strings.Contains(text, want) {
					t.Errorf("error %s\nlacks %s", text, want)
				}
			}
			if strings.Contains(text, "\n") || strings.Contains(text, "the-token") || len(text) > 1000 || test.not != "" && strings.Contains(text, test.not) {
				t.Errorf("error %q", text)
			}
		})
	}
}

// TestNameIsVerified: only on loopback addresses may the certificate be for
// any name.
func TestNameIsVerified(t *testing.T) {
	ca, pair := issue(t, "node-1")
	dir := t.TempDir()
	cfg := Kubelet{CA: filepath.Join(dir, "ca"), Token: filepath.Join(dir, "token")}
	write(t, cfg.CA, string(ca))
	write(t, cfg.Token, "token")
	for host, skipped := range map[string]bool{"127.0.0.1": true, "127.1.2.3": true, "::1": true, "localhost": true, "node-1": false, "10.0.0.7": false, "localhost.example.org": false} {
		cfg.Host = host
		conf, _, _, err := newClient(cfg, "").read()
		if err != nil {
			t.Fatal(err)
		}
		if conf.InsecureSkipVerify != skipped || (conf.VerifyConnection != nil) != skipped || conf.RootCAs == nil || conf.ServerName != host {
			t.Errorf("%s: %v", host, conf.InsecureSkipVerify)
		}
	}
	block, _ := pem.Decode(pair[0])
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	err = newClient(cfg, "").explain(t.Context(), leaf.VerifyHostname("10.0.0.7"))
	if !strings.Contains(err.Error(), "10.0.0.7") || !strings.Contains(err.Error(), "; give kubelet.host or kubelet.host_env") {
		t.Errorf("error %v", err)
	}
}

func TestSkipVerification(t *testing.T) {
	k := startKubelet(t, manyPods(1))
	otherCA, _ := issue(t, "other")
	write(t, k.cfg.CA, string(otherCA))
	k.cfg.SkipVerification = true
	if _, err := newClient(k.cfg, nodeName).pods(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
}

func TestProxyVariablesAreNotUsed(t *testing.T) {
	k := startKubelet(t, manyPods(1))
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "ALL_PROXY"} {
		t.Setenv(name, "http://127.0.0.1:1")
	}
	if _, err := newClient(k.cfg, nodeName).pods(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
}

// TestTokenIsReadAgain: a token that is refused is read again at once, and
// once more asked with if it has changed.
func TestTokenIsReadAgain(t *testing.T) {
	k := startKubelet(t, manyPods(1))
	c := newClient(k.cfg, nodeName)
	ask := func() error {
		_, err := c.pods(t.Context(), nil)
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	k.change(func() { k.token = "second" })
	before := k.asked()
	if err := ask(); err == nil || k.asked() != before+1 {
		t.Fatalf("error %v, %d requests", err, k.asked()-before)
	}
	write(t, k.cfg.Token, "second")
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	write(t, k.cfg.Token, "third")
	k.change(func() { k.token = "third" })
	before = k.asked()
	if err := ask(); err != nil || k.asked() != before+2 {
		t.Fatalf("error %v, %d requests", err, k.asked()-before)
	}
}

// TestCredentialsAreReadEachMinute looks at what is read, not at what the
// kubelet makes of it.
func TestCredentialsAreReadEachMinute(t *testing.T) {
	ca, _ := issue(t, "kubelet")
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		cfg := Kubelet{CA: filepath.Join(dir, "ca"), Token: filepath.Join(dir, "token")}
		write(t, cfg.CA, string(ca))
		write(t, cfg.Token, "first")
		c := newClient(cfg, "")
		load := func(want string) *http.Transport {
			t.Helper()
			if err := c.load(); err != nil || c.token != want {
				t.Fatalf("token %q, %v; want %q", c.token, err, want)
			}
			return c.http
		}
		first := load("first")
		write(t, cfg.Token, "second")
		time.Sleep(reloadPeriod - time.Second)
		load("first")
		time.Sleep(time.Second)
		second := load("second")
		time.Sleep(reloadPeriod)
		if third := load("second"); first == second || second != third {
			t.Error("the connection is to be kept as long as nothing changes, and no longer")
		}
	})
}

func TestSlowKubelet(t *testing.T) {
	k := startKubelet(t, nil)
	release := make(chan struct{})
	defer close(release)
	k.answer = func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, `{"items":[`)
		_ = http.NewResponseController(w).Flush()
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := newClient(k.cfg, nodeName).pods(ctx, nil); err == nil || !strings.Contains(err.Error(), "no whole answer within 2m0s") {
		t.Fatalf("error %v", err)
	}
}

// TestLongAnswers: a kubelet may take its time as long as more keeps coming.
func TestLongAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		pods  int           // that come
		every time.Duration // one
		err   string
		after time.Duration
	}{
		"slow":           {pods: 9, every: 9 * time.Second, after: 81 * time.Second},
		"stalls":         {pods: 1, every: 11 * time.Second, err: "nothing more came for 10s", after: 10 * time.Second},
		"without an end": {pods: 1000, every: 9 * time.Second, err: "no whole answer within 2m0s", after: 2 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newClient(Kubelet{ReadOnly: true}, nodeName)
				if err := c.load(); err != nil {
					t.Fatal(err)
				}
				ours, kubelets := net.Pipe()
				c.http.DialContext = func(context.Context, string, string) (net.Conn, error) { return ours, nil }
				served := make(chan struct{})
				go func() {
					defer close(served)
					trickle(kubelets, test.pods, test.every)
				}()
				began := time.Now()
				l, err := c.pods(t.Context(), nil)
				took := time.Since(began)
				c.http.CloseIdleConnections()
				_ = ours.Close()
				<-served
				switch {
				case test.err == "" && (err != nil || l.count != test.pods):
					t.Errorf("got %v, %v", l, err)
				case test.err != "" && (!errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), test.err)):
					t.Errorf("error %v, want %q", err, test.err)
				}
				if took != test.after {
					t.Errorf("it took %s, want %s", took, test.after)
				}
			})
		})
	}
}

// trickle answers one request with a pod at a time, until nobody reads.
func trickle(conn net.Conn, pods int, every time.Duration) {
	defer conn.Close()
	if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
		return
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{\"items\":["); err != nil {
		return
	}
	for n := range pods {
		time.Sleep(every)
		comma := ","
		if n == 0 {
			comma = ""
		}
		if _, err := io.WriteString(conn, comma+"{}"); err != nil {
			return
		}
	}
	_, _ = io.WriteString(conn, "]}")
}
