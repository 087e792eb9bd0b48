//go:build integration

// Package http_test runs the HTTP path of the narthex binary against real
// things: curl, wrk, Python, Node and Go as clients and as servers, nginx and
// haproxy as those whose strictness ours is held against.
//
//	go test -tags integration ./integration/http/
//
// Read a test as a story: an authority, the SVIDs it signs and a `narthex
// proxy` with listeners of `protocol: http` (integration/internal/mesh), the
// services behind it (mesh.Service, servers_test.go) and those who come to it.
// Each has ports and folders of its own; every process is a
// stage.Process, ended by its pid. The strictness table (strict*_test.go)
// stands in docs/http.md; -update writes it there.
package http_test

import (
	"flag"
	"os"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

var update = flag.Bool("update", false, "write the table of docs/http.md")

func TestMain(m *testing.M) { os.Exit(stage.Main(m, 4)) }
