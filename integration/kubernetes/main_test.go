//go:build integration

// Package kubernetes_test runs Narthex on a real Kubernetes: a SPIRE Server in
// the cluster, nodes attested by real token reviews, pods by a real kubelet.
//
//	go test -tags integration ./integration/kubernetes/
//
// The cluster is one node that cluster/up.sh boots on this machine, with the
// programs of cluster/build.sh; it goes down with the tests. README.md tells
// how to run them on a cluster of yours.
//
// Read a test as a story: a cluster (cluster_test.go), a SPIRE Server and its
// entries (spire_test.go), an agent that serves the Workload API
// (agent_test.go), and a shop whose pods call each other (shop_test.go). What
// runs in pods is in workload/, their manifests are in testdata/.
package kubernetes_test

import (
	"os"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// k8s is the cluster. TestMain sets it.
var k8s *cluster

func TestMain(m *testing.M) {
	k8s = newCluster()
	code := stage.Main(m, 4, k8s.up)
	k8s.down()
	os.Exit(code)
}
