#!/usr/bin/env bash
# Installs or builds what the tests and benchmarks run beside Narthex.
#
#   install.sh check TOOL…       are go, git, gcc there? prints how to get them
#   install.sh apt test|bench|cluster
#                                installs Debian packages where it may, else names what is missing
#   install.sh spire|lint|ghostunnel|helm|kustomize|manifests|h2spec|grpcinterop
#                                builds the tools of that module, prints the folder they are in
#   install.sh grpcjs            installs the modules for Node that its lock file names, prints
#                                the folder they are in
#
# Each folder here with a go.mod is a module of its own, so that a tool is
# built with exactly the dependencies it was released with. Built tools are
# kept in a cache under a name made from the module's files and the version of
# Go or Node: $NARTHEX_CACHE, or narthex/ in the user's cache directory.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
GO=${GO:-go}

need() {
  case $1 in
    go)
      if ! command -v "$GO" >/dev/null; then
        echo "missing: go 1.26 or newer. Get it from https://go.dev/dl/ and put its bin folder on PATH." >&2; return 1
      fi
      local v; v=$("$GO" env GOVERSION); v=${v#go}
      local major=${v%%.*} rest=${v#*.}; local minor=${rest%%[!0-9]*}
      if [ "$major" -lt 1 ] || { [ "$major" -eq 1 ] && [ "${minor:-0}" -lt 26 ]; }; then
        echo "go $v is too old: 1.26 or newer is needed. Get it from https://go.dev/dl/." >&2; return 1
      fi ;;
    *)
      command -v "$1" >/dev/null || { echo "missing: $1. Debian and Ubuntu: apt-get install $1" >&2; return 1; } ;;
  esac
}

packages() {
  case $1 in
    test)  echo openssl openssh-client openssh-server netcat-openbsd curl procps gnutls-bin nginx-light libnginx-mod-stream haproxy postgresql redis-server testssl.sh wrk python3 python3-websockets python3-grpcio nghttp2-client nodejs node-ws node-undici sslscan iproute2 iptables systemd dnsmasq-base ;;
    bench) echo openssl nginx-light libnginx-mod-stream haproxy procps ;;
    cluster) echo openssl curl iproute2 util-linux nftables iptables libseccomp2 ;;
    *) echo "install.sh apt: want test, bench or cluster, not $1" >&2; return 2 ;;
  esac
}

install_packages() {
  local wanted missing=()
  wanted=$(packages "$1")
  for p in $wanted; do
    dpkg-query -W -f='${Status}\n' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing packages: ${missing[*]}. Debian and Ubuntu: sudo apt-get install ${missing[*]}" >&2
    return 1
  fi
  echo "installing ${missing[*]}" >&2
  # Daemons that come with a package must not start on this machine.
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\nexit 101\n' > $policy; chmod 755 $policy
  fi
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

# cached NAME VERSIONS COMMAND… prints the folder of what COMMAND, run in the
# folder NAME, puts into the folder it is given last.
cached() {
  local module=$here/$1 versions=$2 key cache out
  key=$(cat "$module"/* <(echo "$versions") | sha256sum | cut -c1-16)
  cache=${NARTHEX_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/narthex}
  out=$cache/tools/$1-$key
  if [ ! -e "$out/.done" ]; then
    echo "building the tools of integration/tools/$1 (once; minutes on a cold cache)" >&2
    mkdir -p "$cache/tools"
    local tmp; tmp=$(mktemp -d "$cache/tools/.$1.XXXXXX")
    (cd "$module" && "${@:3}" "$tmp") >&2
    touch "$tmp/.done"
    rm -rf "$out"; chmod 755 "$tmp"; mv "$tmp" "$out"
  fi
  echo "$out"
}

build_go() { "$GO" build -o "$1/" $("$GO" list -f '{{if eq .Name "main"}}{{.ImportPath}}{{end}}' tool); }

# No module's own script runs.
install_npm() { cp package.json package-lock.json "$1" && npm ci --prefix "$1" --ignore-scripts --no-audit --no-fund --silent; }

case ${1:-} in
  check) shift; ok=0; for t in "$@"; do need "$t" || ok=1; done; exit $ok ;;
  apt) install_packages "$2" ;;
  spire|lint|ghostunnel|helm|kustomize|manifests|h2spec|grpcinterop) cached "$1" "$("$GO" env GOVERSION GOARCH)" build_go ;;
  grpcjs) need npm; cached "$1" "$(node --version)" install_npm ;;
  *) sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
