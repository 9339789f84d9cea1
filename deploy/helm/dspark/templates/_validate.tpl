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
{{- if semverCompare "<2.56.0-0" .Values.ray.version -}}
{{- $wrong = append $wrong (printf "ray.version is %s: the service needs 2.56 or newer; name the version that is in the images" .Values.ray.version) -}}
{{- end -}}
{{- toJson $wrong -}}
{{- end -}}

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
{{- if gt (int $v.pools.verifier.tensorParallel) 1 -}}
{{- $wrong = append $wrong (printf "pools.verifier.tensorParallel is %d: the engine does not split a model over GPUs yet; leave it at 1, and choose a GPU that holds model.target" (int $v.pools.verifier.tensorParallel)) -}}
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
{{- $drains := dict "head" 0 "gateway" (add 25 (int $v.pools.gateway.longestStreamSeconds)) "draft" 7 "verifier" 35 -}}
{{- range $name, $drain := $drains -}}
{{- $grace := (index $v.pools $name).terminationGracePeriodSeconds | int -}}
{{- if le $grace (int $drain) -}}
{{- $wrong = append $wrong (printf "pools.%s.terminationGracePeriodSeconds is %d, and a pod needs %d to drain%s: raise it above that" $name $grace (int $drain) (ternary ", longestStreamSeconds among them" "" (eq $name "gateway"))) -}}
{{- end -}}
{{- end -}}
{{- range $name, $pool := $v.pools -}}
{{- $reserved := list "tmp" "home" "models" "model-image" "tls-internal" "tls-grpc" "tls-http" "api-keys" "redis-password" "redis-ca" "ray-logs" "shared-mem" -}}
{{- range $pool.volumes -}}
{{- if has .name $reserved -}}
{{- $wrong = append $wrong (printf "pools.%s.volumes has one named %q, which is the chart's or KubeRay's: choose another name" $name .name) -}}
{{- end -}}
{{- end -}}
{{- range $pool.env -}}
{{- if has .name (list "HOME" "TMPDIR" "DSPARK_CACHE" "HF_HOME") -}}
{{- $wrong = append $wrong (printf "pools.%s.env sets %s, which the chart sets: leave it out" $name .name) -}}
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

