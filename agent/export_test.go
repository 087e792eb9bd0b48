package agent

import "time"

// SetMinPause makes the agent call a server that is away again sooner than in
// a second.
func (c *Config) SetMinPause(d time.Duration) { c.minPause = d }
