{{/*
The pod template of a Ray group. (root, pool: head|gateway|draft|verifier, spot: bool)

Nothing here may depend on what serveConfigV2 tunes: each change of a template is a new cluster.
*/}}
{{- define "dspark.podTemplate" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
{{- $v := index $root.Values.pools $pool -}}
{{- $spot := ternary (default (dict) $v.spot) (dict) (default false .spot) -}}
{{- $worker := ne $pool "head" -}}
{{- $kubernetes := or (eq $pool "head") (eq $pool "gateway") -}}
{{- $ports := include "dspark.rayPorts" $root | fromYaml -}}
metadata:
  labels:
    {{- include "dspark.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $pool }}
    {{- if $worker }}
    dspark.io/role: {{ $pool }}
    {{- end }}
    {{- with $v.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $v.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "dspark.serviceAccount" (dict "root" $root "pool" $pool) }}
  # The autoscaler beside the head and the schedulers among the gateways ask the API; nobody else does.
  automountServiceAccountToken: {{ $kubernetes }}
  enableServiceLinks: false
  {{- with include "dspark.pullSecrets" $root | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- $class := $v.priorityClassName }}
  {{- if and (not $class) $root.Values.priorityClasses.create }}
  {{- $class = printf "%s-%s" (include "dspark.fullname" $root) (ternary "draft" "serving" (eq $pool "draft")) }}
  {{- end }}
  {{- with $class }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $v.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ $v.terminationGracePeriodSeconds | int }}
  securityContext:
    {{- include "dspark.podSecurity" $root | nindent 4 }}
  {{- with merge (dict) (default (dict) $spot.nodeSelector) $v.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with concat $v.tolerations (default (list) $spot.tolerations) }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if not (kindIs "invalid" $v.topologySpreadConstraints) }}
  {{- with $v.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- else if $worker }}
  topologySpreadConstraints:
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - topologyKey: {{ . }}
      maxSkew: 1
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "dspark.selectorLabels" $root | nindent 10 }}
          app.kubernetes.io/component: {{ $pool }}
    {{- end }}
  {{- end }}
  {{- $inits := include "dspark.modelInit" . | trim }}
  {{- if or $v.initContainers $inits }}
  initContainers:
    {{- with $inits }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $v.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-worker" "ray-head" $worker }}
      image: {{ include "dspark.roleImage" (dict "root" $root "role" $pool) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "dspark.containerSecurity" $root | nindent 8 }}
      ports:
        {{- if not $worker }}
        - {name: gcs, containerPort: {{ $ports.gcs }}}
        - {name: dashboard, containerPort: {{ $ports.dashboard }}}
        - {name: as-metrics, containerPort: {{ index $ports "autoscaler-metrics" }}}
        - {name: dash-metrics, containerPort: {{ index $ports "dashboard-metrics" }}}
        {{- end }}
        - {name: metrics, containerPort: {{ $ports.metrics }}}
        # KubeRay reads the ports of its own Service from the head's container.
        {{- if or (eq $pool "head") (eq $pool "gateway") }}
        - {name: serve, containerPort: 8000}
        - {name: serve-grpc, containerPort: 50051}
        {{- end }}
      env:
        - {name: HOME, value: /home/dspark}
        - {name: TMPDIR, value: /tmp}
        - {name: DSPARK_CACHE, value: /models}
        - {name: HF_HOME, value: {{ include "dspark.hubHome" $root }}}
        {{- if $root.Values.modelCache.prefetch.enabled }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- else if $root.Values.modelCache.prefetch.tokenSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ $root.Values.modelCache.prefetch.tokenSecret }}
              key: {{ $root.Values.modelCache.prefetch.tokenSecretKey }}
        {{- end }}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        {{- if $worker }}
        # How long Ray has Serve move and drain replicas, once it is told to end; its own is 30 s.
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ include "dspark.drainSeconds" $v | quote }}}
        {{- end }}
        {{- if and (eq $pool "head") (include "dspark.redisCa" $root) }}
        - {name: RAY_REDIS_CA_CERT, value: /etc/dspark/redis-ca/ca.crt}
        {{- end }}
        {{- with $v.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $v.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- include "dspark.resources" $v | nindent 8 }}
      {{- if $worker }}
      lifecycle:
        preStop:
          exec:
            command:
              - python
              - -c
              - |
                {{- $root.Files.Get "files/end_worker.py" | nindent 16 }}
              - {{ default 0 $v.longestStreamSeconds | int | quote }}
      {{- end }}
      {{- if $v.readinessProbe }}
      readinessProbe:
        {{- toYaml $v.readinessProbe | nindent 8 }}
      {{- else if eq $pool "gateway" }}
      # Ours goes beyond KubeRay's: only gateways that know a verifier get traffic, so that the second
      # cluster of an upgrade gets none before it can answer. Serve's proxy answers for gateways on other
      # pods, too; the gRPC listener is there with a gateway of this pod's own alone.
      readinessProbe:
        exec:
          command:
            - /bin/bash
            - -c
            - wget --tries=1 --timeout=4 -q -O /dev/null --no-check-certificate {{ ternary "https" "http" $root.Values.tls.http.enabled }}://127.0.0.1:8000/health && exec 3<>/dev/tcp/127.0.0.1/50051
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      {{- else if $root.Values.tls.http.enabled }}
      # KubeRay's asks Serve's proxy without TLS.
      readinessProbe:
        exec: {command: [wget, --tries=1, --timeout=2, -q, -O-, "http://localhost:{{ index $ports "agent-http" }}/api/local_raylet_healthz"]}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      {{- end }}
      {{- with $v.livenessProbe }}
      livenessProbe:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "dspark.scratchMounts" $root | nindent 8 }}
        {{- if $worker }}
        {{- include "dspark.modelMounts" $root | nindent 8 }}
        {{- end }}
        {{- if include "dspark.internalTlsSecret" $root }}
        - {name: tls-internal, mountPath: /etc/dspark/tls/internal, readOnly: true}
        {{- end }}
        {{- if $root.Values.tls.http.enabled }}
        - {name: tls-http, mountPath: /etc/dspark/tls/http, readOnly: true}
        {{- end }}
        {{- if eq $pool "gateway" }}
        {{- if include "dspark.grpcTlsSecret" $root }}
        - {name: tls-grpc, mountPath: /etc/dspark/tls/grpc, readOnly: true}
        {{- end }}
        {{- if include "dspark.apiKeysSecret" $root }}
        - {name: api-keys, mountPath: /etc/dspark/keys, readOnly: true}
        {{- end }}
        {{- if and (ne $root.Values.redis.mode "none") (include "dspark.redisSecret" $root) }}
        - {name: redis-password, mountPath: /etc/dspark/redis, readOnly: true}
        {{- end }}
        {{- end }}
        {{- if and $kubernetes (include "dspark.redisCa" $root) }}
        - {name: redis-ca, mountPath: /etc/dspark/redis-ca, readOnly: true}
        {{- end }}
        {{- with $v.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $v.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "dspark.scratchVolumes" $root | nindent 4 }}
    {{- if $worker }}
    {{- include "dspark.modelVolumes" $root | nindent 4 }}
    {{- end }}
    {{- with include "dspark.internalTlsSecret" $root }}
    - name: tls-internal
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- if $root.Values.tls.http.enabled }}
    - name: tls-http
      secret: {secretName: {{ $root.Values.tls.http.existingSecret }}, defaultMode: 0440}
    {{- end }}
    {{- if eq $pool "gateway" }}
    {{- with include "dspark.grpcTlsSecret" $root }}
    - name: tls-grpc
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- with include "dspark.apiKeysSecret" $root }}
    - name: api-keys
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- if and (ne $root.Values.redis.mode "none") (include "dspark.redisSecret" $root) }}
    - name: redis-password
      secret:
        secretName: {{ include "dspark.redisSecret" $root }}
        defaultMode: 0440
        items: [{key: {{ include "dspark.redisSecretKey" $root }}, path: password}]
    {{- end }}
    {{- end }}
    {{- if and $kubernetes (include "dspark.redisCa" $root) }}
    - name: redis-ca
      secret: {secretName: {{ include "dspark.redisCa" $root }}, defaultMode: 0440}
    {{- end }}
    {{- with $v.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Of a pod's time to end, what Ray may drain for: all but clients' time and 10 s for its processes to end. */}}
{{- define "dspark.drainSeconds" -}}
{{- sub (int .terminationGracePeriodSeconds) (add 10 (int (default 0 .longestStreamSeconds))) -}}
{{- end -}}

