package telemetry

import (
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// This file bounds what strangers can make us write.

// MaxReason bounds a reason in the access log and in the log, in bytes.
const MaxReason = 512

// Tidy makes a reason out of text that strangers may have a part in: of at most
// MaxReason bytes and an ellipsis, on one line, and without what a terminal would
// obey. What cannot be printed becomes U+FFFD.
func Tidy(reason string) string {
	if len(reason) > MaxReason {
		end := MaxReason
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

// LogLimit is for lines that others can cause at will: it lets a burst of them
// through, then one a second. The zero value is ready; it is safe for concurrent
// use.
type LogLimit struct {
	mu     sync.Mutex // guards the following
	spent  int
	last   time.Time
	missed int
}

const logBurst = 10 // lines

// Allow reports whether a line may be written now, and if so, how many were left
// out since the last one that was.
func (m *LogLimit) Allow(now time.Time) (ok bool, missed int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if back := int(now.Sub(m.last) / time.Second); back > 0 {
		m.spent, m.last = max(0, m.spent-back), now
	}
	if m.spent >= logBurst {
		m.missed++
		return false, 0
	}
	m.spent++
	missed, m.missed = m.missed, 0
	return true, missed
}
