# The two commands of a new user are `make demo` and `make test`.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
SUITE   := integration/suite.sh
ROWS    ?= handshake,handshake-pq,echo,bulk-up,bulk-down

.PHONY: help
help: ## Show this help
	@echo "Narthex: workload identity and mutual TLS by SPIFFE ID."
	@echo
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

# With Go's frozen FIPS 140-3 module, on by default: GOFIPS140=v1.0.0 make build
.PHONY: build
build: check-go ## Build bin/narthex
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/narthex ./cmd/narthex

.PHONY: demo
demo: build ## See it work: two services behind mutual TLS, no root, no server
	@bin/narthex demo $(ARGS)

.PHONY: test
test: check-test ## Run everything: lint, unit tests with the race detector, real components
	@$(SUITE) lint        $(MAKE) --no-print-directory lint
	@$(SUITE) unit        $(MAKE) --no-print-directory test-unit
	@$(SUITE) integration $(MAKE) --no-print-directory test-integration
	@if [ -n "$${NARTHEX_IMAGE:-}" ] || integration/kubernetes/cluster/build.sh --cached >/dev/null 2>&1; then \
	  $(SUITE) kubernetes $(MAKE) --no-print-directory test-k8s; \
	else \
	  echo "=== suite kubernetes: not run, the programs of its cluster are not built yet: 'make test-k8s' builds them (ten minutes, once) and runs it"; \
	fi

.PHONY: test-unit
test-unit: check-go ## Unit tests and command-line scripts, with the race detector
	$(GO) test -race -timeout 40m ./...
	$(GO) test -run TestDecideAgreesWithTheSlowEvaluator ./proxy/policy # a million pairs, which the race detector would take minutes for

.PHONY: test-integration
test-integration: check-test ## The product against real components (SPIRE Server, openssl, …)
	integration/tools/install.sh apt test
	NARTHEX_TOOLS=$$(integration/tools/install.sh spire) NARTHEX_GHOSTUNNEL=$$(integration/tools/install.sh ghostunnel) \
	NARTHEX_HELM=$$(integration/tools/install.sh helm) NARTHEX_KUSTOMIZE=$$(integration/tools/install.sh kustomize) NARTHEX_MANIFESTS=$$(integration/tools/install.sh manifests) \
	NARTHEX_H2SPEC=$$(integration/tools/install.sh h2spec) NARTHEX_GRPCINTEROP=$$(integration/tools/install.sh grpcinterop) NARTHEX_GRPCJS=$$(integration/tools/install.sh grpcjs) \
	  $(GO) test -tags integration -timeout 60m -count=1 -v $$($(GO) list -tags integration ./integration/... | grep -v /integration/kubernetes) 2>&1 | integration/quiet.sh

# On a cluster of yours, with images of yours: integration/kubernetes/README.md.
.PHONY: test-k8s
test-k8s: check-test ## Narthex on a real Kubernetes, with SPIRE Server in it
	@[ -n "$${NARTHEX_IMAGE:-}" ] || integration/kubernetes/cluster/build.sh >/dev/null
	NARTHEX_TOOLS=$$(integration/tools/install.sh spire) NARTHEX_HELM=$$(integration/tools/install.sh helm) \
	  $(GO) test -tags integration -timeout 30m -count=1 -v ./integration/kubernetes 2>&1 | integration/quiet.sh

.PHONY: lint
lint: check-go ## Formatting, vet, linters, go.mod tidiness, generated files
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not gofmt-ed:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) mod tidy -diff
	$(GO) vet -tags integration,bench ./...
	@for module in integration/bench/policypeers integration/tools/manifests integration/tools/grpcinterop integration/kubernetes/cluster/images/*/; do \
	  (set -x; cd $$module && $(GO) mod tidy -diff && $(GO) vet ./...) || exit 1; \
	done
	"$$(integration/tools/install.sh lint)/golangci-lint" run --allow-parallel-runners --build-tags integration,bench

.PHONY: generate
generate: check-go ## Regenerate the JSON Schema and the configuration reference
	$(GO) generate ./...

.PHONY: fuzz
fuzz: check-go ## Run every fuzz target for FUZZTIME (30s)
	integration/fuzz.sh $(or $(FUZZTIME),30s)

.PHONY: bench
bench: check-test build ## Measure beside nginx, haproxy, ghostunnel, spire-agent, OPA, …; writes docs/benchmarks.md
	integration/tools/install.sh apt bench
	cd integration/bench/policypeers && $(GO) build -o "$(CURDIR)/bin/policypeers" .
	NARTHEX_SPIRE=$$(integration/tools/install.sh spire) NARTHEX_GHOSTUNNEL=$$(integration/tools/install.sh ghostunnel) \
	  $(GO) run ./integration/bench -narthex bin/narthex -out docs/benchmarks.md $(ARGS)

# On a node of this machine only.
.PHONY: bench-k8s
bench-k8s: check-test build ## Measure beside spire-agent on a real Kubernetes; writes docs/benchmarks-kubernetes.md
	@integration/kubernetes/cluster/build.sh >/dev/null
	NARTHEX="$(CURDIR)/bin/narthex" NARTHEX_TOOLS=$$(integration/tools/install.sh spire) NARTHEX_HELM=$$(integration/tools/install.sh helm) \
	  $(GO) test -tags integration,bench -run '^TestBench$$' -timeout 60m -count=1 -v ./integration/kubernetes -args -out "$(CURDIR)/docs/benchmarks-kubernetes.md" $(ARGS)

.PHONY: profile
profile: check-go ## Where the proxy's CPU time goes under the benchmark's loads
	@mkdir -p bin/profiles && rm -f bin/profiles/*
	CGO_ENABLED=0 $(GO) build -trimpath -tags profile -o bin/narthex-profile ./cmd/narthex
	$(GO) run ./integration/bench -narthex bin/narthex-profile -profiles bin/profiles -sides narthex -pairs 3 -only $(ROWS)
	$(GO) tool pprof -top -cum -nodecount 60 bin/profiles/*.pprof

.PHONY: clean
clean: ## Remove what was built here (the cache of tools stays; integration/tools/install.sh names it)
	rm -rf bin

.PHONY: check-go
check-go:
	@integration/tools/install.sh check go git

.PHONY: check-test
check-test:
	@integration/tools/install.sh check go git gcc
