package upstream

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"
)

// TestHurriedAttemptIsNoFailure: what dead endpoints leave of the time is too
// short for a good one that is far away. That it did not answer in it does not
// eject it, while the dead ones, each first at some time, are ejected.
func TestHurriedAttemptIsNoFailure(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		const far = "10.0.0.9:80"
		s.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == far {
				select {
				case <-time.After(600 * time.Millisecond):
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			}
			return n.dial(ctx, network, address)
		}
		targets := []string{far}
		for i := 1; i <= 8; i++ {
			targets = append(targets, fmt.Sprintf("10.0.0.%d:80", i))
			n.is(targets[i], errSilent)
		}
		g := take(t, s, Settings{Ejection: Ejection{After: 2, For: time.Hour}}, targets...)
		for range 60 {
			if c, err := g.Dial(context.Background(), 3*time.Second); err == nil {
				c.Succeeded()
				c.Close()
			}
		}
		endpoints, _ := g.Status(9)
		for _, e := range endpoints {
			if good := e.Target == far; good != e.Healthy || good && e.Failed > 0 {
				t.Errorf("%s: healthy %t, failed %d: %s", e.Address, e.Healthy, e.Failed, e.Problem)
			}
		}
	})
}
