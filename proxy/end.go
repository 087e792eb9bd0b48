package proxy

// EndNow ends every live connection at once, each with its access record, and
// so the draining of Run: somebody asked twice.
func (p *Proxy) EndNow() {
	for _, c := range p.table.of(nil) {
		c.mu.Lock()
		c.kill(closing{"drain", "the proxy was told to end at once"})
		c.mu.Unlock()
	}
}
