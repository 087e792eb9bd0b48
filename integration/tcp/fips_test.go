//go:build integration

package tcp_test

import (
	"crypto/tls"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestFIPS: with fips: true a proxy is on Go's FIPS 140-3 module though
// nothing in its environment asks for it, and takes approved algorithms alone.
func TestFIPS(t *testing.T) {
	t.Parallel()
	d := &door{ca: newAuthority(t, "example.org"), service: serve(t, answerLines)}
	d.client = d.ca.leaf("/client")
	d.node = newNode(t, "door", d.ca.leaf("/server"), d.ca)
	d.address = d.inbound("door", d.service.address)
	d.rules(d.clientMay())
	d.top = append(d.top, "fips: true")
	d.start()
	s, err := d.Status()
	if err != nil || s.FIPS == "" || !strings.Contains(d.Said(), `fips_module="`+s.FIPS+`, on"`) {
		t.Errorf("status says module %q: %v\n%s", s.FIPS, err, d.Said())
	}
	for _, test := range []struct {
		args string
		good bool
	}{
		{"-tls1_3", true},
		{"-tls1_3 -ciphersuites TLS_AES_128_GCM_SHA256", true},
		{"-tls1_3 -ciphersuites TLS_AES_256_GCM_SHA384", true},
		{"-tls1_3 -ciphersuites TLS_CHACHA20_POLY1305_SHA256", false},
		{"-tls1_3 -groups P-256", true},
		{"-tls1_3 -groups P-384", true},
		{"-tls1_3 -groups X25519", false},
		{"-tls1_2 -cipher ECDHE-ECDSA-AES128-GCM-SHA256", true},
		{"-tls1_2 -cipher ECDHE-ECDSA-AES256-GCM-SHA384", true},
		{"-tls1_2 -cipher ECDHE-ECDSA-CHACHA20-POLY1305", false},
		{"-tls1_2 -groups P-256", true},
		{"-tls1_2 -groups X25519", false},
		{"-tls1_1 -cipher ALL:@SECLEVEL=0", false},
	} {
		t.Run(test.args, func(t *testing.T) {
			out := sClient(t, d.address, with(d.client, strings.Fields(test.args)...)...)
			if got := strings.Contains(out, answer); got != test.good {
				t.Errorf("comes in: %t, want %t\n%s", got, test.good, out)
			}
		})
	}
	c := d.client.client()
	c.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	conn, err := tls.Dial("tcp", d.address, c)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := ask(conn, "hello"); err != nil || conn.ConnectionState().CurveID != tls.X25519MLKEM768 {
		t.Errorf("X25519MLKEM768: %v, %v", conn.ConnectionState().CurveID, err)
	}
	out := stage.Must(t, stage.Narthex, "version")
	if !strings.Contains(out, "FIPS 140-3 module") {
		t.Errorf("narthex version says %q", out)
	}
}
