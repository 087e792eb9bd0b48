#!/usr/bin/env bash
# up.sh [--with PID] STATE: boots a node and waits until it is Ready.
#
# STATE is the folder of everything the node writes; one that down.sh --keep
# has left is booted again, as a machine is. With --with, the node goes down
# when that process ends, however it does.
#
# The node is one tree of processes in mount, network, pid, uts, ipc and
# cgroup namespaces of its own: nothing of it can be reached from outside, and
# the death of its PID 1 ends it all.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/settings.sh"
with=
if [ "${1:-}" = --with ]; then with=$2; shift 2; fi
[ $# -eq 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
state=$(absolute "$1")

[ "$(id -u)" -eq 0 ] || { echo "a node takes root: namespaces, mounts, cgroups" >&2; exit 1; }
awk -F: '$2 ~ /memory/ {m = 1} $2 ~ /cpuset/ {c = 1} END {exit !(m && c)}' /proc/self/cgroup || {
  echo "the controllers memory and cpuset of this machine are not on cgroup v1, and these scripts know no other: name a cluster of yours by KUBECONFIG" >&2; exit 1; }
programs=$("$here/build.sh" --cached)
"$here/../../tools/install.sh" apt cluster
[ -z "$(recorded "$state/init.pid")" ] || { echo "$state: a node is up already" >&2; exit 1; }
"$here/down.sh" --keep "$state"

mkdir -p "$state"/{log,daemons,pki}
chmod 755 "$state"
rm -rf "$state/run"; mkdir "$state/run" # as a machine's is after a boot
rm -f "$state/started"
echo "$programs" > "$state/programs"
"$here/pki.sh" "$state"

if [ -n "$with" ]; then
  setsid bash -c 'tail --pid="$1" -f /dev/null; exec "$2/down.sh" "$3"' - "$with" "$here" "$state" </dev/null >/dev/null 2>&1 &
  record $! "$state/watch.pid"
  disown
fi

# A cgroup below our own in each hierarchy: the node takes it for the root.
group=narthex-node-$(printf %s "$state" | cksum | cut -d' ' -f1)
setsid bash -c '
  set -e
  own=$(cat /proc/self/cgroup) # read before this process moves
  while IFS=: read -r _ controllers path; do
    case $controllers in "") continue ;; name=*) mount=/sys/fs/cgroup/${controllers#name=} ;; *) mount=/sys/fs/cgroup/$controllers ;; esac
    dir=$mount${path%/}/$3
    mkdir -p "$dir"
    echo "$dir" >> "$2/cgroups"
    if [ "$controllers" = cpuset ]; then for f in cpus mems; do cat "$mount$path/cpuset.$f" > "$dir/cpuset.$f"; done; fi
    echo $$ > "$dir/cgroup.procs"
  done <<< "$own"
  exec unshare --mount --net --pid --uts --ipc --cgroup --fork --kill-child --mount-proc "$1/node.sh" "$2"
' - "$here" "$state" "$group" </dev/null > "$state/log/node.log" 2>&1 &
parent=$!
disown # the shell would tell of its end
record $parent "$state/parent.pid"

failed() { echo "$1" >&2; tail -n 30 "$state/log/node.log" >&2 || true; "$here/down.sh" --keep "$state"; exit 1; }
soon() { local i; for ((i = 0; i < $1; i++)); do "${@:2}" && return 0; sleep 0.1; done; return 1; }
runs() { [ -n "$(recorded "$state/init.pid")" ]; }

# The node's PID 1 is the child of unshare that is in another PID namespace.
find_init() {
  local child space
  for child in $(cat "/proc/$parent/task/$parent/children" 2>/dev/null); do
    space=$(readlink "/proc/$child/ns/pid" || true)
    if [ -n "$space" ] && [ "$space" != "$(readlink /proc/self/ns/pid)" ]; then record "$child" "$state/init.pid"; return 0; fi
  done
  return 1
}
up() { [ -e "$state/started" ] || ! runs; }
kubectl() { "$here/node-exec" "$state" kubectl "$@" 2>/dev/null; }
ready() { ! runs || is_ready; } # or has ended: somebody did not want to wait
is_ready() { [ "$(kubectl get node $node -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ] && kubectl -n default get serviceaccount default >/dev/null; }

soon 100 find_init || failed "the node's PID 1 did not start"
soon 1800 up
[ -e "$state/started" ] || failed "the node's daemons did not start; their logs are in $state/log"
soon 900 ready && runs || failed "the node did not become Ready; see $state/log/kubelet.log"
kubectl -n kube-system rollout status deployment/coredns --timeout=120s >/dev/null || failed "the cluster's DNS did not start"
