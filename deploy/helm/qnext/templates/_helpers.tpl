{{- define "qnext.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains "qnext" .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-qnext" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "qnext.selector" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default "qnext" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "qnext.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "qnext.selector" . }}
{{- end -}}

{{- define "qnext.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "qnext.keysSecret" -}}
{{- .Values.keys.existingSecret | default (printf "%s-keys" (include "qnext.fullname" .)) -}}
{{- end -}}

{{- /* Something that one server writes outlives its pod: one pod then, and the old one ends before the new one starts. */ -}}
{{- define "qnext.keepsFiles" -}}
{{- if and .Values.diskCache.enabled (or .Values.diskCache.existingClaim .Values.diskCache.hostPath) -}}
yes
{{- else if and .Values.audit.enabled .Values.audit.existingClaim -}}
yes
{{- end -}}
{{- end -}}

{{- /* Combinations that no schema can say. */ -}}
{{- define "qnext.check" -}}
{{- $keys := .Values.keys -}}
{{- $ways := 0 -}}
{{- if $keys.existingSecret }}{{ $ways = add1 $ways }}{{ end -}}
{{- if $keys.file }}{{ $ways = add1 $ways }}{{ end -}}
{{- if $keys.insecureNoAuth }}{{ $ways = add1 $ways }}{{ end -}}
{{- if ne (int $ways) 1 -}}
{{- fail "set exactly one of keys.existingSecret, keys.file and keys.insecureNoAuth" -}}
{{- end -}}
{{- if eq (empty .Values.model.existingClaim) (empty .Values.model.hostPath) -}}
{{- fail "set exactly one of model.existingClaim and model.hostPath" -}}
{{- end -}}
{{- if and .Values.diskCache.existingClaim .Values.diskCache.hostPath -}}
{{- fail "set at most one of diskCache.existingClaim and diskCache.hostPath" -}}
{{- end -}}
{{- if include "qnext.keepsFiles" . -}}
{{- if or (gt (int .Values.replicas) 1) (ne .Values.autoscaling.kind "none") -}}
{{- fail "a disk cache or audit log that outlives its pod belongs to one replica: two cannot share it" -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.kind "keda") (not .Values.autoscaling.prometheusUrl) -}}
{{- fail "autoscaling.kind keda needs autoscaling.prometheusUrl" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not .Values.keys.insecureNoAuth) (not .Values.serviceMonitor.keySecret.name) -}}
{{- fail "serviceMonitor needs keySecret.name: a Secret with a key that has the scope metrics" -}}
{{- end -}}
{{- end -}}

{{- define "qnext.flags" -}}
{{- $flags := deepCopy .Values.serve -}}
{{- $_ := set $flags "host" "0.0.0.0" -}}
{{- $_ := set $flags "port" 8000 -}}
{{- $_ := set $flags "served-model-name" (list .Values.model.name) -}}
{{- $_ := set $flags "shutdown-timeout" .Values.shutdownTimeoutSeconds -}}
{{- $_ := set $flags "open-readiness" true -}}
{{- /* The service's names. Probes and Prometheus ask by address. */ -}}
{{- $name := include "qnext.fullname" . -}}
{{- $inside := printf "%s.%s" $name .Release.Namespace -}}
{{- $hosts := list $name $inside (printf "%s.svc" $inside) (printf "%s.svc.cluster.local" $inside) -}}
{{- $_ := set $flags "allowed-hosts" (concat $hosts .Values.allowedHosts) -}}
{{- if .Values.keys.insecureNoAuth -}}
{{- $_ := set $flags "insecure-no-auth" true -}}
{{- else -}}
{{- $_ := set $flags "keys" "/etc/qnext/keys/keys.json" -}}
{{- end -}}
{{- if .Values.diskCache.enabled -}}
{{- $_ := set $flags "disk-cache" "/var/cache/qnext/prefixes" -}}
{{- $_ := set $flags "disk-cache-bytes" (mul (int64 .Values.diskCache.gibibytes) 1073741824) -}}
{{- end -}}
{{- if .Values.audit.enabled -}}
{{- $_ := set $flags "audit-log" "/var/log/qnext/audit.jsonl" -}}
{{- $_ := set $flags "audit-chain" .Values.audit.chain -}}
{{- end -}}
{{- toYaml (dict "serve" $flags) -}}
{{- end -}}
