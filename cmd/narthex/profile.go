//go:build profile

package main

import (
	"fmt"
	"os"
	"os/signal"
	"runtime/pprof"
	"syscall"
)

// A binary built with the tag profile writes a CPU profile to the file that
// NARTHEX_CPU_PROFILE names, until SIGUSR1. `make profile` shows what the loads
// of the benchmark come to. Compiling with these profiles (default.pgo) was
// tried: handshakes took 1.04 to 1.06 of the time, echoes 0.96 to 1.03, since
// what is hot is assembly and the kernel.
func init() {
	path := os.Getenv("NARTHEX_CPU_PROFILE")
	if path == "" {
		return
	}
	file, err := os.Create(path) //nolint:gosec // named by whoever runs the benchmark
	if err == nil {
		err = pprof.StartCPUProfile(file)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cpu profile:", err)
		os.Exit(exitFailure)
	}
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGUSR1)
	go func() {
		<-ends
		pprof.StopCPUProfile()
		if err := file.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "cpu profile:", err)
		}
	}()
}
