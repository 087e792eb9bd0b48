package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/narthex-id/narthex/integration/internal/bareclient"
)

// order is what the benchmark tells a pod to do.
type order struct {
	Do     string   `json:"do"`     // fetch, hold, or drop what is held
	Agents []string `json:"agents"` // fetch asks one after the other, in turns
	Count  int      `json:"count"`  // of fetches, at each agent
}

// outcome is what a pod answers, and what it says at first.
type outcome struct {
	Pod   string               `json:"pod"`
	Took  map[string][]float64 `json:"took,omitempty"` // by agent: how long each SVID took, in ms
	Error string               `json:"error,omitempty"`
}

// driven does what the benchmark says. The socket of each agent is in a folder
// of its name.
type driven struct {
	agents string // the folder of those folders
	held   []net.Conn
}

// drive connects to the benchmark and does what it says until it hangs up. If
// first names an agent, its first SVID comes before all else, and its time is
// taken from the start of this process.
func drive(ctx context.Context, control, agents, first string, start time.Time) error {
	d := &driven{agents: agents}
	defer d.drop()
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	hello := outcome{Pod: name}
	if first != "" {
		if err := d.until(ctx, first); err != nil {
			return err
		}
		hello.Took = map[string][]float64{first: {milliseconds(time.Since(start))}}
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", control)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	answers, orders := json.NewEncoder(c), json.NewDecoder(c)
	for said := hello; ; {
		if err := answers.Encode(said); err != nil {
			return err
		}
		var o order
		if err := orders.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		said = outcome{Pod: name}
		if said.Took, err = d.do(ctx, o); err != nil {
			said.Error = err.Error()
		}
	}
}

func (d *driven) do(ctx context.Context, o order) (map[string][]float64, error) {
	took := map[string][]float64{}
	switch o.Do {
	case "drop":
		d.drop()
	case "hold":
		for _, agent := range o.Agents {
			begin := time.Now()
			if err := d.until(ctx, agent); err != nil {
				return nil, err
			}
			took[agent] = append(took[agent], milliseconds(time.Since(begin)))
		}
	case "fetch":
		for i := range o.Count {
			for j := range o.Agents {
				agent := o.Agents[(i+j)%len(o.Agents)]
				begin := time.Now()
				stream, err := bareclient.FetchX509SVID(ctx, d.socket(agent))
				if err != nil {
					return nil, fmt.Errorf("%s: %w", agent, err)
				}
				_ = stream.Close() // it has served
				took[agent] = append(took[agent], milliseconds(time.Since(begin)))
			}
		}
	default:
		return nil, fmt.Errorf("do what? %q", o.Do)
	}
	return took, nil
}

// until opens a stream that gives an SVID, and holds it. Agents that do not
// know the pod yet are asked again at once, as workloads do.
func (d *driven) until(ctx context.Context, agent string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		stream, err := bareclient.FetchX509SVID(ctx, d.socket(agent))
		if err == nil {
			d.held = append(d.held, stream)
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", agent, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (d *driven) drop() {
	for _, c := range d.held {
		_ = c.Close()
	}
	d.held = nil
}

func (d *driven) socket(agent string) string { return filepath.Join(d.agents, agent, "api.sock") }

func milliseconds(d time.Duration) float64 { return d.Seconds() * 1e3 }
