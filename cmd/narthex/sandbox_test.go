package main

import (
	"slices"
	"testing"

	"github.com/narthex-id/narthex/internal/config"
)

func TestSandboxConfig(t *testing.T) {
	c, err := config.Parse("/etc/n/narthex.yaml", []byte(`
proxy:
  source: files
  files: {cert: /id/svid.pem, key: /id/svid.key, bundle: /id/bundle.pem, bundles: {partner.example: /partner/bundle.pem}}
  policies: [policies/*.yaml]
  crls: {partner.example: [crls/*.pem]}
  handover: {socket: /run/n/handover.sock}
  listeners:
    - {name: a, direction: inbound, bind: "unix:/run/a/in.sock", target: "unix:/run/app/app.sock"}
    - {name: b, direction: inbound, bind: "127.0.0.1:443", target: "127.0.0.1:8080"}
telemetry: {listen: "unix:/run/t/figures.sock"}
access_log: {path: /var/log/n/access.log}
`))
	if err != nil {
		t.Fatal(err)
	}
	got := sandboxConfig(c, "/etc/n/narthex.yaml")
	for _, set := range []struct{ got, want []string }{
		{got.Read, []string{"/etc/n/crls/*.pem", "/etc/n/narthex.yaml", "/etc/n/policies/*.yaml", "/id/bundle.pem", "/id/svid.key", "/id/svid.pem", "/partner/bundle.pem"}},
		{got.Append, []string{"/var/log/n/access.log"}},
		{got.Sockets, []string{"/run/a/in.sock", "/run/n/handover.sock", "/run/t/figures.sock"}},
		{got.Connect, []string{"/run/app/app.sock"}},
	} {
		slices.Sort(set.got)
		if !slices.Equal(set.got, set.want) {
			t.Errorf("%q, want %q", set.got, set.want)
		}
	}
	if !got.LowPorts || got.Watched {
		t.Errorf("low ports %t, watched %t", got.LowPorts, got.Watched)
	}
}
