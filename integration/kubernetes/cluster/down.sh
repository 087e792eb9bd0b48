#!/usr/bin/env bash
# down.sh [--keep] STATE: ends a node and removes its cgroups and its state.
# With --keep the state stays, for up.sh to boot again.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/settings.sh"
keep=
if [ "${1:-}" = --keep ]; then keep=yes; shift; fi
[ $# -eq 1 ] || { sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
state=$(absolute "$1") || exit
[ -d "$state" ] || exit 0

watch=$(recorded "$state/watch.pid") # this very process, where the watch calls us
if [ -n "$watch" ] && [ "$watch" != $$ ]; then kill -- "-$watch"; fi
for name in init parent; do # the kernel ends the rest of the node with its PID 1
  pid=$(recorded "$state/$name.pid")
  [ -z "$pid" ] || kill -9 "$pid"
done
for ((i = 0; i < 200; i++)); do
  [ -n "$(recorded "$state/init.pid")$(recorded "$state/parent.pid")" ] || break
  sleep 0.05
done

# A cgroup can be removed once its last process is buried.
remove_cgroups() {
  local dir left=0
  while read -r dir; do
    [ ! -d "$dir" ] || find "$dir" -depth -type d -exec rmdir {} + 2>/dev/null
    [ ! -d "$dir" ] || left=1
  done < "$state/cgroups"
  return $left
}
if [ -f "$state/cgroups" ]; then
  for ((i = 0; i < 100; i++)); do
    ! remove_cgroups || break
    sleep 0.1
  done
  remove_cgroups || { echo "processes of the node are still in its cgroups, named in $state/cgroups" >&2; exit 1; }
  rm -f "$state/cgroups"
fi
rm -f "$state"/*.pid
[ -n "$keep" ] || rm -rf --one-file-system "$state"
