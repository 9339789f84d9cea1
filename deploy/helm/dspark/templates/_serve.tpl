{{/*
The values' groups as settings of the service: camelCase to snake_case, all the way down. Names of
service classes are the user's own and stay.
*/}}
{{- define "dspark.snake" -}}
{{- $out := dict -}}
{{- range $key, $value := . -}}
{{- if eq $key "classes" -}}
{{- $classes := dict -}}
{{- range $name, $class := $value -}}
{{- $_ := set $classes $name (include "dspark.snake" $class | fromYaml) -}}
{{- end -}}
{{- $_ := set $out $key $classes -}}
{{- else if kindIs "map" $value -}}
{{- $_ := set $out (snakecase $key) (include "dspark.snake" $value | fromYaml) -}}
{{- else -}}
{{- $_ := set $out (snakecase $key) $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $out -}}
{{- end -}}

{{/* network, which every role reads. */}}
{{- define "dspark.settings.network" -}}
replica_ports: {{ .Values.network.replicaPorts | quote }}
{{- if .Values.tls.internal.enabled }}
tls:
  cert_file: /etc/dspark/tls/internal/tls.crt
  key_file: /etc/dspark/tls/internal/tls.key
  ca_file: /etc/dspark/tls/internal/ca.crt
{{- end }}
{{- end -}}

{{/* scheduler, as all but the scheduler read it: a change of the rest restarts schedulers alone. */}}
{{- define "dspark.settings.heartbeats" -}}
{{- toYaml (pick (include "dspark.snake" .Values.scheduler | fromYaml) "heartbeat_s" "lease_s") -}}
{{- end -}}

{{- define "dspark.settings.scheduler" -}}
{{- $settings := include "dspark.snake" .Values.scheduler | fromYaml -}}
{{- $_ := set $settings "store_url" (include "dspark.storeUrl" .) -}}
{{- if and (ne .Values.redis.mode "none") (include "dspark.redisSecret" .) -}}
{{- $_ := set $settings "store_password_file" "/etc/dspark/redis/password" -}}
{{- end -}}
{{- if not (or .Values.scheduler.kubernetes.podSelector .Values.scheduler.kubernetes.namespace) -}}
{{- $_ := set $settings.kubernetes "pod_selector" (printf "app.kubernetes.io/name=dspark,app.kubernetes.io/instance=%s" .Release.Name) -}}
{{- end -}}
{{- $_ := set $settings "kubernetes_lease" (printf "%s-scheduler" (include "dspark.fullname" .)) -}}
{{- toYaml $settings -}}
{{- end -}}

{{- define "dspark.settings.model" -}}
{{- toYaml (include "dspark.snake" (omit .Values.model "drafterBlockSize") | fromYaml) -}}
{{- end -}}

{{/* What a running verifier, draft or gateway takes over; the rest of its group is in args. */}}
{{- define "dspark.changeable" -}}
planned: [policy, block_size, draft_by_request]
engine: [policy, block_size, draft_by_request, classes, max_waiting, max_queue_s, prefill_stretch]
draft: [max_batch_works, max_streams]
{{- end -}}

{{/* The policies that decide on a pool's replicas, if they do. */}}
{{- define "dspark.settings.autoscaling" -}}
{{- if .Values.autoscaling.enabled -}}
autoscaling:
  {{- include "dspark.snake" .Values.autoscaling | nindent 2 }}
{{- end -}}
{{- end -}}

{{/*
Replicas by number. An option of the deployment, not of args: so more of them join those that are
there, which a change of args would begin anew. (root, pool)
*/}}
{{- define "dspark.numReplicas" -}}
{{- if not .root.Values.autoscaling.enabled -}}
num_replicas: {{ index .root.Values (printf "%sReplicas" .pool) | int }}
{{- end -}}
{{- end -}}

{{/* ray_actor_options of a pool's deployment. (pool, cpus, values?) */}}
{{- define "dspark.placement" -}}
num_cpus: {{ .cpus }}
{{- with .values }}
{{- if .gpu.count }}
num_gpus: {{ .replica.gpus }}
{{- with .gpu.acceleratorType }}
accelerator_type: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}
label_selector:
  dspark.io/pool: {{ .pool }}
{{- end -}}

