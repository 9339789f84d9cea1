"""What the chart promises about pods, secrets and permissions."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from helpers.chart import cases, containers, render
from ray._private import ray_constants

from dspark.services.draft.app import DraftReplica
from dspark.services.gateway.app import Gateway
from dspark.services.verifier.app import VerifierReplica

every = pytest.mark.parametrize("case", cases())
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
SECRETS = ("not-a-real-key-0123456789", "a-password-for-redis")


def encoded(secret: str) -> str:
    """As a Secret holds it."""
    return base64.b64encode(secret.encode()).decode()


@every
def test_pods_are_restricted(case: str) -> None:
    for name, pod in render(cases()[case]).pods.items():
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in containers(pod):
            context = one["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not context.get("privileged")
            assert not any("hostPort" in port for port in one.get("ports", []))
        folders = [volume for volume in spec.get("volumes", []) if "hostPath" in volume]
        assert not folders or cases()[case]["modelCache"]["type"] == "hostPath"


def test_large_user_ids_stay_whole_numbers() -> None:
    user = 1_000_650_000  # of OpenShift's ranges, where helm itself would write 1.00065e+09
    ids = dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), user)
    for name, pod in render({**cases()["production"], "podSecurity": ids}).pods.items():
        context = pod["spec"]["securityContext"]
        assert {key: context[key] for key in ids} == ids, name
        assert all(isinstance(context[key], int) for key in ids), name


@every
def test_the_autoscaler_beside_the_head_is_restricted(case: str) -> None:
    options = render(cases()[case]).cluster.get("autoscalerOptions")
    if options is None:
        assert cases()[case]["autoscaler"]["enabled"] is False
        return
    context = options["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert options["resources"]["limits"]["memory"]


@every
def test_containers_have_resources(case: str) -> None:
    for name, pod in render(cases()[case]).pods.items():
        for one in containers(pod):
            assert {"cpu", "memory"} <= one["resources"]["requests"].keys(), name
            assert "memory" in one["resources"]["limits"]


@every
def test_writable_folders_are_mounted_where_the_root_is_read_only(case: str) -> None:
    for name, pod in render(cases()[case]).pods.items():
        if not name.startswith("group "):
            continue
        container = pod["spec"]["containers"][0]
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
        env = {one["name"]: one.get("value") for one in container["env"]}
        for folder in (env["HOME"], env["TMPDIR"]):
            assert "emptyDir" in volumes[mounts[folder]["name"]]
        assert {one["name"] for one in container["volumeMounts"]} <= volumes.keys()


@every
def test_no_secret_is_where_many_can_read_it(case: str) -> None:
    values = {**cases()[case]}
    if values.get("redis", {}).get("mode") == "bundled":
        values["redis"] = {**values["redis"], "bundled": {"password": SECRETS[1]}}
    rendering = render(values)
    for one in rendering.objects:
        text = json.dumps(one)
        if one["kind"] == "Secret":
            continue
        for secret in (*SECRETS, *map(encoded, SECRETS)):
            assert secret not in text, f"{one['kind']} {one['metadata']['name']}"
    for pod in rendering.pods.values():
        for container in containers(pod):
            for variable in container.get("env", []):
                secretive = variable["name"].endswith(("PASSWORD", "_TOKEN", "_KEY", "SECRET"))
                assert not (secretive and variable.get("value")), variable["name"]


@pytest.mark.parametrize("given", ["apiKeys", "redis"])
def test_a_secret_in_values_lands_in_a_secret(given: str) -> None:
    values = {
        "apiKeys": {"apiKeys": {"keys": {"t": SECRETS[0]}}},
        "redis": {"redis": {"mode": "bundled", "bundled": {"password": SECRETS[1]}}},
    }[given]
    text = json.dumps(render({**cases()["trial"], **values}).of("Secret"))
    assert encoded(SECRETS[0 if given == "apiKeys" else 1]) in text


@every
def test_accounts_may_do_little(case: str) -> None:
    rendering = render(cases()[case])
    for role in rendering.of("Role") + rendering.of("ClusterRole"):
        for rule in role["rules"]:
            for part in ("apiGroups", "resources", "verbs"):
                assert "*" not in rule.get(part, []), role["metadata"]["name"]
            assert "secrets" not in rule["resources"]
            if role["kind"] == "ClusterRole":
                assert set(rule["verbs"]) <= {"get", "list", "watch"}
    for name, pod in rendering.pods.items():
        if name.removeprefix("group ").removesuffix("-spot") in ("draft", "verifier"):
            assert pod["spec"]["automountServiceAccountToken"] is False


@every
def test_a_pod_has_time_to_drain(case: str) -> None:
    """Clients first, then what Serve gives replicas, within Ray's limit, within the kubelet's."""
    of_serve = {
        "draft": DraftReplica, "verifier": VerifierReplica, "gateway": Gateway,
    }  # fmt: skip
    assert hasattr(ray_constants, DRAIN), "Ray has no such setting any more"
    for name, group in render(cases()[case]).groups.items():
        if name == "head":
            continue
        spec = group["template"]["spec"]
        container = spec["containers"][0]
        clients = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
        assert (clients > 0) == (name == "gateway")
        (of_ray,) = [int(one["value"]) for one in container["env"] if one["name"] == DRAIN]
        replica: Any = of_serve[name.removesuffix("-spot")]
        assert of_ray > replica._deployment_config.graceful_shutdown_timeout_s, name
        assert spec["terminationGracePeriodSeconds"] >= clients + of_ray + 10, name