{{/* Requests and limits of a pool's Ray container, its GPUs among them. */}}
{{- define "dspark.resources" -}}
{{- $requests := deepCopy .resources.requests -}}
{{- $limits := deepCopy .resources.limits -}}
{{- if and .gpu .gpu.count -}}
{{- $_ := set $requests .gpu.resource (int .gpu.count) -}}
{{- $_ := set $limits .gpu.resource (int .gpu.count) -}}
{{- end -}}
requests:
  {{- toYaml $requests | nindent 2 }}
limits:
  {{- toYaml $limits | nindent 2 }}
{{- end -}}

{{/* What is written to, since the root file system is not: scratch, and the user's folder. */}}
{{- define "dspark.scratchMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/dspark}
{{- end -}}

{{- define "dspark.scratchVolumes" -}}
- {name: tmp, emptyDir: {}}
- {name: home, emptyDir: {}}
{{- end -}}

{{/*
Models. With an image, which cannot be written to, its files are inside of a folder that can: measured
step times and built operators are kept beside the models.
*/}}
{{- define "dspark.hubHome" -}}
{{- if eq .Values.modelCache.type "image" -}}/models/models/huggingface{{- else -}}/models/huggingface{{- end -}}
{{- end -}}

{{- define "dspark.modelMounts" -}}
- {name: models, mountPath: /models}
{{- if eq .Values.modelCache.type "image" }}
- {name: model-image, mountPath: /models/models, readOnly: true}
{{- end }}
{{- end -}}

{{- define "dspark.modelVolumes" -}}
{{- $cache := .Values.modelCache -}}
- name: models
  {{- if eq $cache.type "pvc" }}
  persistentVolumeClaim: {claimName: {{ default (printf "%s-models" (include "dspark.fullname" .)) $cache.pvc.existingClaim }}}
  {{- else if eq $cache.type "hostPath" }}
  hostPath: {path: {{ $cache.hostPath.path }}, type: DirectoryOrCreate}
  {{- else if eq $cache.type "emptyDir" }}
  emptyDir: {sizeLimit: {{ $cache.emptyDir.sizeLimit }}}
  {{- else }}
  emptyDir: {}
- name: model-image
  image: {reference: {{ $cache.image.reference }}, pullPolicy: {{ $cache.image.pullPolicy }}}
  {{- end }}
{{- end -}}

{{/* The command that fetches the models, as a shell's script. */}}
{{- define "dspark.prefetchScript" -}}
{{- $models := include "dspark.models" . | fromYaml -}}
set -eu
{{- if $models.builtin }}
dspark models pull {{ .Values.model.target | squote }}
{{- end }}
{{- range $models.hub }}
{{- $parts := splitn "@" 2 . }}
hf download {{ $parts._0 | squote }}{{ with $parts._1 }} --revision {{ . | squote }}{{ end }} --include '*.json' --include '*.safetensors' --include '*.jinja' --include '*.model' --include '*.txt'
{{- end }}
touch /models/.dspark-prefetched
{{- end -}}

{{- define "dspark.prefetchEnv" -}}
- {name: HOME, value: /home/dspark}
- {name: TMPDIR, value: /tmp}
- {name: DSPARK_CACHE, value: /models}
- {name: HF_HOME, value: /models/huggingface}
{{- with .Values.modelCache.prefetch }}
{{- if .tokenSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .tokenSecret }}, key: {{ .tokenSecretKey }}}}
{{- end }}
{{- with .env }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end -}}

