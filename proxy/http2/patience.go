package http2

import "time"

// Patience is how much a connection may ask of us for nothing. It has so much at
// first and at most; frames that carry nothing take from it, what is of use to
// both gives some of it back, and it grows with time. A connection that has
// spent it is ended with ENHANCE_YOUR_CALM.
const (
	Patience        = 1000
	PatienceASecond = 100
)

// What it costs.
const (
	costFrame    = 1  // PING, PRIORITY, frames of unknown kinds, DATA without any, a WINDOW_UPDATE of less than 1 KiB
	costSettings = 4  // which are to be answered, and may change every stream
	costReset    = 10 // a stream that its client cancels, or that we have to reset
	gainData     = 1  // a frame with content that came
	gainSent     = 3  // one that we sent: some update both windows for each
	gainRequest  = 10 // a request that was answered
)

// smallUpdate is below how many bytes a WINDOW_UPDATE is a nuisance.
const smallUpdate = 1 << 10

type patience struct {
	left  int
	since time.Time // when it was last seen to
}

func newPatience() patience { return patience{left: Patience, since: time.Now()} }

func (p *patience) gain(n int) { p.left = min(Patience, p.left+n) }

// spend reports whether there was so much left.
func (p *patience) spend(n int) bool {
	if p.left < n+Patience/2 { // a clock is read only by those who spend much
		now := time.Now()
		if grown := int(now.Sub(p.since) * PatienceASecond / time.Second); grown > 0 {
			p.gain(grown)
			p.since = now
		}
	}
	p.left -= n
	return p.left >= 0
}
