#!/usr/bin/env bash
# suite.sh NAME COMMAND…: runs a suite and prints its minutes.
set -u
name=$1; shift
start=$SECONDS
echo "=== suite $name"
"$@"; code=$?
minutes=$(awk -v s=$((SECONDS - start)) 'BEGIN { printf "%.1f", s / 60 }')
if [ $code -eq 0 ]; then echo "=== suite $name: ok, $minutes min"; else echo "=== suite $name: FAILED, $minutes min"; fi
exit $code
