//go:build integration

// Package tcp_test runs the TCP data path of the narthex binary against real
// things: openssl, gnutls, nginx, haproxy, ghostunnel, scanners, databases,
// networks that lose packets.
//
//	go test -tags integration ./integration/tcp/
//
// Read a test as a story: authorities and the SVIDs they sign (ca_test.go), a
// `narthex proxy` with `source: files` (proxy_test.go), the service behind it
// (service_test.go) and those who come to it (openssl_test.go,
// gnutls_test.go, …). Each has ports and folders of its own; every process is
// a stage.Process, ended by its pid.
package tcp_test

import (
	"os"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

func TestMain(m *testing.M) { os.Exit(stage.Main(m, 6)) }
