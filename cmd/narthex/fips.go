package main

import (
	"crypto/fips140"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/narthex-id/narthex/internal/config"
)

// fipsEnv marks a process that has started itself again for fips: true.
const fipsEnv = "NARTHEX_FIPS_AGAIN"

// requireFIPS sees to it that `fips: true` holds in this process. Go's module
// tests itself before main and cannot be turned on later, so the process
// starts itself again in its place, once, with what it needs to: the same
// arguments, descriptors, user and process id. Children inherit it.
func requireFIPS(c *config.Config) error {
	if !c.FIPS || fips140.Enabled() {
		return nil
	}
	if os.Getenv(fipsEnv) != "" {
		return errors.New("fips: true, and Go's FIPS 140-3 module is not on in this process though GODEBUG=fips140=on asked for it; " +
			"this platform or this build of narthex has none: build it with GOFIPS140=v1.0.0, or set fips: false")
	}
	env := slices.DeleteFunc(os.Environ(), func(item string) bool { return strings.HasPrefix(item, "GODEBUG=") })
	env = append(env, "GODEBUG="+withFIPS(os.Getenv("GODEBUG")), fipsEnv+"=1")
	if err := syscall.Exec("/proc/self/exe", os.Args, env); err != nil { //nolint:gosec // ourselves, as we were called
		return fmt.Errorf("fips: true: start again with GODEBUG=fips140=on: %w; set it in the environment of narthex instead", err)
	}
	return nil // not reached
}

// withFIPS adds the setting to others that GODEBUG has.
func withFIPS(godebug string) string {
	settings := slices.DeleteFunc(strings.Split(godebug, ","), func(s string) bool {
		return s == "" || strings.HasPrefix(s, "fips140=")
	})
	return strings.Join(append(settings, "fips140=on"), ",")
}

// fipsModule names the module where it is on; empty where it is off.
func fipsModule() string {
	if !fips140.Enabled() {
		return ""
	}
	return fips140.Version()
}

// fipsWords say the same to a person.
func fipsWords() string {
	if !fips140.Enabled() {
		return fips140.Version() + ", off"
	}
	return fips140.Version() + ", on"
}
