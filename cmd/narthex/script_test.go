package main

import (
	"fmt"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"narthex": main})
}

// TestScript runs the real command line: testdata/script/*.txtar are what a
// user types and sees.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Setup: func(env *testscript.Env) error {
			// Socket paths have 107 bytes, and the scripts' own directories
			// are deeper than that.
			dir, err := os.MkdirTemp("", "nx")
			if err != nil {
				return err
			}
			env.Defer(func() { _ = os.RemoveAll(dir) })
			env.Setenv("SHORT", dir)
			env.Setenv("TMPDIR", dir)
			return nil
		},
	})
}
