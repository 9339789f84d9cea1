{{/* Names. A RayService has 47 characters at most; what we add keeps to 63. */}}
{{- define "dspark.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "dspark.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "dspark.name" .) .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "dspark.name" .) -}}
{{- end -}}
{{- end -}}

{{/* What never changes for a release: selectors, and the labels of Ray's pods. */}}
{{- define "dspark.selectorLabels" -}}
app.kubernetes.io/name: dspark
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Of every other object. Versions must not be on Ray's pods: each would make a new cluster. */}}
{{- define "dspark.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{ include "dspark.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* metadata of an object. (root, name, component?, labels?, annotations?) */}}
{{- define "dspark.metadata" -}}
{{- $root := .root -}}
name: {{ .name }}
{{- if not .cluster }}
namespace: {{ $root.Release.Namespace }}
{{- end }}
labels:
  {{- include "dspark.labels" $root | nindent 2 }}
  {{- with .component }}
  app.kubernetes.io/component: {{ . }}
  {{- end }}
  {{- with merge (dict) (default (dict) .labels) $root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (default (dict) .annotations) $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* An image's name. (root, image: {repository, tag, digest}, registry) */}}
{{- define "dspark.image" -}}
{{- $name := .image.repository -}}
{{- with .registry }}{{- $name = printf "%s/%s" (trimSuffix "/" .) $name -}}{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Our own image of a role. (root, role) */}}
{{- define "dspark.roleImage" -}}
{{- $role := ternary "gateway" .role (has .role (list "head" "prefetch" "test")) -}}
{{- include "dspark.image" (dict "root" .root "image" (index .root.Values.image $role) "registry" .root.Values.image.registry) -}}
{{- end -}}

{{- define "dspark.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A pool's service account. (root, pool) */}}
{{- define "dspark.serviceAccount" -}}
{{- $account := (index .root.Values.pools .pool).serviceAccount -}}
{{- default (printf "%s-%s" (include "dspark.fullname" .root) .pool) $account.name -}}
{{- end -}}

{{/* Pod security "restricted", for pods and for containers. */}}
{{- define "dspark.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser | int64 }}
runAsGroup: {{ .Values.podSecurity.runAsGroup | int64 }}
fsGroup: {{ .Values.podSecurity.fsGroup | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "dspark.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Whether drafts are wanted: "true" or empty. Their pool may be there without. */}}
{{- define "dspark.drafts" -}}
{{- $most := ternary .Values.autoscaling.draft.maxReplicas .Values.draftReplicas .Values.autoscaling.enabled | int -}}
{{- if and (gt $most 0) (not (has .Values.model.drafter (list "none" "prompt-lookup"))) -}}true{{- end -}}
{{- end -}}

{{/* Replicas of a pool, as "least most". (root, pool) */}}
{{- define "dspark.replicas" -}}
{{- $v := .root.Values -}}
{{- if eq .pool "gateway" -}}
{{- $n := max (int $v.gatewayReplicas) (int $v.schedulerReplicas) -}}
least: {{ $n }}
most: {{ $n }}
{{- else if $v.autoscaling.enabled -}}
least: {{ (index $v.autoscaling .pool).minReplicas | int }}
most: {{ (index $v.autoscaling .pool).maxReplicas | int }}
{{- else -}}
{{- $n := index $v (printf "%sReplicas" .pool) | int -}}
least: {{ $n }}
most: {{ $n }}
{{- end -}}
{{- end -}}

{{/* The pools there are, as a list. */}}
{{- define "dspark.pools" -}}
{{- toJson (ternary (list "gateway" "verifier" "draft") (list "gateway" "verifier") .Values.pools.draft.enabled) -}}
{{- end -}}

{{/*
Pods that hold so many replicas. (root, pool): {filled, min, max, needed}, of both of its groups
together; filled: the fewest that have a replica at all.
*/}}
{{- define "dspark.pods" -}}
{{- $pool := index .root.Values.pools .pool -}}
{{- $replicas := include "dspark.replicas" . | fromYaml -}}
{{- $each := default 1 $pool.replicasPerPod | int -}}
{{- $least := div (add (int $replicas.least) $each -1) $each -}}
{{- $most := div (add (int $replicas.most) $each -1) $each -}}
{{- $min := ternary $least (int $pool.minPods) (kindIs "invalid" $pool.minPods) -}}
filled: {{ $least }}
min: {{ $min }}
max: {{ ternary (max $most $min 1) (int $pool.maxPods) (kindIs "invalid" $pool.maxPods) }}
needed: {{ $most }}
{{- end -}}

{{/* Names of Secrets; empty where there is none. */}}
{{- define "dspark.internalTlsSecret" -}}
{{- if .Values.tls.internal.enabled -}}
{{- default (printf "%s-internal-tls" (include "dspark.fullname" .)) .Values.tls.internal.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "dspark.grpcTlsSecret" -}}
{{- if .Values.tls.grpc.enabled -}}
{{- default (printf "%s-grpc-tls" (include "dspark.fullname" .)) .Values.tls.grpc.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "dspark.apiKeysSecret" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- .Values.apiKeys.existingSecret -}}
{{- else if .Values.apiKeys.keys -}}
{{- include "dspark.fullname" . }}-api-keys
{{- end -}}
{{- end -}}

{{- define "dspark.redisSecret" -}}
{{- if .Values.redis.existingSecret -}}
{{- .Values.redis.existingSecret -}}
{{- else if eq .Values.redis.mode "bundled" -}}
{{- include "dspark.fullname" . }}-redis
{{- end -}}
{{- end -}}

{{- define "dspark.redisSecretKey" -}}
{{- if .Values.redis.existingSecret -}}{{- .Values.redis.existingSecretKey -}}{{- else -}}password{{- end -}}
{{- end -}}

{{/* host:port, with the scheme, of the Redis there is. */}}
{{- define "dspark.redisHost" -}}
{{- if eq .Values.redis.mode "bundled" -}}
{{- printf "%s-redis.%s.svc:6379" (include "dspark.fullname" .) .Release.Namespace -}}
{{- else -}}
{{- printf "%s:%d" .Values.redis.external.host (int .Values.redis.external.port) -}}
{{- end -}}
{{- end -}}

{{- define "dspark.redisScheme" -}}
{{- if and (eq .Values.redis.mode "external") .Values.redis.external.tls.enabled -}}rediss{{- else -}}redis{{- end -}}
{{- end -}}

{{- define "dspark.redisCa" -}}
{{- if and (eq .Values.redis.mode "external") .Values.redis.external.tls.enabled -}}
{{- .Values.redis.external.tls.caSecret -}}
{{- end -}}
{{- end -}}

{{/* Our registry's URL, without a password: that is in a file beside it. */}}
{{- define "dspark.storeUrl" -}}
{{- if .Values.scheduler.storeUrl -}}
{{- .Values.scheduler.storeUrl -}}
{{- else if ne .Values.redis.mode "none" -}}
{{- $user := "" -}}
{{- if and (eq .Values.redis.mode "external") .Values.redis.external.username -}}
{{- $user = printf "%s@" (urlquery .Values.redis.external.username) -}}
{{- end -}}
{{- printf "%s://%s%s/%d" (include "dspark.redisScheme" .) $user (include "dspark.redisHost" .) (int .Values.redis.registryDatabase) -}}
{{- if include "dspark.redisCa" . -}}?ssl_ca_certs=/etc/dspark/redis-ca/ca.crt{{- end -}}
{{- end -}}
{{- end -}}

{{/* Repository ids to fetch from the hub, as a list, and whether the built-in target is wanted. */}}
{{- define "dspark.models" -}}
{{- $hub := list -}}
{{- range list .Values.model.target .Values.model.drafter -}}
{{- if and (contains "/" .) (not (hasPrefix "/" .)) -}}{{- $hub = append $hub . -}}{{- end -}}
{{- end -}}
builtin: {{ eq .Values.model.target "smollm2-135m" }}
hub: {{ toJson (uniq $hub) }}
{{- end -}}

{{/* Ports that Ray would otherwise draw, fixed so that policies can name them. */}}
{{- define "dspark.rayPorts" -}}
gcs: 6379
dashboard: 8265
node-manager: 7000
object-manager: 7001
runtime-env-agent: 7002
agent-grpc: 7003
agent-http: 52365
metrics: 8080
autoscaler-metrics: 44217
dashboard-metrics: 44227
worker-first: 10100
worker-last: 11099
{{- end -}}
