{{/* What is wrong with who reaches what, and by which proof, as a JSON list each: see _validate.tpl. */}}

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
