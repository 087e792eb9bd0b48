package http2

import "time"

// Patience is how much a connection may ask of us for nothing. It has so much at
// first and at most, and as much more as it costs to cancel all streams that it
// may have open at once; frames that carry nothing take from it, what is of use
// to both gives some of it back, and it grows with time. A connection that has
// spent it is ended with ENHANCE_YOUR_CALM.
const (
	Patience        = 1000
	PatienceASecond = 100
)

// What it costs.
const (
	CostFrame    = 1   // PING, PRIORITY, frames of unknown kinds, DATA without any, a WINDOW_UPDATE of less than 1 KiB
	CostSettings = 4   // which are to be answered, and may change every stream
	CostLarge    = 100 // a head with more fields than it may have, each of which may name a large one of the table
	CostReset    = 10  // a stream that its client cancels, or that we have to reset
	gainData     = 1   // a frame with content that came
	gainSent     = 3   // one that we sent: some update both windows for each
	gainRequest  = 10  // a request that was answered
)

// SmallUpdate is below how many bytes a WINDOW_UPDATE is a nuisance.
const SmallUpdate = 1 << 10

type patience struct {
	left, most int
	since      time.Time // when it was last seen to
}

func newPatience(streams int) patience {
	most := Patience + CostReset*streams
	return patience{left: most, most: most, since: time.Now()}
}

func (p *patience) gain(n int) { p.left = min(p.most, p.left+n) }

// spend reports whether there was so much left.
func (p *patience) spend(n int) bool {
	if p.left < n+p.most/2 { // a clock is read only by those who spend much
		now := time.Now()
		if grown := int(now.Sub(p.since) * PatienceASecond / time.Second); grown > 0 {
			p.gain(grown)
			p.since = now
		}
	}
	p.left -= n
	return p.left >= 0
}

// costOfReset returns what it costs the peer that a stream is reset; s is nil
// for one that is over. A server resets what we have opened: that is bounded by
// what we ask for.
func (c *Conn) costOfReset(s *Stream) int {
	switch {
	case c.client && s != nil:
		return 0
	case c.client:
		return CostFrame
	}
	return CostReset
}
