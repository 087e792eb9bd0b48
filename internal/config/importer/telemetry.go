package importer

import (
	"net"
	"strconv"
	"strings"
)

// telemetry carries where figures are shown.
func (d *draft) telemetry(f *fields) {
	if f.has("Prometheus") {
		p := f.fields("Prometheus")
		host := p.text("host")
		if host == "" {
			host = "localhost"
		}
		port, _ := p.number("port")
		d.out.set("telemetry.listen", net.JoinHostPort(strings.Trim(host, "[]"), strconv.FormatInt(port, 10)))
		d.note(p.at("port"), p.path, "the metrics have other names (docs/observability.md), and the status page is there too")
		p.lose("tls", "figures are shown without TLS and authentication: keep them on loopback or a Unix socket, behind a listener of the proxy")
		p.rest()
	}
	for _, key := range []string{"DogStatsd", "Statsd", "M3"} {
		f.lose(key, "figures are shown for Prometheus alone: have a collector read them at telemetry.listen")
	}
	f.lose("InMem", "`narthex status` shows the figures of now")
	for _, key := range []string{
		"MetricPrefix", "EnableTrustDomainLabel", "EnableHostnameLabel", "AllowedPrefixes", "BlockedPrefixes", "AllowedLabels", "BlockedLabels",
	} {
		f.lose(key, "metrics are shown as they are: relabel them where they are read")
	}
	f.rest()
}

// health carries where probes ask.
func (d *draft) health(f *fields) {
	host, port := f.text("bind_address"), f.text("bind_port")
	live, ready := f.text("live_path"), f.text("ready_path")
	if f.flag("listener_enabled") {
		if host == "" {
			host = "localhost"
		}
		if port == "" {
			port = "80"
		}
		d.out.set("telemetry.health", net.JoinHostPort(strings.Trim(host, "[]"), port))
		for _, probe := range []struct{ key, path, here string }{{"live_path", live, "/livez"}, {"ready_path", ready, "/readyz"}} {
			if probe.path != probe.here {
				d.lose(f.at(probe.key), f.key(probe.key), "probes ask %s here, and no other path: change them", probe.here)
			}
		}
	}
	f.rest()
}
