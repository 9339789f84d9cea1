{{/* What is wrong with pods and their models, as a JSON list each: see _validate.tpl. */}}

{{/* CPUs of a quantity, such as 500m or 4. */}}
{{- define "dspark.cpus" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text -}}{{- divf (trimSuffix "m" $text | float64) 1000 -}}{{- else -}}{{- float64 $text -}}{{- end -}}
{{- end -}}

{{- define "dspark.validate.pods" -}}
{{- $root := . -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- $pools := list "gateway" "verifier" -}}
{{- if include "dspark.drafts" . -}}{{- $pools = append $pools "draft" -}}{{- end -}}
{{- if and (include "dspark.drafts" .) (not $v.pools.draft.enabled) -}}
{{- $wrong = append $wrong "pools.draft.enabled is false and drafts are wanted: enable the pool, or set draftReplicas to 0 (with autoscaling, autoscaling.draft.maxReplicas) or model.drafter to prompt-lookup or none" -}}
{{- end -}}
{{- range $name := $pools -}}
{{- $pool := index $v.pools $name -}}
{{- $key := printf "pools.%s" $name -}}
{{- $pods := include "dspark.pods" (dict "root" $root "pool" $name) | fromYaml -}}
{{- if and (not (kindIs "invalid" $pool.minPods)) (not (kindIs "invalid" $pool.maxPods)) -}}
{{- if gt (int $pool.minPods) (int $pool.maxPods) -}}
{{- $wrong = append $wrong (printf "%s.minPods is %d, more than maxPods (%d): lessen it, or raise maxPods" $key (int $pool.minPods) (int $pool.maxPods)) -}}
{{- end -}}
{{- end -}}
{{- $most := int $pods.max -}}
{{- if and (hasKey $pool "spot") $v.autoscaler.enabled -}}
{{- if $pool.spot.enabled -}}
{{- $most = add $most (ternary (int $pods.max) (int $pool.spot.maxPods) (kindIs "invalid" $pool.spot.maxPods)) | int -}}
{{- end -}}
{{- end -}}
{{- if lt $most (int $pods.needed) -}}
{{- $wrong = append $wrong (printf "%s.maxPods lets %d pods be, and the replicas may need %d: raise it, leave it null, or lessen the replicas" $key $most (int $pods.needed)) -}}
{{- end -}}
{{- if and (not $v.autoscaler.enabled) (lt (int $pods.min) (int $pods.needed)) -}}
{{- $wrong = append $wrong (printf "autoscaler.enabled is false, so there are %d pods in %s, and the replicas may need %d: enable it, or set %s.minPods to %d" (int $pods.min) $key (int $pods.needed) $key (int $pods.needed)) -}}
{{- end -}}
{{- if and (hasKey $pool "spot") (not $v.autoscaler.enabled) -}}
{{- if $pool.spot.enabled -}}
{{- $wrong = append $wrong (printf "%s.spot.enabled is true and autoscaler.enabled is false, so nothing would fill the spot group: enable the autoscaler, or switch the group off" $key) -}}
{{- end -}}
{{- end -}}
{{- $limit := float64 (include "dspark.cpus" (default $pool.resources.requests.cpu $pool.resources.limits.cpu)) -}}
{{- $use := 0.0 -}}
{{- if eq $name "gateway" -}}
{{- $use = addf $pool.replica.cpus $pool.replica.schedulerCpus -}}
{{- else -}}
{{- $use = mulf $pool.replica.cpus (float64 $pool.replicasPerPod) -}}
{{- end -}}
{{- if gt $use $limit -}}
{{- $wrong = append $wrong (printf "replicas on a pod of %s reserve %v CPUs (replica), and resources.limits.cpu is %v: they would wait for ever; raise the limit, or reserve less" $key $use $limit) -}}
{{- end -}}
{{- if ne $name "gateway" -}}
{{- $gpus := int $pool.gpu.count -}}
{{- if and (eq $v.model.device "cuda") (eq $gpus 0) -}}
{{- $wrong = append $wrong (printf "%s.gpu.count is 0 and model.device is cuda: give its pods a GPU, or set model.device to cpu" $key) -}}
{{- end -}}
{{- if and (eq $v.model.device "cpu") (gt $gpus 0) -}}
{{- $wrong = append $wrong (printf "%s.gpu.count is %d and model.device is cpu, which would leave them idle: set model.device to cuda, or gpu.count to 0" $key $gpus) -}}
{{- end -}}
{{- if and (gt $gpus 0) (le (float64 $pool.replica.gpus) 0.0) -}}
{{- $wrong = append $wrong (printf "%s.replica.gpus is 0 in a pool of GPUs, so that a replica would see none: set it to 1" $key) -}}
{{- end -}}
{{- if and (eq $gpus 0) (gt (float64 $pool.replica.gpus) 0.0) -}}
{{- $wrong = append $wrong (printf "%s.replica.gpus is %v and its pods have none: set %s.gpu.count, or replica.gpus to 0" $key $pool.replica.gpus $key) -}}
{{- end -}}
{{- if and (gt $gpus 0) (gt (mulf $pool.replica.gpus (float64 $pool.replicasPerPod)) (float64 $gpus)) -}}
{{- $wrong = append $wrong (printf "%s.replicasPerPod is %d with %v GPUs each, and gpu.count is %d: raise gpu.count, or lessen replicasPerPod" $key (int $pool.replicasPerPod) $pool.replica.gpus $gpus) -}}
{{- end -}}
{{- range $kind, $given := $pool.resources -}}
{{- if hasKey $given $pool.gpu.resource -}}
{{- $wrong = append $wrong (printf "%s.resources.%s names %s, which gpu.count adds: leave it out there" $key $kind $pool.gpu.resource) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- /* graceful_shutdown_timeout_s of each role, and 10 s for processes to end: see dspark.drainSeconds. */}}
{{- $drains := dict "head" 0 "gateway" (add 40 (int $v.pools.gateway.longestStreamSeconds)) "draft" 17 "verifier" 45 -}}
{{- range $name, $drain := $drains -}}
{{- $grace := (index $v.pools $name).terminationGracePeriodSeconds | int -}}
{{- if le $grace (int $drain) -}}
{{- $wrong = append $wrong (printf "pools.%s.terminationGracePeriodSeconds is %d, and a pod needs %d to drain%s: raise it above that" $name $grace (int $drain) (ternary ", longestStreamSeconds among them" "" (eq $name "gateway"))) -}}
{{- end -}}
{{- end -}}
{{- /* What is set twice is refused by the API, or silently wins. */}}
{{- $ours := list "HOME" "TMPDIR" "DSPARK_CACHE" "HF_HOME" "RAY_USAGE_STATS_ENABLED" "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" -}}
{{- if $v.modelCache.prefetch.enabled }}{{ $ours = append $ours "HF_HUB_OFFLINE" }}{{ else if $v.modelCache.prefetch.tokenSecret }}{{ $ours = append $ours "HF_TOKEN" }}{{ end -}}
{{- range $name, $pool := $v.pools -}}
{{- $reserved := list "tmp" "home" "models" "model-image" "tls-internal" "tls-grpc" "tls-http" "api-keys" "redis-password" "redis-ca" "ray-logs" "shared-mem" -}}
{{- range $pool.volumes -}}
{{- if has .name $reserved -}}
{{- $wrong = append $wrong (printf "pools.%s.volumes has one named %q, which is the chart's or KubeRay's: choose another name" $name .name) -}}
{{- end -}}
{{- end -}}
{{- range $pool.env -}}
{{- if has .name $ours -}}
{{- $wrong = append $wrong (printf "pools.%s.env sets %s, which the chart sets: leave it out" $name .name) -}}
{{- end -}}
{{- end -}}
{{- range $pool.volumeMounts -}}
{{- $path := trimSuffix "/" .mountPath -}}
{{- if or (has $path (list "/tmp" "/tmp/ray" "/dev/shm" "/home/dspark" "/models" "/models/models")) (hasPrefix "/etc/dspark/" .mountPath) -}}
{{- $wrong = append $wrong (printf "pools.%s.volumeMounts has %s, where the chart or KubeRay mounts its own: choose another path" $name $path) -}}
{{- end -}}
{{- end -}}
{{- range $label, $_ := $pool.labels -}}
{{- if or (hasPrefix "app.kubernetes.io/" $label) (hasPrefix "ray.io/" $label) (eq $label "dspark.io/role") -}}
{{- $wrong = append $wrong (printf "pools.%s.labels sets %s, by which pods are selected: choose another label" $name $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (regexMatch "^[0-9]{4,5}-[0-9]{4,5}$" $v.network.replicaPorts) -}}
{{- $wrong = append $wrong (printf "network.replicaPorts is %q: write a range such as 20000-20099" $v.network.replicaPorts) -}}
{{- else -}}
{{- $range := splitList "-" $v.network.replicaPorts -}}
{{- $first := index $range 0 | int -}}
{{- $last := index $range 1 | int -}}
{{- if or (lt $first 1024) (gt $last 32767) -}}
{{- $wrong = append $wrong (printf "network.replicaPorts is %q: stay within 1024-32767, above which the system draws ports of its own" $v.network.replicaPorts) -}}
{{- end -}}
{{- if gt $first $last -}}
{{- $wrong = append $wrong (printf "network.replicaPorts is %q: write the lower port first" $v.network.replicaPorts) -}}
{{- end -}}
{{- range $use, $port := include "dspark.rayPorts" . | fromYaml -}}
{{- if and (ge (int $port) $first) (le (int $port) $last) -}}
{{- $wrong = append $wrong (printf "network.replicaPorts is %q, and port %d in it is Ray's (%s): choose others, such as 20000-20099" $v.network.replicaPorts (int $port) $use) -}}
{{- end -}}
{{- end -}}
{{- if and (le $first 11099) (ge $last 10100) -}}
{{- $wrong = append $wrong (printf "network.replicaPorts is %q, and 10100-11099 are of Ray's workers: choose others, such as 20000-20099" $v.network.replicaPorts) -}}
{{- end -}}
{{- $replicasHere := max (int $v.pools.verifier.replicasPerPod) (int $v.pools.draft.replicasPerPod) -}}
{{- if and (le $first $last) (lt (add 1 (sub $last $first)) (mul 2 $replicasHere)) -}}
{{- $wrong = append $wrong (printf "network.replicaPorts is %q, and up to %d replicas on a pod, old and new ones side by side, need one each: widen it" $v.network.replicaPorts (mul 2 $replicasHere)) -}}
{{- end -}}
{{- end -}}
{{- toJson (uniq $wrong) -}}
{{- end -}}

{{- define "dspark.validate.cache" -}}
{{- $cache := .Values.modelCache -}}
{{- $wrong := list -}}
{{- if and (eq $cache.type "image") (not $cache.image.reference) -}}
{{- $wrong = append $wrong "modelCache.type is image and modelCache.image.reference is empty: name an image that holds the models" -}}
{{- end -}}
{{- if and (ne $cache.type "image") $cache.image.reference -}}
{{- $wrong = append $wrong (printf "modelCache.image.reference is set and modelCache.type is %s, so it would not be used: set type to image, or leave it out" $cache.type) -}}
{{- end -}}
{{- if and (eq $cache.type "image") (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) -}}
{{- $wrong = append $wrong (printf "modelCache.type is image, and Kubernetes %s has no image volumes by default: upgrade to 1.33, or use pvc" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and (ne $cache.type "pvc") $cache.pvc.existingClaim -}}
{{- $wrong = append $wrong (printf "modelCache.pvc.existingClaim is set and modelCache.type is %s, so it would not be used: set type to pvc, or leave it out" $cache.type) -}}
{{- end -}}
{{- if and .Values.production (eq $cache.type "pvc") (not $cache.pvc.existingClaim) (not (has "ReadWriteMany" $cache.pvc.accessModes)) -}}
{{- $wrong = append $wrong (printf "modelCache.pvc.accessModes is %s, and pods on several nodes share the models: use ReadWriteMany, with a storage class that can" (toJson $cache.pvc.accessModes)) -}}
{{- end -}}
{{- $mounts := list -}}
{{- range list .Values.model.target .Values.model.drafter -}}
{{- if and (hasPrefix "/" .) (not (hasPrefix "/models/" .)) -}}
{{- $wrong = append $wrong (printf "the model %q is a folder outside of /models, where modelCache is mounted: put it below /models" .) -}}
{{- end -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}
