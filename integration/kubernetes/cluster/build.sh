#!/usr/bin/env bash
# Builds the programs and images of a one-node Kubernetes and prints the
# folder they are in.
#
#   build.sh            builds what is missing (ten minutes on two cores, once)
#   build.sh --cached   fails instead of building
#
# Kubernetes, etcd and CoreDNS are built from Go modules; containerd, runc and
# the CNI plugins come out of Debian packages, which are unpacked and never
# installed. All of it is kept in a cache under a name made from what it is
# made of: $NARTHEX_CACHE, or narthex/ in the user's cache directory.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/settings.sh"
GO=${GO:-go}
export CGO_ENABLED=0

key=$(cd "$here" && cat settings.sh build.sh mkimage programs/go.* images/*/* <("$GO" env GOVERSION GOARCH) | sha256sum | cut -c1-16)
cache=${NARTHEX_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/narthex}/kubernetes
out=$cache/$key
if [ -e "$out/.done" ]; then echo "$out"; exit 0; fi
if [ "${1:-}" = --cached ]; then echo "the programs of the cluster are not built: run integration/kubernetes/cluster/build.sh" >&2; exit 1; fi
[ $# -eq 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

"$here/../../tools/install.sh" check go gcc
"$here/../../tools/install.sh" apt cluster
for tool in apt-get dpkg-deb; do
  command -v $tool >/dev/null || { echo "missing: $tool. The node's containerd and runc are Debian packages: use Debian or Ubuntu, or name a cluster of yours by KUBECONFIG" >&2; exit 1; }
done

echo "building the programs of integration/kubernetes/cluster (once; ten minutes on a cold cache)" >&2
mkdir -p "$cache"
new=$(mktemp -d "$cache/.new.XXXXXX")
trap 'rm -rf "$new"' EXIT
mkdir "$new/bin" "$new/images" "$new/debian"

stamp=k8s.io/component-base/version
minor=${version#v1.}
flags="-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=${minor%%.*} -X $stamp.gitTreeState=clean"
cd "$here/programs"
for program in $("$GO" list -f '{{if eq .Name "main"}}{{.ImportPath}}{{end}}' tool); do
  name=${program##*/}
  [ "$name" != v3 ] || name=etcd
  echo "  $name" >&2
  nice "$GO" build -trimpath -ldflags "$flags" -o "$new/bin/$name" "$program" >&2
done

for image in pause coredns; do
  echo "  $image" >&2
  cd "$here/images/$image"
  nice "$GO" build -trimpath -ldflags '-s -w' -o "$new/bin/$image" . >&2
  "$here/mkimage" "localhost/$image:1" "$new/bin/$image" "$new/images/$image.tar"
done

mkdir "$new/packages"
chmod 755 "$new" "$new/packages"
cd "$new/packages"
apt-get -qq download containerd runc containernetworking-plugins >/dev/null 2>&1 || { apt-get -qq update && apt-get -qq download containerd runc containernetworking-plugins; } >&2
for package in *.deb; do dpkg-deb -x "$package" "$new/debian"; done
cd "$here"
rm -r "$new/packages"

touch "$new/.done"
rm -rf "$out"
mv "$new" "$out"
echo "$out"
