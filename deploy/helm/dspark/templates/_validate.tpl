{{/*
Combinations that a schema cannot refuse, or not with the remedy. All that is wrong is told at once; each
line names the key, what was got and what to do.
*/}}
{{- define "dspark.validate" -}}
{{- $v := .Values -}}
{{- $wrong := concat
  (include "dspark.validate.names" . | fromJsonArray)
  (include "dspark.validate.model" . | fromJsonArray)
  (include "dspark.validate.replicas" . | fromJsonArray)
  (include "dspark.validate.pods" . | fromJsonArray)
  (include "dspark.validate.store" . | fromJsonArray)
  (include "dspark.validate.access" . | fromJsonArray)
  (include "dspark.validate.cache" . | fromJsonArray)
  (include "dspark.validate.edges" . | fromJsonArray) -}}
{{- if $v.production -}}
{{- $wrong = concat $wrong (include "dspark.validate.production" . | fromJsonArray) -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n\nThese values cannot be installed:\n- %s\n" (join "\n- " $wrong)) -}}
{{- end -}}
{{- end -}}

{{- define "dspark.validate.names" -}}
{{- $wrong := list -}}
{{- $name := include "dspark.fullname" . -}}
{{- if gt (len $name) 47 -}}
{{- $wrong = append $wrong (printf "the name %q has %d characters and a RayService has 47 at most: choose a shorter release name, or set fullnameOverride" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
{{- $wrong = append $wrong (printf "the name %q is none for a Service: set fullnameOverride to a-z, 0-9 and -, with a letter first" $name) -}}
{{- end -}}
{{- if gt (len .Release.Name) 63 -}}
{{- $wrong = append $wrong (printf "the release's name has %d characters, and is a label of 63 at most: choose a shorter one" (len .Release.Name)) -}}
{{- end -}}
{{- range $key, $image := merge (pick .Values.image "gateway" "draft" "verifier") (dict "redis.bundled" .Values.redis.bundled.image) -}}
{{- if and $image.digest (not (regexMatch "^sha256:[0-9a-f]{64}$" $image.digest)) -}}
{{- $where := ternary "redis.bundled.image" (printf "image.%s" $key) (eq $key "redis.bundled") -}}
{{- $wrong = append $wrong (printf "%s.digest is %q: write sha256: and 64 hexadecimal digits, as the registry has it" $where $image.digest) -}}
{{- end -}}
{{- end -}}
{{- $labelled := dict "commonLabels" .Values.commonLabels "service.labels" .Values.service.labels -}}
{{- range $object, $v := .Values.monitoring -}}
{{- $_ := set $labelled (printf "monitoring.%s.labels" $object) $v.labels -}}
{{- end -}}
{{- range $key, $labels := $labelled -}}
{{- range $label, $_ := $labels -}}
{{- if or (eq $label "app.kubernetes.io/component") (hasKey (include "dspark.labels" $ | fromYaml) $label) -}}
{{- $wrong = append $wrong (printf "%s sets %s, which the chart sets: choose another label" $key $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if semverCompare "<2.56.0-0" .Values.ray.version -}}
{{- $wrong = append $wrong (printf "ray.version is %s: the service needs 2.56 or newer; name the version that is in the images" .Values.ray.version) -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}

{{- define "dspark.validate.production" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- if ne $v.redis.mode "external" -}}
{{- $wrong = append $wrong (printf "production is true and redis.mode is %s: what must outlive a head needs a Redis of its own; set redis.mode to external" $v.redis.mode) -}}
{{- end -}}
{{- if and (eq $v.redis.mode "external") (not $v.redis.existingSecret) -}}
{{- $wrong = append $wrong "production is true and redis.existingSecret is empty: name a Secret with the password of redis.external" -}}
{{- end -}}
{{- if not $v.tls.internal.enabled -}}
{{- $wrong = append $wrong "production is true and tls.internal.enabled is false: set it, with tls.internal.existingSecret or tls.internal.certManager.enabled" -}}
{{- end -}}
{{- if not $v.tls.grpc.enabled -}}
{{- $wrong = append $wrong "production is true and tls.grpc.enabled is false: set it, with tls.grpc.existingSecret or tls.grpc.certManager.enabled" -}}
{{- end -}}
{{- if not $v.apiKeys.existingSecret -}}
{{- $wrong = append $wrong "production is true and apiKeys.existingSecret is empty: name a Secret with a key for each client" -}}
{{- end -}}
{{- if not $v.networkPolicy.enabled -}}
{{- $wrong = append $wrong "production is true and networkPolicy.enabled is false: set it, and name your clients" -}}
{{- end -}}
{{- if not $v.ray.tokenAuth -}}
{{- $wrong = append $wrong "production is true and ray.tokenAuth is false, so that whoever reaches the head may run code: set it" -}}
{{- end -}}
{{- if has $v.modelCache.type (list "hostPath") -}}
{{- $wrong = append $wrong "production is true and modelCache.type is hostPath, which pod security \"restricted\" refuses: use pvc or image" -}}
{{- end -}}
{{- range $role, $image := pick $v.image "gateway" "draft" "verifier" -}}
{{- if and (eq $image.tag "latest") (not $image.digest) -}}
{{- $wrong = append $wrong (printf "production is true and image.%s.tag is latest: name a version, or better image.%s.digest" $role $role) -}}
{{- end -}}
{{- end -}}
{{- if lt (int $v.gatewayReplicas) 2 -}}
{{- $wrong = append $wrong (printf "production is true and gatewayReplicas is %d: with fewer than 2, every move of its pod is an outage" (int $v.gatewayReplicas)) -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}