{{/* The whole of serveConfigV2. */}}
{{- define "dspark.serveConfig" -}}
{{- $engine := include "dspark.snake" .Values.engine | fromYaml -}}
{{- $draft := include "dspark.snake" .Values.draft | fromYaml -}}
{{- $changeable := include "dspark.changeable" . | fromYaml -}}
{{- $engineArgs := $engine -}}
{{- $engineUser := dict -}}
{{- range $changeable.engine -}}
{{- $engineArgs = omit $engineArgs . -}}
{{- $_ := set $engineUser . (index $engine .) -}}
{{- end -}}
{{- $plannedUser := dict -}}
{{- range $changeable.planned -}}{{- $_ := set $plannedUser . (index $engine .) -}}{{- end -}}
{{- $draftArgs := $draft -}}
{{- $draftUser := dict -}}
{{- range $changeable.draft -}}
{{- $draftArgs = omit $draftArgs . -}}
{{- $_ := set $draftUser . (index $draft .) -}}
{{- end -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
  {{- if .Values.tls.http.enabled }}
  ssl_certfile: /etc/dspark/tls/http/tls.crt
  ssl_keyfile: /etc/dspark/tls/http/tls.key
  {{- end }}
logging_config:
  log_level: {{ .Values.ray.logLevel }}
  encoding: JSON
applications:
  - name: scheduler
    import_path: dspark.services.scheduler.app:build
    route_prefix: null
    args:
      scheduler:
        {{- include "dspark.settings.scheduler" . | nindent 8 }}
      network:
        {{- include "dspark.settings.network" . | nindent 8 }}
      scheduler_replicas: {{ .Values.schedulerReplicas | int }}
    deployments:
      - name: scheduler
        max_replicas_per_node: 1
        ray_actor_options:
          {{- include "dspark.placement" (dict "pool" "gateway" "cpus" .Values.pools.gateway.replica.schedulerCpus) | nindent 10 }}
        user_config:
          engine:
            {{- toYaml $plannedUser | nindent 12 }}
  {{- if include "dspark.drafts" . }}
  - name: draft
    import_path: dspark.services.draft.app:build
    route_prefix: null
    args:
      scheduler:
        {{- include "dspark.settings.heartbeats" . | nindent 8 }}
      network:
        {{- include "dspark.settings.network" . | nindent 8 }}
      model:
        {{- include "dspark.settings.model" . | nindent 8 }}
      draft:
        {{- toYaml $draftArgs | nindent 8 }}
      {{- with include "dspark.settings.autoscaling" . }}
      {{- . | nindent 6 }}
      {{- end }}
    deployments:
      - name: draft
        {{- with include "dspark.numReplicas" (dict "root" . "pool" "draft") }}
        {{- . | nindent 8 }}
        {{- end }}
        max_replicas_per_node: {{ .Values.pools.draft.replicasPerPod | int }}
        ray_actor_options:
          {{- include "dspark.placement" (dict "pool" "draft" "cpus" .Values.pools.draft.replica.cpus "values" .Values.pools.draft) | nindent 10 }}
        user_config:
          draft:
            {{- toYaml $draftUser | nindent 12 }}
  {{- end }}
  - name: verifier
    import_path: dspark.services.verifier.app:build
    route_prefix: null
    args:
      scheduler:
        {{- include "dspark.settings.heartbeats" . | nindent 8 }}
      network:
        {{- include "dspark.settings.network" . | nindent 8 }}
      model:
        {{- include "dspark.settings.model" . | nindent 8 }}
        {{- if gt (int .Values.pools.verifier.tensorParallel) 1 }}
        tensor_parallel: {{ .Values.pools.verifier.tensorParallel | int }}
        {{- end }}
      engine:
        {{- toYaml $engineArgs | nindent 8 }}
      {{- with include "dspark.settings.autoscaling" . }}
      {{- . | nindent 6 }}
      {{- end }}
    deployments:
      - name: verifier
        {{- with include "dspark.numReplicas" (dict "root" . "pool" "verifier") }}
        {{- . | nindent 8 }}
        {{- end }}
        max_replicas_per_node: {{ .Values.pools.verifier.replicasPerPod | int }}
        ray_actor_options:
          {{- include "dspark.placement" (dict "pool" "verifier" "cpus" .Values.pools.verifier.replica.cpus "values" .Values.pools.verifier) | nindent 10 }}
        user_config:
          engine:
            {{- toYaml $engineUser | nindent 12 }}
  - name: gateway
    import_path: dspark.services.gateway.app:build
    route_prefix: /
    args:
      scheduler:
        {{- include "dspark.settings.heartbeats" . | nindent 8 }}
      network:
        {{- include "dspark.settings.network" . | nindent 8 }}
      model:
        target: {{ .Values.model.target | quote }}
      engine:
        prefix_cache: {{ .Values.engine.prefixCache }}
      gateway:
        http_host: 0.0.0.0
        http_port: 8000
        grpc_host: 0.0.0.0
        grpc_port: 50051
        {{- if .Values.tls.grpc.enabled }}
        tls:
          cert_file: /etc/dspark/tls/grpc/tls.crt
          key_file: /etc/dspark/tls/grpc/tls.key
          {{- if .Values.tls.grpc.clientCertificates }}
          client_ca_file: /etc/dspark/tls/grpc/ca.crt
          {{- end }}
        {{- end }}
        {{- if include "dspark.apiKeysSecret" . }}
        api_keys_folder: /etc/dspark/keys
        {{- end }}
    deployments:
      - name: gateway
        num_replicas: {{ .Values.gatewayReplicas | int }}
        max_replicas_per_node: 1
        ray_actor_options:
          {{- include "dspark.placement" (dict "pool" "gateway" "cpus" .Values.pools.gateway.replica.cpus) | nindent 10 }}
        user_config:
          gateway:
            {{- include "dspark.snake" .Values.gateway | nindent 12 }}
          engine:
            classes:
              {{- toYaml $engine.classes | nindent 14 }}
{{- end -}}
