#!/usr/bin/env bash
# node.sh STATE: PID 1 of a node. up.sh starts it in new namespaces; it dresses
# them as a machine, starts the daemons and becomes pause, which buries what is
# left to it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/settings.sh"
state=$1
programs=$(cat "$state/programs")
debian=$programs/debian
pki=$state/pki
export PATH=$programs/bin:$debian/usr/bin:$debian/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# /etc, /var and /opt are copies on write, /run is empty.
files() {
  local dir
  mount --make-rshared / # inside this namespace: the machine's is private to us
  for dir in etc var opt; do
    [ -d /$dir ] || continue
    mkdir -p "$state/$dir" "$state/work/$dir"
    mount -t overlay overlay -o "lowerdir=/$dir,upperdir=$state/$dir,workdir=$state/work/$dir" /$dir
  done
  mount --bind "$state/run" /run
  mount --make-shared /run
  mkdir -p /var/lib/kubelet /var/log/pods /var/log/containers /var/lib/cni /etc/cni/net.d "$state"/{kubelet,containerd,etcd,static-pods}
  chmod 700 "$state/etcd"
  mount --bind "$state/kubelet" /var/lib/kubelet
  mount --make-shared /var/lib/kubelet
  printf '127.0.0.1 localhost %s\n%s %s\n' $node $address $node > /etc/hosts
  : > "$state/resolv.conf"
}

# The cgroup of up.sh is the root of all that the node sees: runc and kubelet
# must not find the machine's own hierarchies.
cgroups() {
  local controllers name options
  umount -R /sys/fs/cgroup
  mount -t sysfs sysfs /sys
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  while IFS=: read -r _ controllers _; do
    case $controllers in
      '') continue ;;
      name=*) name=${controllers#name=} options=none,$controllers ;;
      *) name=$controllers options=$controllers ;;
    esac
    mkdir "/sys/fs/cgroup/$name"
    mount -t cgroup -o "$options" cgroup "/sys/fs/cgroup/$name"
  done < /proc/self/cgroup
}

