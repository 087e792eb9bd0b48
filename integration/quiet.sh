#!/usr/bin/env bash
# quiet.sh: reads `go test -v`, keeps it all in a file and shows a line a test;
# what a failed run printed is shown whole.
set -u
log=$(mktemp "${TMPDIR:-/tmp}/narthex-test.XXXXXX")
tee "$log" | grep --line-buffered -E '^(--- |    --- (FAIL|SKIP)|=== RUN   [^/]*$|ok |FAIL|PASS|panic:)'
if grep -qE '^(FAIL|panic:)|^--- FAIL' "$log"; then
  echo "--- output of the failed run (whole: $log)"; tail -n 400 "$log"
  exit 1
fi
rm -f "$log"
