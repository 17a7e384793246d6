#!/usr/bin/env bash
# Runs each fuzz target of the project for a while: scripts/fuzz.sh [TIME], by default 30s each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for_each=${1:-30s}
grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u | while read -r dir; do
  grep -ho '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | sed 's/^func //' | sort -u | while read -r target; do
    echo "== $dir $target"
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$for_each" "$dir" </dev/null
  done
done
