//go:build integration

package tcp_test

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// This file has the scanners that security people run look at an inbound
// listener, and reads what they found.

// finding is one of testssl.sh's.
type finding struct{ ID, Severity, Finding string }

// mustSay is what testssl.sh has to find: the beginning of each finding.
var mustSay = map[string]string{
	"SSLv2": "not offered", "SSLv3": "not offered", "TLS1": "not offered", "TLS1_1": "not offered", "TLS1_2": "offered", "TLS1_3": "offered with final",
	"cipherlist_NULL": "not offered", "cipherlist_aNULL": "not offered", "cipherlist_EXPORT": "not offered", "cipherlist_LOW": "not offered",
	"cipherlist_3DES_IDEA": "not offered", "cipherlist_AVERAGE": "not offered", "cipherlist_STRONG": "offered",
	"PFS": "offered", "cipher_order": "server", "protocol_negotiated": "Default protocol TLS1.3",
	"TLS_session_ticket": "no ", "sessionresumption_ticket": "not supported", "sessionresumption_ID": "No Session ID", "SSL_sessionID_support": "no", "TLS_timestamp": "random",
	"heartbleed": "not vulnerable", "CCS": "not vulnerable", "ROBOT": "not vulnerable", "secure_renego": "supported",
	"CRIME_TLS": "not vulnerable", "POODLE_SSL": "not vulnerable", "fallback_SCSV": "no protocol below TLS 1.2", "SWEET32": "not vulnerable", "FREAK": "not vulnerable",
	"DROWN": "not vulnerable", "LOGJAM": "not vulnerable", "BEAST": "not vulnerable", "LUCKY13": "not vulnerable",
}

// webOnly are findings that judge a certificate as a browser would: its host
// name, an authority that everybody knows, a lifetime of months. SPIFFE has
// none of the three.
var webOnly = []string{"cert_trust", "cert_chain_of_trust", "cert_expirationStatus", "cert_notAfter", "cert_revocation"}

// notAsked are those that testssl.sh cannot look for where it has to show a
// certificate (TestRenegotiation does look) or with an OpenSSL that has no RC4
// (TestSSLScan knows every cipher suite by name), and what it has of its own:
// on a busy machine it may not find out that it has to show one.
var notAsked = []string{"engine_problem", "service", "secure_client_renego", "RC4", "BREACH"}

func TestTestSSL(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	file := filepath.Join(stage.Folder(t, "testssl"), "findings.json")
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "testssl", "--openssl", "/usr/bin/openssl", "--nodns", "none", "--warnings", "off", "--fast", "--color", "0", "--quiet",
		"--jsonfile", file, "-p", "-s", "-f", "-P", "-S", "-U", d.address)
	out, err := cmd.CombinedOutput() // it exits with the number of its findings
	data, readErr := os.ReadFile(file)
	if readErr != nil {
		t.Fatalf("%v, %v:\n%s", err, readErr, out)
	}
	var all []finding
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	for id, want := range mustSay {
		at := slices.IndexFunc(all, func(f finding) bool { return f.ID == id })
		if at < 0 {
			t.Errorf("testssl.sh says nothing of %s", id)
		} else if got := all[at].Finding; !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q", id, got, want)
		}
	}
	for _, f := range all {
		if f.Severity != "OK" && f.Severity != "INFO" && !slices.Contains(webOnly, f.ID) && !slices.Contains(notAsked, f.ID) {
			t.Errorf("%s %s: %s", f.Severity, f.ID, f.Finding)
		}
	}
}

// scanned is what sslscan found.
type scanned struct {
	Protocols []struct {
		Type    string `xml:"type,attr"`
		Version string `xml:"version,attr"`
		Enabled int    `xml:"enabled,attr"`
	} `xml:"ssltest>protocol"`
	Renegotiation []struct {
		Supported int `xml:"supported,attr"`
	} `xml:"ssltest>renegotiation"`
	Compression []struct {
		Supported int `xml:"supported,attr"`
	} `xml:"ssltest>compression"`
	Heartbleed []struct {
		Version    string `xml:"sslversion,attr"`
		Vulnerable int    `xml:"vulnerable,attr"`
	} `xml:"ssltest>heartbleed"`
	Ciphers []struct {
		Version string `xml:"sslversion,attr"`
		Cipher  string `xml:"cipher,attr"`
	} `xml:"ssltest>cipher"`
	Groups []struct {
		Version string `xml:"sslversion,attr"`
		Bits    int    `xml:"bits,attr"`
		Name    string `xml:"name,attr"`
	} `xml:"ssltest>group"`
}

func TestSSLScan(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	out := stage.Must(t, "sslscan", "--no-colour", "--timeout=30", "--connect-timeout=30", "--certs="+d.client.certFile, "--pk="+d.client.keyFile, "--xml=-", d.address)
	var s scanned
	if err := xml.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	enabled := map[string]int{}
	for _, p := range s.Protocols {
		enabled[p.Type+p.Version] = p.Enabled
	}
	for protocol, want := range map[string]int{"ssl2": 0, "ssl3": 0, "tls1.0": 0, "tls1.1": 0, "tls1.2": 1, "tls1.3": 1} {
		if got, ok := enabled[protocol]; !ok || got != want {
			t.Errorf("%s: enabled is %d, want %d", protocol, got, want)
		}
	}
	for _, r := range s.Renegotiation {
		if r.Supported != 0 {
			t.Error("renegotiation is supported")
		}
	}
	for _, c := range s.Compression {
		if c.Supported != 0 {
			t.Error("compression is supported")
		}
	}
	for _, h := range s.Heartbleed {
		if h.Vulnerable != 0 {
			t.Errorf("vulnerable to Heartbleed in %s", h.Version)
		}
	}
	want := []string{
		"TLSv1.2 ECDHE-ECDSA-AES128-GCM-SHA256", "TLSv1.2 ECDHE-ECDSA-AES256-GCM-SHA384", "TLSv1.2 ECDHE-ECDSA-CHACHA20-POLY1305",
		"TLSv1.3 TLS_AES_128_GCM_SHA256", "TLSv1.3 TLS_AES_256_GCM_SHA384", "TLSv1.3 TLS_CHACHA20_POLY1305_SHA256",
	}
	var got []string
	for _, c := range s.Ciphers {
		got = append(got, c.Version+" "+c.Cipher)
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("ciphers %q, want %q", got, want)
	}
	for _, g := range s.Groups {
		if g.Bits < 128 {
			t.Errorf("%s: group %s has %d bits", g.Version, g.Name, g.Bits)
		}
	}
}
