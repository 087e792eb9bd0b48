#!/usr/bin/env bash
# pki.sh STATE: makes the cluster's authority, certificates, key of service
# accounts and kubeconfigs in STATE/pki, unless they are there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/settings.sh"
cd "$1/pki"
[ ! -e .done ] || exit 0
umask 077

key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
authority() { # NAME
  openssl req -x509 "${key[@]}" -days 3650 -subj "/CN=$1" -addext basicConstraints=critical,CA:TRUE \
    -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature -keyout "$1.key" -out "$1.crt" 2>/dev/null
}
certificate() { # NAME SUBJECT USAGE [SUBJECT-ALTERNATIVE-NAMES]
  openssl req -new "${key[@]}" -subj "$2" -keyout "$1.key" -out request 2>/dev/null
  printf '%s\n' basicConstraints=CA:FALSE keyUsage=critical,digitalSignature "extendedKeyUsage=$3" ${4:+"subjectAltName=$4"} > extensions
  openssl x509 -req -in request -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -sha256 -extfile extensions -out "$1.crt" 2>/dev/null
  rm request extensions
}
kubeconfig() { # NAME
  cat > "$1.kubeconfig" <<Y
apiVersion: v1
kind: Config
current-context: node
clusters: [{name: node, cluster: {server: "https://127.0.0.1:6443", certificate-authority: $PWD/ca.crt}}]
users: [{name: $1, user: {client-certificate: $PWD/$1.crt, client-key: $PWD/$1.key}}]
contexts: [{name: node, context: {cluster: node, user: $1}}]
Y
}

authority ca
authority front-proxy-ca
certificate apiserver /CN=kube-apiserver serverAuth \
  "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1,IP:$address,IP:$api"
certificate apiserver-kubelet /O=system:masters/CN=kube-apiserver-kubelet-client clientAuth
certificate kubelet-serving "/O=system:nodes/CN=system:node:$node" serverAuth "DNS:$node,DNS:localhost,IP:127.0.0.1,IP:$address"
certificate kubelet "/O=system:nodes/CN=system:node:$node" clientAuth
certificate admin /O=system:masters/CN=admin clientAuth
for user in kube-controller-manager kube-scheduler kube-proxy; do certificate $user "/CN=system:$user" clientAuth; done
for user in admin kubelet kube-controller-manager kube-scheduler kube-proxy; do kubeconfig $user; done
openssl genrsa -out service-accounts.key 2048 2>/dev/null
openssl rsa -in service-accounts.key -pubout -out service-accounts.pub 2>/dev/null
touch .done
