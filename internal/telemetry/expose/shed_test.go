package expose

import (
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// TestSilentClientsKeepNoProbeOut: whoever keeps connections open without a
// word, many more than are held, and comes again when they are closed.
func TestSilentClientsKeepNoProbeOut(t *testing.T) {
	s := start(t, Config{Health: "127.0.0.1:0", Process: "agent"})
	addr := s.HealthAddr().String()
	stop := make(chan struct{})
	var silent, held sync.WaitGroup
	defer silent.Wait()
	defer close(stop)
	for range 3 * maxConnections {
		held.Add(1)
		silent.Go(func() {
			for first := true; ; first = false {
				c, err := net.Dial("tcp", addr)
				if first {
					held.Done()
				}
				if err != nil {
					return // out of ports or files: enough of them are there
				}
				ended := make(chan struct{})
				go func() {
					_, _ = io.Copy(io.Discard, c) // until we are hung up on
					close(ended)
				}()
				select {
				case <-ended:
					_ = c.Close()
				case <-stop:
					_ = c.Close()
					<-ended
					return
				}
			}
		})
	}
	held.Wait()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	answered := 0
	for range 20 { // one that is closed in the crush is the kubelet's to repeat
		resp, err := client.Get("http://" + addr + "/livez")
		if err != nil {
			t.Logf("not answered: %v", err)
			continue
		}
		_ = resp.Body.Close()
		answered++
	}
	if answered < 15 {
		t.Errorf("%d of 20 probes were answered", answered)
	}
}
