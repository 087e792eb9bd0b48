package proxy

import (
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// This file bounds what strangers can make us write: a client that proved
// nothing chooses its server name and what stands in its certificates.

const maxServerName = 255 // bytes of a host name (RFC 1035 §2.3.4)

// invalidServerName stands where a server name is none. A host name has no
// blank, so it is nobody's.
const invalidServerName = "invalid server name"

// hostName returns the server name of a handshake (RFC 6066 §3), or
// invalidServerName when it is too long or has bytes that no host name has.
func hostName(sni string) string {
	if len(sni) > maxServerName {
		return invalidServerName
	}
	for _, c := range []byte(sni) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		default:
			return invalidServerName
		}
	}
	return sni
}

// logRefusal logs what strangers can cause at will: a few lines, then one a
// second with the number of those left out. The access log has them all.
func (l *listener) logRefusal(what string, pairs ...any) {
	l.logSome(&l.refusals, hclog.Warn, what, pairs...)
}

func (l *listener) logSome(limit *telemetry.LogLimit, level hclog.Level, what string, pairs ...any) {
	ok, missed := limit.Allow(time.Now())
	if !ok {
		return
	}
	pairs = append([]any{"listener", l.name}, pairs...)
	if missed > 0 {
		pairs = append(pairs, "lines_left_out", missed)
	}
	l.proxy.log.Log(level, what, pairs...)
}
