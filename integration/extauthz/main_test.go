//go:build integration

// Package extauthz_test asks a running narthex what Envoy asks: with the
// messages and the gRPC client of Envoy's own API, over a Unix socket and over
// mTLS.
//
//	go test -tags integration ./integration/extauthz/
package extauthz_test

import (
	"os"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

func TestMain(m *testing.M) { os.Exit(stage.Main(m, 4)) }