{{/*
Before a replica looks for its model: wait for the Job that fills a claim, or fetch into a folder of the
pod's or the node's own. What is waited for does not name the model, so that another one is no other pod.
*/}}
{{- define "dspark.modelInit" -}}
{{- $root := .root -}}
{{- $cache := $root.Values.modelCache -}}
{{- if and (ne .pool "head") $cache.prefetch.enabled }}
{{- if eq $cache.type "pvc" }}
- name: await-models
  image: {{ include "dspark.roleImage" (dict "root" $root "role" .pool) }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command: [/bin/sh, -c, "until [ -e /models/.dspark-prefetched ]; do sleep 2; done"]
  securityContext:
    {{- include "dspark.containerSecurity" $root | nindent 4 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {cpu: 100m, memory: 64Mi}
  volumeMounts:
    - {name: models, mountPath: /models, readOnly: true}
{{- else if ne $cache.type "image" }}
- name: fetch-models
  image: {{ include "dspark.roleImage" (dict "root" $root "role" .pool) }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command: [/bin/sh, -c]
  args:
    - |
      {{- include "dspark.prefetchScript" $root | nindent 6 }}
  env:
    {{- include "dspark.prefetchEnv" $root | nindent 4 }}
  securityContext:
    {{- include "dspark.containerSecurity" $root | nindent 4 }}
  resources:
    {{- toYaml $cache.prefetch.resources | nindent 4 }}
  volumeMounts:
    {{- include "dspark.scratchMounts" $root | nindent 4 }}
    - {name: models, mountPath: /models}
{{- end }}
{{- end }}
{{- end -}}
