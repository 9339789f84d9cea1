# ruff: noqa: E501  (messages are kept whole)
"""Mistakes in values, each refused with a message that names the key and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.chart import Refusal, attempt, merged, nested, profile_values

# profile, what the user writes over it, what helm must say: the key, what was got, what to do
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("trial", {"enginee.policy": "fixed"}, "'enginee' not allowed"),
    ("trial", {"engine.block_size": 3}, "'block_size' not allowed"),
    ("trial", {"pools.verifer.gpu.count": 1}, "'verifer' not allowed"),
    ("trial", {"gpu": 1}, "'gpu' not allowed"),
    ("trial", {"redis.external.tls.cert": "x"}, "'cert' not allowed"),
    ("trial", {"networkPolicy.clients": [{"podselector": {}}]}, "'podselector' not allowed"),
    ("trial", {"tls.grpc.certManager.issuerRef": {"nmae": "x"}}, "'nmae' not allowed"),
    ("trial", {"engine.classes": {"chat": {"wieght": 2}}}, "'wieght' not allowed"),
    (
        "trial",
        {"pools.gateway.resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limit": {}}},
        "'limit' not allowed",
    ),
    (
        "trial",
        {"engine.policy": "adaptve"},
        "/engine/policy': value must be one of 'adaptive', 'fixed', 'off'",
    ),
    (
        "trial",
        {"engine.policy": False},
        'engine.policy is false: YAML reads a bare off so; write "off" in quotes',
    ),
    (
        "trial",
        {"engine.blockSize": 8},
        "engine.blockSize is 8, and the drafter drafts blocks of 7 (model.drafterBlockSize): set engine.blockSize to that at most",
    ),
    ("trial", {"engine.blockSize": 65}, "/engine/blockSize': maximum: got 65, want 64"),
    ("trial", {"engine.maxWaiting": 0}, "/engine/maxWaiting': minimum: got 0, want 1"),
    ("trial", {"engine.maxQueueS": -1}, "/engine/maxQueueS': minimum: got -1, want 0"),
    ("trial", {"model.device": "gpu"}, "/model/device': value must be one of 'cpu', 'cuda'"),
    (
        "trial",
        {"model.dtype": "int8"},
        "/model/dtype': value must be one of 'float32', 'bfloat16', 'float16'",
    ),
    (
        "trial",
        {"model.device": "cuda"},
        "pools.verifier.gpu.count is 0 and model.device is cuda: give its pods a GPU, or set model.device to cpu",
    ),
    (
        "trial",
        {"model.target": "Qwen3"},
        'model.target is "Qwen3", which is neither built in (smollm2-135m), a hub id (owner/name) nor a folder',
    ),
    (
        "trial",
        {"model.target": "Qwen/Qwen3-8B"},
        'model.drafter is empty, and none is shipped for model.target "Qwen/Qwen3-8B": name one',
    ),
    (
        "trial",
        {"model.target": "/data/m"},
        "is a folder outside of /models, where modelCache is mounted: put it below /models",
    ),
    (
        "l4-h100",
        {"pools.verifier.gpu.count": 0},
        "pools.verifier.gpu.count is 0 and model.device is cuda: give its pods a GPU",
    ),
    (
        "l4-h100",
        {"pools.draft.gpu.count": 0},
        "pools.draft.gpu.count is 0 and model.device is cuda: give its pods a GPU",
    ),
    (
        "l4-h100",
        {"pools.draft.replica.gpus": 2},
        "pools.draft.replicasPerPod is 1 with 2 GPUs each, and gpu.count is 1: raise gpu.count",
    ),
    (
        "l4-h100",
        {"pools.verifier.replica.gpus": 0},
        "pools.verifier.replica.gpus is 0 in a pool of GPUs, so that a replica would see none: set it to 1",
    ),
    (
        "l4-h100",
        {"pools.verifier.tensorParallel": 2},
        "pools.verifier.tensorParallel is 2 and a replica reserves 1 GPUs (replica.gpus): set pools.verifier.replica.gpus to 2",
    ),
    (
        "l4-h100",
        {"pools.verifier.tensorParallel": 2, "pools.verifier.replica.gpus": 2},
        "pools.verifier.gpu.count is 1, which replicas of 2 GPUs (tensorParallel) cannot share out: set it to a multiple of 2",
    ),
    (
        "l4-h100",
        {
            "pools.verifier.tensorParallel": 4,
            "pools.verifier.replica.gpus": 4,
            "pools.verifier.gpu.count": 6,
        },
        "pools.verifier.gpu.count is 6, which replicas of 4 GPUs (tensorParallel) cannot share out",
    ),
    (
        "trial",
        {"pools.verifier.tensorParallel": 2},
        "pools.verifier.tensorParallel is 2 and model.device is cpu, but GPUs are what it splits a target over",
    ),
    (
        "l4-h100",
        {"model.device": "cpu"},
        "model.device is cpu, which would leave them idle: set model.device to cuda",
    ),
    (
        "l4-h100",
        {"pools.verifier.resources.limits": {"cpu": "1", "memory": "4Gi"}},
        "resources.limits.cpu is 1: they would wait for ever; raise the limit",
    ),
    (
        "l4-h100",
        {"pools.draft.resources.limits": {"cpu": "4", "memory": "4Gi", "nvidia.com/gpu": 1}},
        "pools.draft.resources.limits names nvidia.com/gpu, which gpu.count adds: leave it out",
    ),
    (
        "l4-h100",
        {"verifierReplicas": 3},
        "verifierReplicas is 3, but autoscaling.enabled lets the load decide: leave it out",
    ),
    (
        "l4-h100",
        {"autoscaling.verifier.minReplicas": 9},
        "autoscaling.verifier.minReplicas is 9, more than maxReplicas (8): lessen it",
    ),
    (
        "l4-h100",
        {"autoscaling.draft.minRatio": 2},
        "autoscaling.draft.minRatio is 2, more than maxRatio (0.5): lessen it",
    ),
    (
        "l4-h100",
        {"autoscaling.verifier.policy": "presure"},
        'autoscaling.verifier.policy is "presure": choose pressure or forecast',
    ),
    (
        "l4-h100",
        {"autoscaling.staleAfterS": 6},
        "autoscaling.staleAfterS is 6: set it to twice autoscaling.intervalS (5)",
    ),
    (
        "l4-h100",
        {"pools.verifier.maxPods": 2},
        "pools.verifier.maxPods lets 2 pods be, and the replicas may need 8: raise it",
    ),
    (
        "l4-h100",
        {"autoscaler.enabled": False},
        "autoscaler.enabled is false, so there are 2 pods in pools.verifier, and the replicas may need 8: enable it",
    ),
    (
        "trial",
        {"schedulerReplicas": 2, "redis.mode": "none"},
        "schedulerReplicas is 2, and there is nothing to elect one by: set redis.mode",
    ),
    (
        "trial",
        {"scheduler.storeUrl": "redis://h:6379/1"},
        "scheduler.storeUrl and redis.mode bundled name two registries: leave scheduler.storeUrl empty",
    ),
    (
        "trial",
        {"redis.mode": "external"},
        "redis.mode is external and redis.external.host is empty: name its host",
    ),
    (
        "trial",
        {"redis.external.host": "h"},
        "which name two registries or ignore one: set redis.mode to external",
    ),
    (
        "trial",
        {"redis.mode": "none", "scheduler.storeUrl": "redis://u:p@h/1"},
        "scheduler.storeUrl holds a password, which whoever reads the RayService would see: use redis.mode external",
    ),
    (
        "trial",
        {"redis.registryDatabase": 0},
        "redis.registryDatabase is 0, which is Ray's own: choose another",
    ),
    (
        "trial",
        {"redis.mode": "sentinel"},
        "/redis/mode': value must be one of 'none', 'bundled', 'external'",
    ),
    (
        "trial",
        {"tls.internal.enabled": True},
        "tls.internal.enabled is true and there is no certificate: name a Secret in tls.internal.existingSecret",
    ),
    (
        "trial",
        {"tls.grpc.enabled": True},
        "tls.grpc.enabled is true and there is no certificate: name a Secret in tls.grpc.existingSecret",
    ),
    (
        "trial",
        {"tls.grpc.existingSecret": "x"},
        "tls.grpc.enabled is false and a certificate is named, which would not be used: enable it",
    ),
    (
        "trial",
        {"tls.grpc.enabled": True, "tls.grpc.certManager": {"enabled": True}},
        "tls.grpc.certManager.dnsNames is empty: name what clients dial",
    ),
    (
        "trial",
        {"tls.http.enabled": True},
        "tls.http.enabled is true and tls.http.existingSecret is empty: name a Secret with tls.crt and tls.key",
    ),
    (
        "trial",
        {"apiKeys.keys": {"a": "short"}},
        "apiKeys.keys.a has 5 characters: make one of 16 at least",
    ),
    (
        "trial",
        {"apiKeys": {"existingSecret": "x", "keys": {"a": "0123456789abcdef"}}},
        "apiKeys.existingSecret and apiKeys.keys are both set, and only one is used: leave one out",
    ),
    (
        "trial",
        {"modelCache.type": "image"},
        "modelCache.image.reference is empty: name an image that holds the models",
    ),
    (
        "trial",
        {"modelCache.type": "nfs"},
        "/modelCache/type': value must be one of 'pvc', 'hostPath', 'image', 'emptyDir'",
    ),
    (
        "production",
        {"modelCache.pvc.accessModes": ["ReadWriteOnce"]},
        'modelCache.pvc.accessModes is ["ReadWriteOnce"], and pods on several nodes share the models: use ReadWriteMany',
    ),
    (
        "trial",
        {"networkPolicy.clients": []},
        "networkPolicy.enabled is true and nobody may reach gateways: name clients in networkPolicy.clients",
    ),
    (
        "trial",
        {"networkPolicy.operator": []},
        "networkPolicy.operator is empty, so that KubeRay could not deploy anything: name its pods",
    ),
    (
        "trial",
        {"ingress.enabled": True},
        "ingress.enabled is true and ingress.host is empty: name the host",
    ),
    (
        "trial",
        {"gatewayApi.enabled": True},
        "gatewayApi.enabled is true and gatewayApi.parentRefs is empty: name the Gateway",
    ),
    (
        "trial",
        {"service.type": "Loadbalancer"},
        "/service/type': value must be one of 'ClusterIP', 'NodePort', 'LoadBalancer'",
    ),
    (
        "trial",
        {"service.grpcPort": 8000},
        "service.httpPort and service.grpcPort are both 8000: choose another for one",
    ),
    (
        "trial",
        {"network.replicaPorts": "7000-7100"},
        'network.replicaPorts is "7000-7100", and port 7000 in it is Ray\'s (node-manager): choose others',
    ),
    (
        "trial",
        {"network.replicaPorts": "20099-20000"},
        'network.replicaPorts is "20099-20000": write the lower port first',
    ),
    (
        "trial",
        {"network.replicaPorts": "20000"},
        'network.replicaPorts is "20000": write a range such as 20000-20099',
    ),
    (
        "trial",
        {"pools.gateway.terminationGracePeriodSeconds": 30},
        "pools.gateway.terminationGracePeriodSeconds is 30, and a pod needs 70 to drain, longestStreamSeconds among them: raise it",
    ),
    (
        "trial",
        {"pools.verifier.terminationGracePeriodSeconds": 30},
        "pools.verifier.terminationGracePeriodSeconds is 30, and a pod needs 45 to drain: raise it",
    ),
    (
        "production",
        {"redis.mode": "bundled"},
        "production is true and redis.mode is bundled: what must outlive a head needs a Redis of its own; set redis.mode to external",
    ),
    (
        "production",
        {"apiKeys.existingSecret": ""},
        "production is true and apiKeys.existingSecret is empty: name a Secret",
    ),
    (
        "production",
        {"tls.internal.enabled": False},
        "production is true and tls.internal.enabled is false: set it",
    ),
    (
        "production",
        {"networkPolicy.enabled": False},
        "production is true and networkPolicy.enabled is false: set it",
    ),
    (
        "production",
        {"gatewayReplicas": 1},
        "production is true and gatewayReplicas is 1: with fewer than 2, every move of its pod is an outage",
    ),
    (
        "trial",
        {"pools.verifier.resources.limits": {"cpu": "two", "memory": "4Gi"}},
        "/pools/verifier/resources/limits/cpu': 'two' does not match pattern",
    ),
    (
        "trial",
        {"pools.draft.env": [{"name": "HOME", "value": "/x"}]},
        "pools.draft.env sets HOME, which the chart sets: leave it out",
    ),
    (
        "trial",
        {"pools.draft.env": [{"name": "HF_HUB_OFFLINE", "value": "0"}]},
        "pools.draft.env sets HF_HUB_OFFLINE, which the chart sets: leave it out",
    ),
    (
        "trial",
        {
            "pools.draft.volumes": [{"name": "x", "emptyDir": {}}],
            "pools.draft.volumeMounts": [{"name": "x", "mountPath": "/models/"}],
        },
        "pools.draft.volumeMounts has /models, where the chart or KubeRay mounts its own: choose another",
    ),
    (
        "trial",
        {"commonLabels": {"app.kubernetes.io/instance": "x"}},
        "commonLabels sets app.kubernetes.io/instance, which the chart sets: choose another label",
    ),
    (
        "trial",
        {"pools.draft.enabled": False},
        "pools.draft.enabled is false and drafts are wanted: enable the pool",
    ),
    (
        "trial",
        {"ray.version": "2.40.0"},
        "ray.version is 2.40.0: the service needs 2.56 or newer; name the version",
    ),
    (
        "trial",
        {"image.gateway.digest": "abc"},
        'image.gateway.digest is "abc": write sha256: and 64 hexadecimal digits',
    ),
    (
        "trial",
        {"fullnameOverride": "Up_per"},
        "is none for a Service: set fullnameOverride to a-z, 0-9 and -",
    ),
    (
        "trial",
        {"scheduler.leaseS": 1},
        "scheduler.leaseS is 1 and scheduler.heartbeatS is 1: a replica that misses one heartbeat would be given up; set leaseS",
    ),
    ("trial", {"commonLabels": {"a": 1}}, "/commonLabels/a': got number, want string"),
]


def wrong(profile: str, mistake: dict[str, Any]) -> dict[str, Any]:
    layers = [nested(path, value) for path, value in mistake.items()]
    return merged(profile_values(profile), *layers)


def test_there_are_fifty_at_least() -> None:
    assert len(MISTAKES) >= 50
    assert len({(profile, str(mistake)) for profile, mistake, _ in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize(
    ("profile", "mistake", "message"),
    MISTAKES,
    ids=[f"{m[0]}:{next(iter(m[1]))}" for m in MISTAKES],
)
def test_a_mistake_is_refused_with_its_remedy(
    profile: str, mistake: dict[str, Any], message: str
) -> None:
    refused = attempt(wrong(profile, mistake))
    assert isinstance(refused, Refusal), "it was rendered"
    assert message in refused.message


def test_an_old_cluster_is_refused() -> None:
    refused = attempt(profile_values("trial"), "--kube-version", "1.28.0")
    assert isinstance(refused, Refusal)
    assert "requires kubeVersion: >=1.30.0" in refused.message


def test_all_that_is_wrong_is_told_at_once() -> None:
    refused = attempt(wrong("trial", {"tls.grpc.enabled": True, "redis.registryDatabase": 0}))
    assert isinstance(refused, Refusal)
    assert "tls.grpc.enabled" in refused.message
    assert "redis.registryDatabase" in refused.message
