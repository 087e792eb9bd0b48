#!/usr/bin/env bash
# fuzz.sh TIME: runs every fuzz target of the module for TIME, one after another.
set -euo pipefail
time=${1:-30s}
go list -f '{{.ImportPath}} {{.Dir}}' ./... | while read -r pkg dir; do
  { grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$dir"/*_test.go 2>/dev/null || true; } | sed 's/^func //' | sort -u | while read -r target; do
    echo "=== $pkg $target"
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1s "$pkg"
  done
done