{{- define "dspark.validate.access" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- range $listener, $tls := pick $v.tls "internal" "grpc" -}}
{{- $key := printf "tls.%s" $listener -}}
{{- if and $tls.enabled (not $tls.existingSecret) (not $tls.certManager.enabled) -}}
{{- $wrong = append $wrong (printf "%s.enabled is true and there is no certificate: name a Secret in %s.existingSecret, or set %s.certManager.enabled" $key $key $key) -}}
{{- end -}}
{{- if and $tls.existingSecret $tls.certManager.enabled -}}
{{- $wrong = append $wrong (printf "%s.existingSecret and %s.certManager.enabled are two sources of one certificate: leave one out" $key $key) -}}
{{- end -}}
{{- if and (not $tls.enabled) (or $tls.existingSecret $tls.certManager.enabled) -}}
{{- $wrong = append $wrong (printf "%s.enabled is false and a certificate is named, which would not be used: enable it, or leave the certificate out" $key) -}}
{{- end -}}
{{- $own := and (eq $listener "internal") $tls.certManager.ownCa -}}
{{- if and $tls.enabled $tls.certManager.enabled (not $own) (not $tls.certManager.issuerRef.name) -}}
{{- $wrong = append $wrong (printf "%s.certManager.issuerRef has no name: name an Issuer or ClusterIssuer%s" $key (ternary ", or set ownCa" "" (eq $listener "internal"))) -}}
{{- end -}}
{{- if and $tls.certManager.enabled $own $tls.certManager.issuerRef -}}
{{- $wrong = append $wrong (printf "%s.certManager has ownCa and an issuerRef: set ownCa to false, or leave issuerRef out" $key) -}}
{{- end -}}
{{- end -}}
{{- with $v.tls.grpc -}}
{{- if and .enabled .certManager.enabled (not .certManager.dnsNames) -}}
{{- $wrong = append $wrong "tls.grpc.certManager.dnsNames is empty: name what clients dial" -}}
{{- end -}}
{{- if and .clientCertificates (not .enabled) -}}
{{- $wrong = append $wrong "tls.grpc.clientCertificates is true and tls.grpc.enabled is false: enable it, or ask for no certificates" -}}
{{- end -}}
{{- end -}}
{{- if and $v.tls.http.enabled (not $v.tls.http.existingSecret) -}}
{{- $wrong = append $wrong "tls.http.enabled is true and tls.http.existingSecret is empty: name a Secret with tls.crt and tls.key" -}}
{{- end -}}
{{- if and $v.tls.http.existingSecret (not $v.tls.http.enabled) -}}
{{- $wrong = append $wrong "tls.http.existingSecret is set and tls.http.enabled is false, so it would not be used: enable it, or leave the Secret out" -}}
{{- end -}}
{{- range $client, $key := $v.apiKeys.keys -}}
{{- if lt (len $key) 16 -}}
{{- $wrong = append $wrong (printf "apiKeys.keys.%s has %d characters: make one of 16 at least (openssl rand -hex 24)" $client (len $key)) -}}
{{- end -}}
{{- end -}}
{{- if and $v.apiKeys.existingSecret $v.apiKeys.keys -}}
{{- $wrong = append $wrong "apiKeys.existingSecret and apiKeys.keys are both set, and only one is used: leave one out" -}}
{{- end -}}
{{- if and $v.tests.enabled $v.apiKeys.existingSecret (not $v.tests.apiKeyClient) -}}
{{- $wrong = append $wrong "tests.apiKeyClient is empty and keys are in apiKeys.existingSecret: name the client whose key helm test uses, or set tests.enabled to false" -}}
{{- end -}}
{{- if and $v.tests.apiKeyClient $v.apiKeys.keys (not (hasKey $v.apiKeys.keys $v.tests.apiKeyClient)) -}}
{{- $wrong = append $wrong (printf "tests.apiKeyClient is %q, and apiKeys.keys has no such client: name one of %s" $v.tests.apiKeyClient (keys $v.apiKeys.keys | sortAlpha | join ", ")) -}}
{{- end -}}
{{- if and $v.tests.enabled $v.tls.grpc.clientCertificates (not $v.tests.clientCertificateSecret) -}}
{{- $wrong = append $wrong "tls.grpc.clientCertificates is true and tests.clientCertificateSecret is empty, so helm test would be turned away: name a Secret with a client's tls.crt and tls.key, or set tests.enabled to false" -}}
{{- end -}}
{{- toJson $wrong -}}
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

