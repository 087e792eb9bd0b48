{{/* What all objects carry. */}}
{{- define "narthex.labels" -}}
app.kubernetes.io/name: narthex
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "narthex.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{/* The port of an address, and whether others than this pod reach it: host:port, :port. Sockets have none. */}}
{{- define "narthex.openPort" -}}
{{- if not (or (hasPrefix "unix:" .) (hasPrefix "127." .) (hasPrefix "localhost:" .) (hasPrefix "[::1]" .)) -}}
{{- regexFind "[0-9]+$" . -}}
{{- end }}
{{- end }}

{{/* The ports of the listeners that the Service and the policy know, by comma. */}}
{{- define "narthex.listenerPorts" -}}
{{- $ports := list -}}
{{- if .Values.proxy.enabled }}
{{- range .Values.proxy.listeners }}
{{- with include "narthex.openPort" .bind }}{{ $ports = append $ports . }}{{ end }}
{{- end }}
{{- end }}
{{- join "," $ports }}
{{- end }}

{{- define "narthex.socket" -}}/run/narthex/public/{{ .Values.workloadAPI.socketName }}{{- end }}

{{/* The sigstore block of narthex.yaml: of registries, passwords and CAs are files that the chart mounts. */}}
{{- define "narthex.sigstore" -}}
{{- $registries := list -}}
{{- range .registries }}
{{- $r := deepCopy . }}
{{- with .password }}{{ $_ := set $r "password" (printf "/etc/narthex/registries/%s" .) }}{{ end }}
{{- with .ca }}{{ $_ := set $r "ca" (printf "/etc/narthex/sigstore/%s" .) }}{{ end }}
{{- $registries = append $registries $r }}
{{- end }}
{{- $block := dict "trusted_root" "/etc/narthex/sigstore/trusted_root.json" "allow_unsigned" .allowUnsigned -}}
{{- with .allowedIdentities }}{{ $_ := set $block "allowed_identities" . }}{{ end }}
{{- with $registries }}{{ $_ := set $block "registries" . }}{{ end }}
{{- mustMergeOverwrite $block (deepCopy .config) | toJson }}
{{- end }}

{{/* The broker block of narthex.yaml. */}}
{{- define "narthex.broker" -}}
{{- $block := dict "brokers" .brokers -}}
{{- if .socket }}{{ $_ := set $block "socket" "/run/narthex/broker/broker.sock" }}{{ end }}
{{- with int .port }}{{ $_ := set $block "listen" (printf ":%d" .) }}{{ end }}
{{- toJson $block }}
{{- end }}

{{/* narthex.yaml of the agent. */}}
{{- define "narthex.agentConfig" -}}
{{- $kubelet := dict "port" (int .Values.agent.kubelet.port) "read_only" .Values.agent.kubelet.readOnly -}}
{{- if not .Values.agent.kubelet.readOnly }}
{{- $_ := set $kubelet "skip_verification" .Values.agent.kubelet.skipVerification }}
{{- end }}
{{- if .Values.agent.kubelet.clientSecret }}
{{- $_ := set $kubelet "certificate" "/etc/narthex/kubelet/tls.crt" }}
{{- $_ := set $kubelet "key" "/etc/narthex/kubelet/tls.key" }}
{{- end }}
{{- if .Values.hostNetwork }}
{{- $_ := set $kubelet "host" "127.0.0.1" }}
{{- else }}
{{- $_ := set $kubelet "host_env" "NODE_IP" }}
{{- end }}
{{- $k8s := dict "node_name_env" "NODE_NAME" "kubelet" $kubelet "containers" .Values.agent.containers -}}
{{- if .Values.agent.sigstore.trustedRootConfigMap }}
{{- $_ := set $k8s "sigstore" (include "narthex.sigstore" .Values.agent.sigstore | fromJson) }}
{{- end }}
{{- $agent := dict
  "server" (dict "address" .Values.server.address "bundle" (dict "file" (printf "/etc/narthex/bundle/%s" .Values.server.bundleKey)))
  "node_attestor" (dict "k8s_psat" (dict "cluster" .Values.clusterName "token" "/var/run/secrets/tokens/spire-agent"))
  "workload_attestors" (dict "k8s" $k8s)
  "workload_api" (dict "socket" (include "narthex.socket" .))
-}}
{{- with .Values.agent.admin }}
{{- if .enabled }}
{{- $_ := set $agent "admin" (dict "socket" "/run/narthex/private/admin.sock" "authorized_delegates" .authorizedDelegates) }}
{{- end }}
{{- end }}
{{- if .Values.agent.broker.brokers }}
{{- $_ := set $agent "broker" (include "narthex.broker" .Values.agent.broker | fromJson) }}
{{- end }}
{{- dict
  "trust_domain" .Values.trustDomain
  "data_dir" "/var/lib/narthex"
  "agent" (mustMergeOverwrite $agent (deepCopy .Values.agent.config))
  "telemetry" (dict "listen" (printf "%s:9901" (ternary "" "127.0.0.1" .Values.metrics.podAddress)) "health" ":9902")
  "log" .Values.log
  | toYaml }}
{{- end }}