# Settings of the kernel that kubelet insists on are the whole machine's: it is
# shown files in their place.
kernel() {
  local setting file copy
  for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=/proc/sys/${setting%=*} copy=$state/work/${setting//\//-}
    [ "$(cat "$file")" != "${setting#*=}" ] || continue
    echo "${setting#*=}" > "$copy"
    mount --bind "$copy" "$file"
  done
}

# The node's address is on one of two ends that are both here.
network() {
  ip link set lo up
  ip link add node0 type veth peer name node1
  ip address add "$address/24" dev node0
  ip link set node0 up
  ip link set node1 up
  ip route add "$services" dev node0 src "$address"
  echo 1 > /proc/sys/net/ipv4/ip_forward
  if [ -e /proc/sys/net/bridge/bridge-nf-call-iptables ]; then echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables; fi
  rm -f /etc/cni/net.d/*
  cat > /etc/cni/net.d/10-node.conflist <<J
{"cniVersion": "0.4.0", "name": "node", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$pods"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
J
}

configure_containerd() {
  cat > "$state/containerd.toml" <<T
version = 2
root = "$state/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$state/containerd-opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true # a machine that is a container itself may not lower it
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        BinaryName = "$debian/usr/sbin/runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$debian/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
T
}

# syncFrequency bounds how long a changed ConfigMap takes to reach its volume.
configure_kubelet() {
  cat > "$state/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
port: 10250
readOnlyPort: 0
healthzBindAddress: 127.0.0.1
authentication: {anonymous: {enabled: false}, webhook: {enabled: true, cacheTTL: 5s}, x509: {clientCAFile: $pki/ca.crt}}
authorization: {mode: Webhook, webhook: {cacheAuthorizedTTL: 5s, cacheUnauthorizedTTL: 2s}}
tlsCertFile: $pki/kubelet-serving.crt
tlsPrivateKeyFile: $pki/kubelet-serving.key
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /
failCgroupV1: false
failSwapOn: false
resolvConf: $state/resolv.conf
clusterDomain: cluster.local
clusterDNS: [$dns]
volumePluginDir: /var/lib/kubelet/volumeplugins
staticPodPath: $state/static-pods
imageGCHighThresholdPercent: 100
imageMinimumGCAge: 24h
evictionHard: {memory.available: 100Mi, nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}
nodeStatusUpdateFrequency: 5s
syncFrequency: 3s
shutdownGracePeriod: 0s
maxPods: 250
serializeImagePulls: false
Y
}

configure_kube_proxy() {
  cat > "$state/kube-proxy.yaml" <<Y
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
bindAddress: 0.0.0.0
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
clusterCIDR: $pods
hostnameOverride: $node
clientConnection: {kubeconfig: $pki/kube-proxy.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
Y
}

# start PROGRAM ARGUMENT…
start() {
  printf '%q ' "$@" > "$state/daemons/$1"
  "$here/daemon" start "$state" "$1"
}
wait_for() { # WHAT COMMAND…
  local i
  for ((i = 0; i < 1200; i++)); do "${@:2}" >/dev/null 2>&1 && return 0; sleep 0.1; done
  echo "$1 is not ready; see $state/log" >&2
  return 1
}

start_api_server() {
  start etcd --name $node --data-dir "$state/etcd" --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster $node=http://127.0.0.1:2380 \
    --unsafe-no-fsync --log-level warn
  start kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=0.0.0.0 --secure-port=6443 --advertise-address="$address" \
    --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" \
    --kubelet-client-certificate="$pki/apiserver-kubelet.crt" --kubelet-client-key="$pki/apiserver-kubelet.key" \
    --kubelet-certificate-authority="$pki/ca.crt" --kubelet-preferred-address-types=InternalIP \
    --requestheader-client-ca-file="$pki/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --service-account-signing-key-file="$pki/service-accounts.key" --service-account-key-file="$pki/service-accounts.pub" \
    --service-cluster-ip-range="$services" --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
    --allow-privileged=true --profiling=false
}

start_controllers() {
  local name
  for name in kube-controller-manager kube-scheduler; do
    local own=(--kubeconfig="$pki/$name.kubeconfig" --authentication-kubeconfig="$pki/$name.kubeconfig" --authorization-kubeconfig="$pki/$name.kubeconfig"
      --bind-address=127.0.0.1 --leader-elect=false --profiling=false)
    if [ $name = kube-controller-manager ]; then
      own+=(--use-service-account-credentials=true --service-account-private-key-file="$pki/service-accounts.key" --root-ca-file="$pki/ca.crt"
        --cluster-signing-cert-file="$pki/ca.crt" --cluster-signing-key-file="$pki/ca.key" --service-cluster-ip-range="$services")
    fi
    start $name "${own[@]}"
  done
}

load_images() {
  local image
  wait_for containerd ctr -a /run/containerd/containerd.sock version
  for image in "$programs"/images/*.tar; do ctr -a /run/containerd/containerd.sock -n k8s.io images import "$image" > /dev/null; done
}

exec </dev/null
hostname $node
files
cgroups
kernel
network
configure_containerd
configure_kubelet
configure_kube_proxy
start containerd -c "$state/containerd.toml"
start_api_server
load_images
wait_for "the API server" curl -sf --cacert "$pki/ca.crt" --cert "$pki/admin.crt" --key "$pki/admin.key" https://127.0.0.1:6443/readyz
start_controllers
start kubelet --config="$state/kubelet.yaml" --kubeconfig="$pki/kubelet.kubeconfig" --hostname-override=$node --node-ip="$address" --v=2
start kube-proxy --config="$state/kube-proxy.yaml"
kubectl --kubeconfig "$pki/admin.kubeconfig" apply -f "$here/coredns.yaml" > /dev/null
touch "$state/started"
exec pause
