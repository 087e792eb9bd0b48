//go:build integration

// Package http2_test runs HTTP/2 and gRPC through the narthex binary, between
// real things: h2spec, gRPC's own interoperability tests, its libraries for
// Node and Python, curl, nghttp, Node and Go as clients and as services, nginx
// and haproxy as those who are attacked beside ours.
//
//	go test -tags integration ./integration/http2/
//
// Most tests go the ways of ways_test.go: without narthex, which proves that
// the client and the service understand each other, and the test them; by mutual
// TLS through an inbound listener; in plaintext through an outbound one; and
// through both. What each needs besides is as in integration/http.
package http2_test

import (
	"os"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// Set by TestMain: folders of tools.
var h2specTools, interopTools, grpcjsModules string

func TestMain(m *testing.M) { os.Exit(stage.Main(m, 4, findTools)) }

func findTools() (err error) {
	for _, tool := range []struct {
		dir                     *string
		name, variable, program string
	}{
		{&h2specTools, "h2spec", "NARTHEX_H2SPEC", "h2spec"},
		{&interopTools, "grpcinterop", "NARTHEX_GRPCINTEROP", "grpcinterop"},
		{&grpcjsModules, "grpcjs", "NARTHEX_GRPCJS", "node_modules"},
	} {
		if *tool.dir, err = stage.Tools(tool.name, tool.variable, tool.program); err != nil {
			return err
		}
	}
	return nil
}
