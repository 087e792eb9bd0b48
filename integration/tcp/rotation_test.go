//go:build integration

package tcp_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// rotate is what an administrator would write: a new key and a certificate of
// openssl's, put in place in one of the ways that tools have.
//
//	rotate STYLE, in a folder with ca.pem, ca.key, ext and live/
const rotate = `set -eu
umask 077
openssl ecparam -name prime256v1 -genkey -noout -out new.key
openssl req -new -key new.key -subj /O=rotated -out new.csr
openssl x509 -req -in new.csr -CA ca.pem -CAkey ca.key -set_serial 0x$(openssl rand -hex 8) -days 1 -extfile ext -out new.pem 2>/dev/null
slowly() { # FILE: truncates, then writes in two halves
  half=$(( $(wc -c < new.$1) / 2 ))
  : > live/svid.$1; sleep 0.02
  head -c $half new.$1 > live/svid.$1; sleep 0.15
  tail -c +$((half + 1)) new.$1 >> live/svid.$1
}
case $1 in
  rename-cert-first) mv new.pem live/svid.pem; sleep 0.2; mv new.key live/svid.key ;;
  rename-key-first)  mv new.key live/svid.key; sleep 0.2; mv new.pem live/svid.pem ;;
  write-cert-first)  slowly pem; sleep 0.15; slowly key ;;
  write-key-first)   slowly key; sleep 0.15; slowly pem ;;
  remove)            rm live/svid.pem live/svid.key; sleep 0.2; cp new.key live/svid.key; cp new.pem live/svid.pem ;;
  directory)         rm -rf fresh stale; mkdir fresh; mv new.key fresh/svid.key; mv new.pem fresh/svid.pem
                     mv live stale; sleep 0.1; mv fresh live ;;
  kubernetes)        # live/svid.* are links into ..data, as the kubelet makes them
                     v=..$(date +%s%N); mkdir live/$v; mv new.key live/$v/svid.key; mv new.pem live/$v/svid.pem
                     old=$(readlink live/..data || true)
                     ln -s $v live/..data_tmp; mv -T live/..data_tmp live/..data
                     for f in pem key; do [ -L live/svid.$f ] || ln -sfn ..data/svid.$f live/svid.$f; done
                     [ -z "$old" ] || rm -rf "live/$old" ;;
esac
`

// TestFilesRotateUnderTraffic: a new certificate every second, written in
// every way that tools write, and no call that fails.
func TestFilesRotateUnderTraffic(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	client, answering := ca.leaf("/client"), serve(t, answerLines)
	n := newNode(t, "door", ca.leaf("/server"), ca)
	key, err := x509.MarshalPKCS8PrivateKey(ca.key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(n.file("live"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"ca.pem": string(certificatesPEM(ca.cert)), "rotate.sh": rotate,
		"ca.key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		"ext":    "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=URI:spiffe://example.org/server\n",
	} {
		stage.WriteFile(t, n.file(name), text, 0o600)
	}
	for _, name := range []string{"svid.pem", "svid.key"} { // the proxy knows them by links, as in a container
		if err := os.Rename(n.file(name), n.file("live/"+name)); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("live/"+name, n.file(name)); err != nil {
			t.Fatal(err)
		}
	}
	address := n.inbound("door", answering.address)
	n.rules(allow("client-may", client.id))
	n.start()

	long, err := tls.Dial("tcp", address, client.client())
	if err != nil {
		t.Fatal(err)
	}
	defer long.Close()
	var calls, failed atomic.Int64
	stop := make(chan struct{})
	var traffic sync.WaitGroup
	for range 3 {
		traffic.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
				calls.Add(1)
				if err := callAs(address, client, ca); err != nil {
					failed.Add(1)
					t.Errorf("a call failed: %v", err)
				}
			}
		})
	}
	const expiry = `narthex_svid_expiry_timestamp_seconds{listener="door"}`
	rotations := 0
	for _, style := range []string{"rename-cert-first", "rename-key-first", "write-cert-first", "write-key-first", "remove", "directory", "kubernetes"} {
		for range 3 {
			begun := time.Now()
			if out, err := stage.Tell(t, "bash", "-c", "cd "+n.dir+" && bash rotate.sh "+style); err != nil {
				t.Fatalf("%s: %v\n%s", style, err, out)
			}
			want := serialOf(t, n.file("live/svid.pem"))
			n.Becomes(stage.Soon, "presents what "+style+" wrote", func(s telemetry.Status) bool {
				return len(s.Proxy.Identities) == 1 && s.Proxy.Identities[0].Serial == want
			})
			rotations++
			time.Sleep(time.Until(begun.Add(time.Second)))
		}
		if err := ask(long, "hello"); err != nil {
			t.Errorf("%s: the connection that was there: %v", style, err)
		}
	}
	close(stop)
	traffic.Wait()
	t.Logf("%d rotations, %d calls, %d failed", rotations, calls.Load(), failed.Load())
	if left := n.Metric(expiry) - float64(time.Now().Unix()); left < 23*3600 || left > 25*3600 {
		t.Errorf("the metric says that the SVID ends in %v s", left)
	}

	// What is no file, or may not be read, holds nobody up.
	for what, put := range map[string]string{
		"a pipe":      "rm -f live/svid.pem; mkfifo live/svid.pem",
		"a directory": "rm -f live/svid.pem; mkdir live/svid.pem",
		"too large":   "rm -rf live/svid.pem; truncate -s 5M live/svid.pem",
	} {
		stage.Must(t, "bash", "-c", "cd "+n.dir+" && rm -rf live/svid.pem && "+put)
		n.Becomes(stage.Soon, what, func(s telemetry.Status) bool { return s.Proxy.Problem != "" })
		if err := callAs(address, client, ca); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func serialOf(t *testing.T, file string) string {
	t.Helper()
	block, _ := pem.Decode([]byte(stage.ReadFile(t, file)))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert.SerialNumber.Text(16)
}

// callAs makes one call and looks whom it has reached.
func callAs(address string, s *svid, ca *authority) error {
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	config := s.client()
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		leaf := cs.PeerCertificates[0]
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != ca.id("/server") {
			return fmt.Errorf("reached %v", leaf.URIs)
		}
		_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
		return err
	}
	c, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err
	}
	defer c.Close()
	return ask(c, "hello")
}