{{/* narthex.yaml of the proxy. Its ports are its own: it shares the pod's network with the agent. */}}
{{- define "narthex.proxyConfig" -}}
{{- $proxy := dict
  "source" "workload_api"
  "workload_api" (dict "socket" (include "narthex.socket" .))
  "policies" (list (printf "/etc/narthex/policies%s*.yaml" (ternary "/" "." (not (empty .Values.proxy.policiesConfigMap)))))
  "listeners" .Values.proxy.listeners
-}}
{{- if .Values.hostNetwork }}
{{- $_ := set $proxy "handover" (dict "socket" "/run/narthex-proxy/handover.sock") }}
{{- end }}
{{- dict
  "trust_domain" .Values.trustDomain
  "data_dir" "/var/lib/narthex"
  "proxy" (mustMergeOverwrite $proxy (deepCopy .Values.proxy.config))
  "telemetry" (dict "listen" (printf "%s:9904" (ternary "" "127.0.0.1" .Values.metrics.podAddress)) "health" ":9903")
  "log" .Values.log
  | toYaml }}
{{- end }}

{{/* Ports that cannot be: those of one pod are of one network, or of the node's. */}}
{{- define "narthex.validatePorts" -}}
{{- if gt (int (regexFind "[0-9]+$" .Values.server.address)) 65535 }}
{{- fail (printf "server.address %s: there is no such port" .Values.server.address) }}
{{- end }}
{{- $taken := dict "9901" "metrics of the agent" "9902" "probes of the agent" "9903" "probes of the proxy" "9904" "metrics of the proxy" -}}
{{- with int .Values.agent.broker.port }}
{{- with get $taken (toString .) }}
{{- fail (printf "agent.broker.port %d: it is that of the %s" (int $.Values.agent.broker.port) .) }}
{{- end }}
{{- $_ := set $taken (toString .) "brokers" }}
{{- end }}
{{- range $i, $l := .Values.proxy.listeners }}
{{- $what := printf "proxy.listeners[%d].bind %s" $i $l.bind }}
{{- if not (hasPrefix "unix:" $l.bind) }}
{{- $port := regexFind "[0-9]+$" $l.bind }}
{{- if or (gt (int $port) 65535) (lt (int $port) 1) }}
{{- fail (printf "%s: the port has to be one from 1 to 65535" $what) }}
{{- end }}
{{- with get $taken $port }}
{{- fail (printf "%s: port %s is that of the %s" $what $port .) }}
{{- end }}
{{- if include "narthex.openPort" $l.bind }}
{{- $_ := set $taken $port (printf "listener %s" $l.name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Who may have the identities of others: each of them has to be of use. */}}
{{- define "narthex.validateBrokers" -}}
{{- with .Values.agent.admin }}
{{- if and .authorizedDelegates (not .enabled) }}
{{- fail "agent.admin.authorizedDelegates ask at the admin socket: set agent.admin.enabled" }}
{{- end }}
{{- end }}
{{- with .Values.agent.broker }}
{{- if and .brokers (not .socket) (not .port) }}
{{- fail "agent.broker.brokers need a socket or a port at which they ask" }}
{{- end }}
{{- if and .port (not .brokers) }}
{{- fail "agent.broker.port is given and agent.broker.brokers is empty: nobody might ask there" }}
{{- end }}
{{- if and .service (not .port) }}
{{- fail "agent.broker.service needs agent.broker.port, to which it leads" }}
{{- end }}
{{- end }}
{{- $brokers := dict "agent.admin.authorizedDelegates" .Values.agent.admin.authorizedDelegates "agent.broker.brokers" .Values.agent.broker.brokers -}}
{{- range $key, $ids := $brokers }}
{{- range $i, $id := $ids }}
{{- if kindIs "map" $id }}{{ $id = $id.id }}{{ end }}
{{- if not (hasPrefix (printf "spiffe://%s/" $.Values.trustDomain) $id) }}
{{- fail (printf "%s[%d]: %s is not of trust domain %s" $key $i $id $.Values.trustDomain) }}
{{- end }}
{{- end }}
{{- end }}
{{- if hasKey .Values.agent.config "broker" }}
{{- fail "agent.config.broker: say it in agent.broker, from which the chart makes more than narthex.yaml" }}
{{- end }}
{{- end }}

{{/* Values that each are good and do not go together. */}}
{{- define "narthex.validate" -}}
{{- if and .Values.proxy.listeners (not .Values.proxy.policies) (not .Values.proxy.policiesConfigMap) }}
{{- fail "proxy.listeners need proxy.policies, or proxy.policiesConfigMap: what no rule allows is refused" }}
{{- end }}
{{- if and .Values.proxy.policies .Values.proxy.policiesConfigMap }}
{{- fail "proxy.policies and proxy.policiesConfigMap: only one of them can say what is allowed" }}
{{- end }}
{{- if and .Values.proxy.listeners (not .Values.proxy.enabled) }}
{{- fail "proxy.listeners are given and proxy.enabled is false: nobody would listen there" }}
{{- end }}
{{- include "narthex.validatePorts" . }}
{{- include "narthex.validateBrokers" . }}
{{- range $key := list "listeners" "policies" }}
{{- if hasKey $.Values.proxy.config $key }}
{{- fail (printf "proxy.config.%s: say it in proxy.%s, from which the chart makes more than narthex.yaml" $key $key) }}
{{- end }}
{{- end }}
{{- with .Values.agent.sigstore }}
{{- if and (not .trustedRootConfigMap) (or .allowedIdentities .allowUnsigned .registries .registrySecret .config) }}
{{- fail "agent.sigstore needs trustedRootConfigMap: without it no image is looked at" }}
{{- end }}
{{- range $i, $r := .registries }}
{{- if and $r.password (not $.Values.agent.sigstore.registrySecret) }}
{{- fail (printf "agent.sigstore.registries[%d].password is a key of registrySecret, which is empty" $i) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.metrics.podMonitor.enabled (not .Values.metrics.podAddress) }}
{{- fail "metrics.podMonitor.enabled needs metrics.podAddress: Prometheus reaches the pod by its address" }}
{{- end }}
{{- if and (or .Values.agent.kubelet.readOnly .Values.agent.kubelet.clientSecret) (ne .Values.rbac.kubelet "none") }}
{{- fail "agent.kubelet.readOnly and clientSecret ask without a token: set rbac.kubelet to none, so that there is none" }}
{{- end }}
{{- if and .Values.agent.kubelet.readOnly .Values.agent.kubelet.clientSecret }}
{{- fail "agent.kubelet.clientSecret has no use with readOnly: nothing is authenticated there" }}
{{- end }}
{{- if and (eq .Values.rbac.kubelet "none") (not .Values.agent.kubelet.readOnly) (not .Values.agent.kubelet.clientSecret) }}
{{- fail "rbac.kubelet is none: the kubelet would refuse the agent; set agent.kubelet.clientSecret, or readOnly" }}
{{- end }}
{{- end }}
