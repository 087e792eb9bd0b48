package k8s

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log" //nolint:depguard // what net/http takes, to be discarded
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

const nodeName = "node-1"

// podJSON is a pod as a kubelet lists it, with what no selector comes from.
func podJSON(n int, change func(map[string]any)) map[string]any {
	uid := fmt.Sprintf("%08d-b29f-11e7-9350-020968147796", n)
	name := fmt.Sprintf("orders-%d", n)
	status := func(kind, containerName string) map[string]any {
		return map[string]any{
			"name": containerName, "containerID": "containerd://" + containerID(n, kind), "ready": true, "started": true, "restartCount": 0,
			"image":   "registry.example.org/shop/" + containerName + ":1.4",
			"imageID": "registry.example.org/shop/" + containerName + "@sha256:" + strings.Repeat("e", 64),
			"state":   map[string]any{"running": map[string]any{"startedAt": "2026-07-01T10:00:00Z"}},
		}
	}
	var env, mounts []any
	for i := range 40 {
		env = append(env, map[string]any{"name": fmt.Sprintf("SETTING_NUMBER_%d", i), "value": strings.Repeat("v", 60)})
		mounts = append(mounts, map[string]any{"name": fmt.Sprintf("volume-%d", i), "mountPath": fmt.Sprintf("/var/run/shop/%d", i), "readOnly": true})
	}
	p := map[string]any{
		"metadata": map[string]any{
			"name": name, "namespace": "shop", "uid": uid, "resourceVersion": strconv.Itoa(1000 + n), "creationTimestamp": "2026-07-01T10:00:00Z",
			"labels":      map[string]any{"app": "orders", "app.kubernetes.io/part-of": "shop", "pod-template-hash": "7d9c5b8f6d", "version": "v1"},
			"annotations": map[string]any{"kubectl.kubernetes.io/last-applied-configuration": strings.Repeat("{\"a\":1}", 300)},
			"ownerReferences": []any{map[string]any{
				"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "orders-7d9c5b8f6d", "uid": "11111111-2222-3333-4444-555555555555", "controller": true,
			}},
			"managedFields": []any{map[string]any{"manager": "kube-controller-manager", "operation": "Update", "fieldsV1": map[string]any{"f:metadata": map[string]any{"f:labels": map[string]any{".": map[string]any{}}}}}},
		},
		"spec": map[string]any{
			"nodeName": nodeName, "serviceAccountName": "orders", "serviceAccount": "orders",
			"containers": []any{map[string]any{"name": "app", "image": "registry.example.org/shop/app:1.4", "env": env, "volumeMounts": mounts}},
		},
		"status": map[string]any{
			"phase": "Running", "podIP": "10.244.0.7", "qosClass": "Burstable",
			"containerStatuses":          []any{status("app", "app"), status("log", "log")},
			"initContainerStatuses":      []any{status("init", "migrate"), status("sidecar", "mesh")},
			"ephemeralContainerStatuses": []any{status("debug", "debugger")},
		},
	}
	if change != nil {
		change(p)
	}
	return p
}

func podUID(n int) string { return fmt.Sprintf("%08d-b29f-11e7-9350-020968147796", n) }

// containerID is that of one of the containers of podJSON(n).
func containerID(n int, kind string) string {
	return fmt.Sprintf("%032x%032x", n, []byte(kind))
}

func status(p map[string]any, list string, i int) map[string]any {
	return p["status"].(map[string]any)[list].([]any)[i].(map[string]any)
}

func labels(p map[string]any) map[string]any {
	return p["metadata"].(map[string]any)["labels"].(map[string]any)
}

func podList(pods ...map[string]any) []byte {
	list, err := json.Marshal(map[string]any{"kind": "PodList", "apiVersion": "v1", "metadata": map[string]any{}, "items": pods})
	if err != nil {
		panic(err)
	}
	return list
}

func manyPods(n int) []byte {
	pods := make([]map[string]any, n)
	for i := range pods {
		pods[i] = podJSON(i, nil)
	}
	return podList(pods...)
}

