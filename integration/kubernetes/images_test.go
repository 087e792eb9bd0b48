//go:build integration

package kubernetes_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

var ownGroup = &syscall.SysProcAttr{Setpgid: true}

// images are the references of the images that pods run.
type images struct {
	Narthex, SpireServer, SpireAgent, Workload string
}

// prepare builds the images and loads them into our node. For a cluster of
// the user's, which cannot be reached that way, the environment names them.
func (i *images) prepare(c *cluster) error {
	all := []struct {
		reference *string
		variable  string
		build     func() (program string, err error)
	}{
		{&i.Narthex, "NARTHEX_IMAGE", func() (string, error) { return stage.Narthex, nil }},
		{&i.SpireServer, "NARTHEX_SPIRE_SERVER_IMAGE", spireProgram("spire-server")},
		{&i.SpireAgent, "NARTHEX_SPIRE_AGENT_IMAGE", spireProgram("spire-agent")},
		{&i.Workload, "NARTHEX_WORKLOAD_IMAGE", buildWorkload},
	}
	for _, image := range all {
		if !c.own {
			if *image.reference = os.Getenv(image.variable); *image.reference == "" {
				return fmt.Errorf("%s has to name an image that your cluster can pull, see integration/kubernetes/README.md", image.variable)
			}
			continue
		}
		program, err := image.build()
		if err != nil {
			return err
		}
		*image.reference = "localhost/" + filepath.Base(program) + ":test"
		if err := c.load(*image.reference, program); err != nil {
			return err
		}
	}
	return nil
}

// load makes an image of a program and brings it into our node.
func (c *cluster) load(reference, program string) error {
	file := filepath.Join(stage.Scratch, filepath.Base(program)+".tar")
	defer os.Remove(file)
	if err := script("mkimage", reference, program, file); err != nil {
		return err
	}
	if out, err := c.command(context.Background(), "ctr", "images", "import", file).CombinedOutput(); err != nil {
		return fmt.Errorf("load image %s: %w\n%s", reference, err, out)
	}
	return nil
}

func spireProgram(name string) func() (string, error) {
	return func() (string, error) {
		dir, err := stage.Tools("spire", "NARTHEX_TOOLS", "spire-server", "spire-agent")
		return filepath.Join(dir, name), err
	}
}

func buildWorkload() (string, error) {
	program := filepath.Join(stage.Scratch, "workload")
	cmd := exec.Command("go", "build", "-o", program, "./workload")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build workload: %w\n%s", err, out)
	}
	return program, nil
}
