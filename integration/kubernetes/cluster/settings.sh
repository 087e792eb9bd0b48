# What the scripts of a node agree on. Sourced, with $state set by those that
# have a node: the folder of everything it writes.

version=v1.34.4 # of Kubernetes; also in programs/go.mod, whose staging modules are v0.34.4
node=node-a
address=10.77.0.1 # of the node, inside its own network namespace
pods=10.244.0.0/24
services=10.96.0.0/24
api=10.96.0.1  # the API server's Service: the first address of services
dns=10.96.0.10 # also in coredns.yaml

started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# record PID FILE: a PID alone would name another process one day.
record() { echo "$1 $(started_at "$1")" > "$2"; }

# recorded FILE: prints the PID, if that process still runs.
recorded() {
  local pid start
  [ -f "$1" ] || return 0
  read -r pid start < "$1" || return 0
  [ -n "$start" ] && [ "$(started_at "$pid")" = "$start" ] || return 0
  [ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -c1)" = Z ] || echo "$pid"
}

# absolute STATE: refuses folders that the node shows itself a copy of.
absolute() {
  local path; path=$(readlink -m "$1")
  case $path/ in
    /etc/*|/var/*|/opt/*|/run/*|/proc/*|/sys/*|/dev/*|/)
      echo "the state of a node cannot be in $path: choose a folder outside /etc, /var, /opt and /run" >&2; return 2 ;;
  esac
  echo "$path"
}
