package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"
)

var firstAnswer = regexp.MustCompile(`first answer ([0-9.]+) s after the start`)

// measureDemo runs the demo as a newcomer does. The first run is not counted:
// it reads the binary from the disk.
func measureDemo(ctx context.Context, b *bench) error {
	if _, _, err := b.runDemo(ctx); err != nil {
		return err
	}
	return b.rounds(ctx, 1, func(int) error {
		answered, whole, err := b.runDemo(ctx)
		if err != nil {
			return err
		}
		b.results.add(rowDemo, ours, answered)
		b.results.add(rowDemoWhole, ours, whole)
		return nil
	})
}

// runDemo returns the figure that the demo prints and the time all of it
// took, in seconds.
func (b *bench) runDemo(ctx context.Context) (answered, whole float64, err error) {
	dir, err := b.folder()
	if err != nil {
		return 0, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var said bytes.Buffer
	cmd := exec.Command(b.narthex, "demo", "--once")
	cmd.Stdout = &said
	begin := time.Now()
	p, err := b.keeper.start(cmd, filepath.Join(dir, "output"))
	if err != nil {
		return 0, 0, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.stop()
	}
	whole = time.Since(begin).Seconds()
	if p.err != nil {
		return 0, 0, fmt.Errorf("narthex demo: %w\n%s%s", p.err, said.String(), p.said())
	}
	found := firstAnswer.FindSubmatch(said.Bytes())
	if found == nil {
		return 0, 0, fmt.Errorf("narthex demo does not say when the first answer came:\n%s", said.String())
	}
	answered, err = strconv.ParseFloat(string(found[1]), 64)
	return answered, whole, err
}
