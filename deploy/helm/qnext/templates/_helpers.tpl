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

{{- /* Whether clients call a service of the chart; Ray's proxy has one that KubeRay makes. */ -}}
{{- define "qnext.hasAddress" -}}
{{- if or (not .Values.ray.enabled) (eq .Values.ray.address "router") -}}
yes
{{- end -}}
{{- end -}}

{{- define "qnext.serviceName" -}}
{{- include "qnext.fullname" . -}}
{{- if not (include "qnext.hasAddress" .) -}}
-serve-svc
{{- end -}}
{{- end -}}

{{- /* Where the pods listen that clients reach. Ray's proxy has 8000 in every pod that serves. */ -}}
{{- define "qnext.port" -}}
{{- if and .Values.ray.enabled (include "qnext.hasAddress" .) -}}
8001
{{- else -}}
8000
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
{{- if and .Values.ray.enabled (or (ne .Values.autoscaling.kind "none") .Values.serviceMonitor.enabled) -}}
{{- fail "ray.enabled scales by ray.maxReplicas, and has neither autoscaling.kind nor a serviceMonitor" -}}
{{- end -}}
{{- if and .Values.ray.enabled (lt (int .Values.replicas) 1) -}}
{{- fail "ray.enabled needs replicas of at least 1" -}}
{{- end -}}
{{- if and .Values.ray.enabled .Values.ray.maxReplicas (lt (int .Values.ray.maxReplicas) (int .Values.replicas)) -}}
{{- fail "ray.maxReplicas must be at least replicas" -}}
{{- end -}}
{{- if and (include "qnext.keepsFiles" .) (not .Values.ray.enabled) -}}
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

{{- define "qnext.mounts" -}}
- name: flags
  mountPath: /etc/qnext/serve.yaml
  subPath: serve.yaml
  readOnly: true
{{- if not .Values.keys.insecureNoAuth }}
- name: keys
  mountPath: /etc/qnext/keys
  readOnly: true
{{- end }}
- name: model
  mountPath: {{ .Values.model.path | quote }}
  readOnly: true
  {{- with .Values.model.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
- name: tmp
  mountPath: /tmp
{{- if .Values.diskCache.enabled }}
- name: cache
  mountPath: /var/cache/qnext
{{- end }}
{{- if .Values.audit.enabled }}
- name: audit
  mountPath: /var/log/qnext
{{- end }}
{{- end -}}

{{- define "qnext.volumes" -}}
- name: flags
  configMap:
    name: {{ include "qnext.fullname" . }}
{{- if not .Values.keys.insecureNoAuth }}
# Root's, readable by the group of the pod; the server refuses a file that others may read.
- name: keys
  secret:
    secretName: {{ include "qnext.keysSecret" . }}
    defaultMode: 0440
{{- end }}
- name: model
  {{- if .Values.model.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.model.existingClaim }}
    readOnly: true
  {{- else }}
  hostPath:
    path: {{ .Values.model.hostPath | quote }}
    type: Directory
  {{- end }}
- name: tmp
  emptyDir:
    medium: Memory
    sizeLimit: 256Mi
{{- with .Values.diskCache }}
{{- if .enabled }}
- name: cache
  {{- if .existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .existingClaim }}
  {{- else if .hostPath }}
  hostPath:
    path: {{ .hostPath | quote }}
    type: Directory
  {{- else }}
  emptyDir:
    sizeLimit: {{ add .gibibytes 1 }}Gi
  {{- end }}
{{- end }}
{{- end }}
{{- with .Values.audit }}
{{- if .enabled }}
- name: audit
  {{- if .existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .existingClaim }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .gibibytes }}Gi
  {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "qnext.placement" -}}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "qnext.flags" -}}
{{- $flags := deepCopy .Values.serve -}}
{{- if include "qnext.hasAddress" . -}}
{{- $_ := set $flags "host" "0.0.0.0" -}}
{{- $_ := set $flags "port" (int (include "qnext.port" .)) -}}
{{- end -}}
{{- $_ := set $flags "served-model-name" (list .Values.model.name) -}}
{{- $_ := set $flags "shutdown-timeout" .Values.shutdownTimeoutSeconds -}}
{{- $_ := set $flags "open-readiness" true -}}
{{- /* The service's names. Probes and Prometheus ask by address. */ -}}
{{- $name := include "qnext.serviceName" . -}}
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

{{- /* A pod of Ray: head, router or replica. KubeRay adds the command, the ports of the cluster and other probes. */ -}}
{{- define "qnext.rayPod" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "qnext.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
    {{- with $root.Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/flags: {{ include "qnext.flags" $root | sha256sum }}
    {{- with $root.Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  # The variables of a service called qnext-serve would be read as flags.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $root.Values.preStopSeconds $root.Values.shutdownTimeoutSeconds 30 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  containers:
    - name: {{ eq .role "head" | ternary "ray-head" "ray-worker" }}
      image: {{ include "qnext.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        # Ray tells its makers of its use otherwise.
        - name: RAY_USAGE_STATS_ENABLED
          value: "0"
      {{- $sleep := add $root.Values.preStopSeconds $root.Values.shutdownTimeoutSeconds }}
      {{- if gt (int $sleep) 0 }}
      # A cluster that another one replaces ends at once, all of its pods; running answers have this time before.
      lifecycle:
        preStop:
          sleep:
            seconds: {{ $sleep }}
      {{- end }}
      {{- if and (eq .role "router") (include "qnext.hasAddress" $root) }}
      ports:
        - name: http
          containerPort: {{ include "qnext.port" $root }}
          protocol: TCP
      # Asked of a replica, through the router: a cluster whose models still load gets no requests.
      readinessProbe:
        httpGet:
          path: /health/ready
          port: http
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop:
            - ALL
      resources:
        {{- toYaml .resources | nindent 8 }}
      volumeMounts:
        {{- include "qnext.mounts" $root | nindent 8 }}
        - name: ray
          mountPath: /tmp/ray
        - name: shm
          mountPath: /dev/shm
  volumes:
    {{- include "qnext.volumes" $root | nindent 4 }}
    # Logs and sockets of Ray, and what passes between its processes.
    - name: ray
      emptyDir:
        sizeLimit: 4Gi
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: 1Gi
  {{- include "qnext.placement" $root | nindent 2 }}
{{- end -}}
