module github.com/narthex-id/narthex/integration/kubernetes/cluster/images/pause

go 1.24.0