{{- define "dspark.validate.edges" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- with $v.networkPolicy -}}
{{- if and .enabled (not .clients) (not .ingressController) -}}
{{- $wrong = append $wrong "networkPolicy.enabled is true and nobody may reach gateways: name clients in networkPolicy.clients, or the controller's pods in networkPolicy.ingressController" -}}
{{- end -}}
{{- if and .enabled (eq $v.redis.mode "external") (not .redis) -}}
{{- $wrong = append $wrong "networkPolicy.redis is empty, so that redis.external.host could not be reached: say where it is, such as [{ipBlock: {cidr: 10.1.2.3/32}}]" -}}
{{- end -}}
{{- if and .enabled $v.scheduler.storeUrl (not .extra) -}}
{{- $wrong = append $wrong "scheduler.storeUrl names a registry of your own, and no policy lets schedulers reach it: add one to networkPolicy.extra, or use redis.mode external" -}}
{{- end -}}
{{- range $edge, $why := dict "operator" "KubeRay could not deploy anything" "dns" "no name could be looked up" -}}
{{- if and $v.networkPolicy.enabled (not (index $v.networkPolicy $edge)) -}}
{{- $wrong = append $wrong (printf "networkPolicy.%s is empty, so that %s: name its pods" $edge $why) -}}
{{- end -}}
{{- end -}}
{{- if and .enabled (not .kubernetesApi.to) (or $v.autoscaler.enabled (ne $v.scheduler.kubernetes.enabled "off")) -}}
{{- $wrong = append $wrong "networkPolicy.kubernetesApi.to is empty, and the autoscaler and the schedulers ask the API: say where it is" -}}
{{- end -}}
{{- if and .enabled (or $v.ingress.enabled $v.ingress.grpc.enabled $v.gatewayApi.enabled) (not .ingressController) -}}
{{- $wrong = append $wrong "an Ingress or Gateway is enabled, and no policy lets its controller reach gateways: name its pods in networkPolicy.ingressController" -}}
{{- end -}}
{{- if and .enabled $v.monitoring.podMonitor.enabled (not .prometheus) -}}
{{- $wrong = append $wrong "monitoring.podMonitor.enabled is true and networkPolicy.prometheus is empty: name Prometheus' pods" -}}
{{- end -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.host) -}}
{{- $wrong = append $wrong "ingress.enabled is true and ingress.host is empty: name the host" -}}
{{- end -}}
{{- if and $v.ingress.grpc.enabled (not $v.ingress.grpc.host) -}}
{{- $wrong = append $wrong "ingress.grpc.enabled is true and ingress.grpc.host is empty: name the host" -}}
{{- end -}}
{{- if and $v.ingress.enabled $v.ingress.grpc.enabled $v.ingress.host (eq $v.ingress.host $v.ingress.grpc.host) -}}
{{- $wrong = append $wrong (printf "ingress.host and ingress.grpc.host are both %q, and a controller cannot tell the two apart: give gRPC a host of its own" $v.ingress.host) -}}
{{- end -}}
{{- if and $v.gatewayApi.enabled (not $v.gatewayApi.parentRefs) -}}
{{- $wrong = append $wrong "gatewayApi.enabled is true and gatewayApi.parentRefs is empty: name the Gateway" -}}
{{- end -}}
{{- if and $v.gatewayApi.enabled (not $v.gatewayApi.httpHostnames) (not $v.gatewayApi.grpcHostnames) -}}
{{- $wrong = append $wrong "gatewayApi.enabled is true and there is no host name: set gatewayApi.httpHostnames, grpcHostnames or both" -}}
{{- end -}}
{{- if and $v.gatewayApi.enabled $v.gatewayApi.grpcHostnames $v.tls.grpc.enabled -}}
{{- $wrong = append $wrong "gatewayApi.grpcHostnames is set and tls.grpc.enabled is true: a GRPCRoute speaks plaintext to its backend; leave the host names out and let clients reach the Service, or end TLS at the Gateway with tls.grpc.enabled false" -}}
{{- end -}}
{{- range $host := $v.gatewayApi.httpHostnames -}}
{{- if has $host $v.gatewayApi.grpcHostnames -}}
{{- $wrong = append $wrong (printf "gatewayApi.httpHostnames and grpcHostnames both have %q: a Gateway takes one kind of route for a host; give gRPC a host of its own" $host) -}}
{{- end -}}
{{- end -}}
{{- if eq (int $v.service.httpPort) (int $v.service.grpcPort) -}}
{{- $wrong = append $wrong (printf "service.httpPort and service.grpcPort are both %d: choose another for one" (int $v.service.httpPort)) -}}
{{- end -}}
{{- if and $v.service.loadBalancerSourceRanges (ne $v.service.type "LoadBalancer") -}}
{{- $wrong = append $wrong (printf "service.loadBalancerSourceRanges is set and service.type is %s, which would ignore it: set type to LoadBalancer, or leave it out" $v.service.type) -}}
{{- end -}}
{{- if and $v.service.externalTrafficPolicy (eq $v.service.type "ClusterIP") -}}
{{- $wrong = append $wrong "service.externalTrafficPolicy is set and service.type is ClusterIP, which has none: leave it out, or choose another type" -}}
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
