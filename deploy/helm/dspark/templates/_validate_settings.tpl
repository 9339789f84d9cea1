{{/* What is wrong with settings of the service, as a JSON list each: see _validate.tpl. */}}

{{- define "dspark.validate.model" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- $shipped := eq $v.model.target "smollm2-135m" -}}
{{- if kindIs "bool" $v.engine.policy -}}
{{- $wrong = append $wrong (printf "engine.policy is %v: YAML reads a bare off so; write \"off\" in quotes (with --set: --set-string)" $v.engine.policy) -}}
{{- end -}}
{{- if kindIs "bool" $v.scheduler.kubernetes.enabled -}}
{{- $wrong = append $wrong (printf "scheduler.kubernetes.enabled is %v: YAML reads a bare on or off so; write it in quotes (with --set: --set-string)" $v.scheduler.kubernetes.enabled) -}}
{{- end -}}
{{- if and (include "dspark.drafts" .) (not $v.model.drafter) (not $shipped) -}}
{{- $wrong = append $wrong (printf "model.drafter is empty, and none is shipped for model.target %q: name one, or set model.drafter to prompt-lookup or none" $v.model.target) -}}
{{- end -}}
{{- if and (not $shipped) (not (contains "/" $v.model.target)) -}}
{{- $wrong = append $wrong (printf "model.target is %q, which is neither built in (smollm2-135m), a hub id (owner/name) nor a folder below /models" $v.model.target) -}}
{{- end -}}
{{- if not (kindIs "invalid" $v.model.drafterBlockSize) -}}
{{- if gt (int $v.engine.blockSize) (int $v.model.drafterBlockSize) -}}
{{- $wrong = append $wrong (printf "engine.blockSize is %d, and the drafter drafts blocks of %d (model.drafterBlockSize): set engine.blockSize to that at most, or to 0 for the drafter's own" (int $v.engine.blockSize) (int $v.model.drafterBlockSize)) -}}
{{- end -}}
{{- end -}}
{{- with $v.pools.verifier -}}
{{- $parts := int .tensorParallel -}}
{{- if gt $parts 1 -}}
{{- if ne $v.model.device "cuda" -}}
{{- $wrong = append $wrong (printf "pools.verifier.tensorParallel is %d and model.device is %s, but GPUs are what it splits a target over: set model.device to cuda, or tensorParallel to 1" $parts $v.model.device) -}}
{{- else if ne (float64 .replica.gpus) (float64 $parts) -}}
{{- $wrong = append $wrong (printf "pools.verifier.tensorParallel is %d and a replica reserves %v GPUs (replica.gpus): set pools.verifier.replica.gpus to %d, and gpu.count to a multiple" $parts .replica.gpus $parts) -}}
{{- else if mod (int .gpu.count) $parts -}}
{{- $wrong = append $wrong (printf "pools.verifier.gpu.count is %d, which replicas of %d GPUs (tensorParallel) cannot share out: set it to a multiple of %d" (int .gpu.count) $parts $parts) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if lt (float64 $v.scheduler.leaseS) (mulf 2 $v.scheduler.heartbeatS) -}}
{{- $wrong = append $wrong (printf "scheduler.leaseS is %v and scheduler.heartbeatS is %v: a replica that misses one heartbeat would be given up; set leaseS to twice heartbeatS at least" $v.scheduler.leaseS $v.scheduler.heartbeatS) -}}
{{- end -}}
{{- if lt (int $v.engine.cacheTokens) (int $v.engine.prefillChunkTokens) -}}
{{- $wrong = append $wrong (printf "engine.prefillChunkTokens is %d, more than engine.cacheTokens (%d) holds: lessen it, or raise cacheTokens" (int $v.engine.prefillChunkTokens) (int $v.engine.cacheTokens)) -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}

{{- define "dspark.validate.replicas" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- range $pool, $ours := dict "verifier" (list "pressure" "forecast") "draft" (list "demand") -}}
{{- $policy := (index $v.autoscaling $pool).policy -}}
{{- if not (or (has $policy $ours) (regexMatch "^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$" $policy)) -}}
{{- $wrong = append $wrong (printf "autoscaling.%s.policy is %q: choose %s, or name a class as module:Class" $pool $policy (join " or " $ours)) -}}
{{- end -}}
{{- $scaling := index $v.autoscaling $pool -}}
{{- $count := index $v (printf "%sReplicas" $pool) | int -}}
{{- if $v.autoscaling.enabled -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- $wrong = append $wrong (printf "autoscaling.%s.minReplicas is %d, more than maxReplicas (%d): lessen it, or raise maxReplicas" $pool (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if ne $count 1 -}}
{{- $wrong = append $wrong (printf "%sReplicas is %d, but autoscaling.enabled lets the load decide: leave it out, and set autoscaling.%s.minReplicas and maxReplicas" $pool $count $pool) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $v.autoscaling.enabled -}}
{{- if lt (float64 $v.autoscaling.staleAfterS) (mulf 2 $v.autoscaling.intervalS) -}}
{{- $wrong = append $wrong (printf "autoscaling.staleAfterS is %v: set it to twice autoscaling.intervalS (%v) at least" $v.autoscaling.staleAfterS $v.autoscaling.intervalS) -}}
{{- end -}}
{{- with $v.autoscaling.draft -}}
{{- if gt (float64 .minRatio) (float64 .maxRatio) -}}
{{- $wrong = append $wrong (printf "autoscaling.draft.minRatio is %v, more than maxRatio (%v): lessen it, or raise maxRatio" .minRatio .maxRatio) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int $v.schedulerReplicas) 1) (eq $v.scheduler.leaderElection "store") (not (include "dspark.storeUrl" .)) -}}
{{- $wrong = append $wrong (printf "schedulerReplicas is %d, and there is nothing to elect one by: set redis.mode, or scheduler.leaderElection to kubernetes" (int $v.schedulerReplicas)) -}}
{{- end -}}
{{- if and (eq $v.scheduler.kubernetes.namespace "*") $v.rbac.create (not $v.rbac.nodes) -}}
{{- $wrong = append $wrong "scheduler.kubernetes.namespace is * and rbac.nodes is false, so that schedulers may not see the pods of other namespaces: set rbac.nodes, or leave the namespace empty" -}}
{{- end -}}
{{- if and (eq $v.scheduler.leaderElection "kubernetes") (not $v.rbac.create) (not $v.pools.gateway.serviceAccount.name) -}}
{{- $wrong = append $wrong "scheduler.leaderElection is kubernetes and rbac.create is false, so schedulers may not hold a Lease: set rbac.create, or name in pools.gateway.serviceAccount.name an account that may get, create and update leases" -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}

{{- define "dspark.validate.store" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- if and (ne $v.redis.mode "none") $v.scheduler.storeUrl -}}
{{- $wrong = append $wrong (printf "scheduler.storeUrl and redis.mode %s name two registries: leave scheduler.storeUrl empty, or set redis.mode to none" $v.redis.mode) -}}
{{- end -}}
{{- if and $v.scheduler.storeUrl (not (regexMatch "^(rediss?://[^/]|unix:///)" $v.scheduler.storeUrl)) -}}
{{- $wrong = append $wrong "scheduler.storeUrl is no URL of Redis: write redis://host:port/db, rediss://… for TLS, or unix:///path" -}}
{{- end -}}
{{- if and (ne $v.redis.mode "none") (eq (int $v.redis.registryDatabase) 0) -}}
{{- $wrong = append $wrong "redis.registryDatabase is 0, which is Ray's own: choose another, such as 1" -}}
{{- end -}}
{{- if regexMatch "^[a-z]+://[^/]*:[^/@]*@" $v.scheduler.storeUrl -}}
{{- $wrong = append $wrong "scheduler.storeUrl holds a password, which whoever reads the RayService would see: use redis.mode external with redis.existingSecret" -}}
{{- end -}}
{{- if and (eq $v.redis.mode "bundled") (gt (int $v.redis.registryDatabase) 15) -}}
{{- $wrong = append $wrong (printf "redis.registryDatabase is %d, and the bundled Redis has 0 to 15: choose one of 1 to 15" (int $v.redis.registryDatabase)) -}}
{{- end -}}
{{- if and (eq $v.redis.mode "external") (not $v.redis.external.host) -}}
{{- $wrong = append $wrong "redis.mode is external and redis.external.host is empty: name its host" -}}
{{- end -}}
{{- if and (ne $v.redis.mode "external") $v.redis.external.host -}}
{{- $wrong = append $wrong (printf "redis.external.host is %q and redis.mode is %s, which name two registries or ignore one: set redis.mode to external, or leave the host empty" $v.redis.external.host $v.redis.mode) -}}
{{- end -}}
{{- if and $v.redis.external.tls.caSecret (not $v.redis.external.tls.enabled) -}}
{{- $wrong = append $wrong "redis.external.tls.caSecret is set and redis.external.tls.enabled is false: enable it, or leave the Secret out" -}}
{{- end -}}
{{- if and $v.redis.bundled.password $v.redis.existingSecret -}}
{{- $wrong = append $wrong "redis.bundled.password and redis.existingSecret both name a password: leave one out" -}}
{{- end -}}
{{- if and $v.redis.external.username (not $v.redis.existingSecret) -}}
{{- $wrong = append $wrong "redis.external.username is set and redis.existingSecret is not: name the Secret with its password" -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}
