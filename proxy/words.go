package proxy

import (
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
)

// This file bounds what strangers can make us write: a client that proved
// nothing chooses its server name and what stands in its certificates.

const (
	maxReason     = 512 // bytes of a reason in the access log and in the log
	maxServerName = 255 // of a host name (RFC 1035 §2.3.4)
)

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

// tidy makes a reason out of text that strangers may have a part in: bounded,
// on one line, and without what a terminal would obey.
func tidy(reason string) string {
	if len(reason) > maxReason {
		end := maxReason
		for !utf8.RuneStart(reason[end]) {
			end--
		}
		reason = reason[:end] + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, reason)
}

// logRefusal logs what strangers can cause at will: a few lines, then one a
// second with the number of those left out. The access log has them all.
func (l *listener) logRefusal(what string, pairs ...any) {
	l.logSome(&l.refusals, hclog.Warn, what, pairs...)
}

func (l *listener) logSome(limit *logLimit, level hclog.Level, what string, pairs ...any) {
	ok, missed := limit.allow(time.Now())
	if !ok {
		return
	}
	pairs = append([]any{"listener", l.name}, pairs...)
	if missed > 0 {
		pairs = append(pairs, "lines_left_out", missed)
	}
	l.proxy.log.Log(level, what, pairs...)
}

// logLimit lets a burst of lines through, then one a second.
type logLimit struct {
	mu     sync.Mutex // guards the following
	spent  int
	last   time.Time
	missed int
}

const logBurst = 10

func (m *logLimit) allow(now time.Time) (ok bool, missed int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if back := int(now.Sub(m.last) / time.Second); back > 0 {
		m.spent = max(0, m.spent-back)
		m.last = now
	}
	if m.spent >= logBurst {
		m.missed++
		return false, 0
	}
	m.spent++
	missed, m.missed = m.missed, 0
	return true, missed
}
