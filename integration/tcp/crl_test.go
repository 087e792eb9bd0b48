//go:build integration

package tcp_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// opensslCA is the folder of `openssl ca` for an authority.
type opensslCA struct {
	t    *testing.T
	dir  string
	conf string
}

func newOpenSSLCA(t *testing.T, a *authority) *opensslCA {
	t.Helper()
	dir := stage.Folder(t, "openssl-ca")
	key, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"index.txt": "", "crlnumber": "01\n",
		"ca.pem": string(certificatesPEM(a.cert)),
		"ca.key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		"conf": fmt.Sprintf(`[ca]
default_ca = it
[it]
database = %[1]s/index.txt
crlnumber = %[1]s/crlnumber
certificate = %[1]s/ca.pem
private_key = %[1]s/ca.key
default_md = sha256
default_crl_days = 1
crl_extensions = ext
[ext]
authorityKeyIdentifier = keyid:always
`, dir),
	} {
		stage.WriteFile(t, dir+"/"+name, text, 0o600)
	}
	return &opensslCA{t, dir, dir + "/conf"}
}

// publish revokes and writes a new CRL to path, by rename.
func (o *opensslCA) publish(path string, revoked ...*svid) {
	o.t.Helper()
	for _, s := range revoked {
		stage.Must(o.t, "openssl", "ca", "-config", o.conf, "-revoke", s.certFile, "-crl_reason", "keyCompromise")
	}
	stage.Must(o.t, "openssl", "ca", "-config", o.conf, "-gencrl", "-out", o.dir+"/new")
	if err := os.Rename(o.dir+"/new", path); err != nil {
		o.t.Fatal(err)
	}
}

// liveSClient is an `openssl s_client` that stays connected. The channel is
// closed when it ends.
func liveSClient(t *testing.T, address string, s *svid) <-chan struct{} {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, "openssl", append([]string{"s_client", "-connect", address, "-quiet"}, with(s)...)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := stage.Watch(answer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	t.Cleanup(func() { cancel(); <-ended })
	_, _ = io.WriteString(in, "hello\n")
	select {
	case <-out.Seen:
	case <-time.After(stage.Soon):
		t.Fatalf("no answer:\n%s", out.All())
	}
	return ended
}

// crlDoor is a door that reads the CRLs of its folder.
func crlDoor(t *testing.T, first string) (*door, string) {
	t.Helper()
	d := &door{ca: newAuthority(t, "example.org"), service: serve(t, answerLines)}
	d.client = d.ca.leaf("/client")
	d.node = newNode(t, "door", d.ca.leaf("/server"), d.ca)
	d.address = d.inbound("door", d.service.address, "on_policy_change: keep")
	d.rules(allow("all", "spiffe://example.org/**"))
	if err := os.Mkdir(d.file("crls"), 0o755); err != nil {
		t.Fatal(err)
	}
	file := d.file("crls/ca.crl")
	if first != "" {
		stage.WriteFile(t, file, first, 0o644)
	}
	d.proxy = append(d.proxy, "crls: {example.org: [crls/*.crl]}")
	return d, file
}

func TestOpenSSLRevokesALiveConnection(t *testing.T) {
	t.Parallel()
	d, file := crlDoor(t, "")
	ca := newOpenSSLCA(t, d.ca)
	ca.publish(file)
	d.start()
	other := d.ca.leaf("/other")
	live, untouched := liveSClient(t, d.address, d.client), liveSClient(t, d.address, other)
	begun := time.Now()
	ca.publish(file, d.client)
	select {
	case <-live:
		t.Logf("closed %s after openssl began to revoke", time.Since(begun).Round(time.Millisecond))
	case <-time.After(stage.Soon):
		t.Fatal("the revoked client is still connected")
	}
	a := d.Record(0, "a revoked connection", func(a telemetry.Access) bool { return a.Closed == "revoked" })
	if a.From != d.client.id || a.Outcome != "failure" || !strings.Contains(a.Reason, "(keyCompromise), says CRL 2 of CN=root of example.org") {
		t.Errorf("access record %+v", a)
	}
	skip := len(d.Records())
	if out := sClient(t, d.address, with(d.client)...); strings.Contains(out, answer) {
		t.Errorf("a revoked client comes in:\n%s", out)
	}
	d.refused(skip, "(keyCompromise), says CRL 2")
	select {
	case <-untouched:
		t.Error("another client was closed too")
	default:
	}
	if out := sClient(t, d.address, with(other)...); !strings.Contains(out, answer) {
		t.Errorf("another client does not come in:\n%s", out)
	}
	if got := d.Metric(`narthex_crl_entries{trust_domain="example.org"}`); got != 1 {
		t.Errorf("%v entries", got)
	}
}

// inForce waits until the proxy has looked at the CRL files.
func (d *door) inForce(what string, ok func(telemetry.CRL) bool) {
	d.t.Helper()
	d.Becomes(stage.Soon, what, func(s telemetry.Status) bool {
		for _, c := range s.Proxy.CRLs {
			if ok(c) {
				return true
			}
		}
		return false
	})
}

func (d *door) entry(s *svid) error {
	c, err := tls.Dial("tcp", d.address, s.client())
	if err != nil {
		return err
	}
	defer c.Close()
	return ask(c, "hello")
}

func TestCRLsThatAreNotToBeUsed(t *testing.T) {
	t.Parallel()
	d, file := crlDoor(t, "-----BEGIN X509 CRL-----\nMIIB") // cut short
	other := d.ca.leaf("/other")
	d.start()
	if err := d.entry(d.client); err == nil {
		t.Error("somebody comes in though the CRLs were never read")
	}
	d.refused(0, "the CRLs of example.org could not be read yet")

	day := time.Now().Add(24 * time.Hour)
	der := func(text string) string {
		block, _ := pem.Decode([]byte(text))
		return string(block.Bytes)
	}
	stage.WriteFile(t, file, der(d.ca.crl(5, day, d.client)), 0o644)
	d.inForce("a CRL in DER", func(c telemetry.CRL) bool { return c.Number == "5" && c.Verified })
	refusedStill := func(what string) {
		t.Helper()
		if err := d.entry(d.client); err == nil {
			t.Errorf("%s: the revoked client comes in", what)
		}
		if err := d.entry(other); err != nil {
			t.Errorf("%s: another client: %v", what, err)
		}
	}
	refusedStill("DER")

	twin := newAuthority(t, "example.org") // the same name, another key
	forged := []byte(der(d.ca.crl(9, day)))
	forged[len(forged)-1] ^= 1
	partner := newAuthority(t, "partner.example")
	d.trust(d.ca, partner)
	d.configure()
	d.Becomes(stage.Soon, "a partner's bundle", func(telemetry.Status) bool { return strings.Contains(d.Said(), "files in force") })
	for _, bad := range []struct{ what, crl, problem string }{
		{"forged", string(forged), "its signature is not good"},
		{"an older one", d.ca.crl(4, day), "a rollback is not followed"},
		{"cut short", d.ca.crl(6, day)[:100], "are whole: is it still being written?"},
	} {
		stage.WriteFile(t, file, bad.crl, 0o644)
		d.inForce(bad.what, func(c telemetry.CRL) bool { return strings.Contains(c.Problem, bad.problem) })
		refusedStill(bad.what)
	}
	for _, stranger := range []*authority{twin, partner} { // says nothing of our clients
		stage.WriteFile(t, file, stranger.crl(9, day, other), 0o644)
		d.inForce(stranger.td, func(c telemetry.CRL) bool {
			return strings.Contains(c.Problem, "counts for its own domain alone") || c.Number == "9" || strings.Contains(c.Problem, "no file holds it any more")
		})
		refusedStill("of a stranger, " + stranger.td)
	}
	stage.WriteFile(t, file, d.ca.crl(7, day)+twin.crl(1, day), 0o644)
	d.inForce("two in one PEM", func(c telemetry.CRL) bool { return c.Number == "7" })
	if err := d.entry(d.client); err != nil {
		t.Errorf("taken from the list: %v", err)
	}
}

func TestCRLOutOfDate(t *testing.T) {
	t.Parallel()
	d, file := crlDoor(t, "")
	stage.WriteFile(t, file, d.ca.crl(1, time.Now().Add(time.Hour)), 0o644)
	d.start()
	live := liveSClient(t, d.address, d.client)
	until := time.Now().Add(2 * time.Second)
	stage.WriteFile(t, file, d.ca.crl(2, until), 0o644)
	d.inForce("a CRL that soon ends", func(c telemetry.CRL) bool { return c.Number == "2" })
	time.Sleep(time.Until(until.Add(time.Second))) // the list's own clock: nothing tells of it before somebody comes
	skip := len(d.Records())
	if err := d.entry(d.client); err == nil {
		t.Error("somebody comes in though the CRL is out of date")
	}
	d.refused(skip, "is out of date since")
	select {
	case <-live:
		t.Error("a live connection was closed for it")
	default:
	}
	stage.WriteFile(t, file, d.ca.crl(3, time.Now().Add(time.Hour)), 0o644)
	d.inForce("the next CRL", func(c telemetry.CRL) bool { return c.Number == "3" })
	if err := d.entry(d.client); err != nil {
		t.Errorf("with the next CRL: %v", err)
	}
}

// TestLargeCRL: a hundred thousand entries are in force soon, and cost a
// handshake nothing that can be measured here.
func TestLargeCRL(t *testing.T) {
	t.Parallel()
	d, file := crlDoor(t, "")
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for i := range int64(100_000) {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 100), big.NewInt(i)), RevocationTime: time.Unix(1_700_000_000, 0),
		})
	}
	publish := func() {
		t.Helper()
		der, err := x509.CreateRevocationList(rand.Reader, list, d.ca.cert, d.ca.key)
		if err != nil {
			t.Fatal(err)
		}
		stage.WriteFile(t, file, string(der), 0o644)
	}
	publish()
	d.start()
	live := liveSClient(t, d.address, d.client)
	list.Number = big.NewInt(2)
	list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: d.client.chain[0].SerialNumber, RevocationTime: time.Now()})
	publish()
	begun := time.Now()
	select {
	case <-live:
		t.Logf("closed %s after a CRL of 100,001 entries was written", time.Since(begun).Round(time.Millisecond))
	case <-time.After(stage.Soon):
		t.Fatal("the revoked client is still connected")
	}
	if err := d.entry(d.ca.leaf("/other")); err != nil {
		t.Error(err)
	}
	if got := d.Metric(`narthex_crl_entries{trust_domain="example.org"}`); got != 100_001 {
		t.Errorf("%v entries", got)
	}
}

// TestCRLsComeByReload: named while the proxy runs, they count for those who
// are connected, and taken away they do not.
func TestCRLsComeByReload(t *testing.T) {
	t.Parallel()
	d, file := crlDoor(t, "")
	named := d.proxy
	d.proxy = nil
	d.start()
	live := liveSClient(t, d.address, d.client)
	stage.WriteFile(t, file, d.ca.crl(1, time.Now().Add(time.Hour), d.client), 0o644)
	d.proxy = named
	d.configure()
	d.reload()
	select {
	case <-live:
	case <-time.After(stage.Soon):
		t.Fatal("the revoked client is still connected")
	}
	if err := d.entry(d.client); err == nil {
		t.Error("a revoked client comes in")
	}
	d.proxy = nil
	d.configure()
	d.reload()
	if err := d.entry(d.client); err != nil {
		t.Errorf("without CRLs: %v", err)
	}
}