// kubelet stands where a real one stands in integration/kubernetes: what it
// answers here is made up, so that it can be wrong. It speaks real TLS and
// looks at what the client proves.
type kubelet struct {
	*httptest.Server
	cfg Kubelet // that reaches it, with a token

	mu       sync.Mutex
	token    string
	answer   http.HandlerFunc // after authentication; nil: the pods
	pods     []byte
	requests int
	conns    map[string]bool // remote addresses
}

func startKubelet(t *testing.T, pods []byte) *kubelet {
	t.Helper()
	k := &kubelet{token: "the-token", pods: pods, conns: map[string]bool{}}
	k.Server = httptest.NewUnstartedServer(http.HandlerFunc(k.serve))
	k.Config.ErrorLog = log.New(io.Discard, "", 0)
	dir := t.TempDir()
	ca, cert := issue(t, "node-1")
	k.TLS = serverTLS(t, cert)
	k.StartTLS()
	t.Cleanup(k.Close)
	u, err := url.Parse(k.URL)
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		t.Fatal(err)
	}
	k.cfg = Kubelet{Port: port, CA: filepath.Join(dir, "ca.crt"), Token: filepath.Join(dir, "token")}
	write(t, k.cfg.CA, string(ca))
	write(t, k.cfg.Token, k.token+"\n")
	return k
}

func (k *kubelet) serve(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	k.requests++
	k.conns[r.RemoteAddr] = true
	token, answer, pods := k.token, k.answer, k.pods
	k.mu.Unlock()
	switch {
	case r.TLS != nil && len(r.TLS.PeerCertificates) == 0 && r.Header.Get("Authorization") != "Bearer "+token:
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
	case r.URL.Path != "/pods" || r.Method != http.MethodGet:
		http.NotFound(w, r)
	case answer != nil:
		answer(w, r)
	default:
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(pods)
	}
}

func (k *kubelet) change(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

func (k *kubelet) asked() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.requests
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func serverTLS(t *testing.T, pair [2][]byte) *tls.Config {
	t.Helper()
	cert, err := tls.X509KeyPair(pair[0], pair[1])
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}
}

// issue makes a CA and a certificate of it for a name, as PEM and with its
// key.
func issue(t *testing.T, name string) (caPEM []byte, pair [2][]byte) {
	t.Helper()
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	year := time.Now().Add(24 * time.Hour)
	caKey, key := newKey(), newKey()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubelet CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: year,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: year,
		DNSNames: []string{name}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	return block("CERTIFICATE", caDER), [2][]byte{block("CERTIFICATE", der), block("PRIVATE KEY", keyDER)}
}

// self is this process, pinned: a real one, for attestors that look whether
// it is still there.
func self(t testing.TB) *attestor.Process {
	t.Helper()
	p, err := attestor.Pin(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// inside has an attestor believe that every process is in this container of
// pod n.
func (a *Attestor) inside(n int, kind string) *Attestor {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.own, a.readOwn = "", func() (string, error) { return ownAlone, nil }
	a.readFirst = func() (string, error) { return "0::/init.scope\n", nil }
	return a.in(func(*attestor.Process) (string, error) {
		return "0::/kubepods/burstable/pod" + podUID(n) + "/" + containerID(n, kind) + "\n", nil
	})
}

// in has the attestor read that for every process's cgroups, also for those it
// has read before.
func (a *Attestor) in(read func(*attestor.Process) (string, error)) *Attestor {
	a.where = a.placeBy(read)
	return a
}

// running runs an attestor until the test ends.
func running(t testing.TB, a *Attestor) *Attestor {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() {
		if err := a.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		run.Wait()
	})
	return a
}

func values(selectors []attestor.Selector) string {
	var lines []string
	for _, s := range selectors {
		lines = append(lines, s.String())
	}
	return strings.Join(lines, "\n")
}

// refusing is an address at which nobody listens.
func refusing(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
