"""`dspark doctor --kube` against an API over real sockets: clusters that are well, or broken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from helpers.chart import CHART, helm
from helpers.cluster_api import ClusterApi, read_objects, remove, serving
from helpers.redis_server import RedisServer
from helpers.tls_secrets import secret, tls_secret
from typer.testing import CliRunner

from dspark.cli.main import app

DATA = Path(__file__).parents[1] / "data" / "kube_doctor"
KINDS = {"ray.io/v1": ["RayCluster", "RayService"], "monitoring.coreos.com/v1": ["PodMonitor"]}
VERIFIER = "demo-dspark-x7k2p-verifier-worker-8fzcm"
Raw = dict[str, Any]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


def ready() -> ClusterApi:
    """A cluster that the chart can be installed in."""
    objects = [
        *read_objects(DATA / "cluster.yaml"),
        tls_secret("dspark-internal-tls", "dspark.internal"),
        tls_secret("dspark-grpc-tls", "llm.example.com"),
        secret("dspark-keys", alice=b"a-long-key"),
        secret("dspark-redis", password=b"hidden-word"),
    ]
    return ClusterApi(objects, dict(KINDS))


def installed() -> ClusterApi:
    """The same with a release that serves."""
    api = ready()
    api.objects += read_objects(DATA / "release.yaml")
    return api


def diagnose(api: ClusterApi, folder: Path, *options: str) -> tuple[int, Raw]:
    with serving(api, folder) as kubeconfig:
        command = ["doctor", "--kube", "--json", "--kubeconfig", kubeconfig, *options]
        done = CliRunner().invoke(app, command)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    for hidden in ("hidden-word", "a-long-key", "t0ken", "PRIVATE"):
        assert hidden not in done.output
    return done.exit_code, json.loads(done.stdout)


def before(api: ClusterApi, folder: Path, redis: str) -> tuple[int, Raw]:
    manifests = str(DATA / "manifests.yaml")
    return diagnose(api, folder, "--manifests", manifests, "--store-url", redis)


def of_level(report: Raw, level: str) -> dict[str, Raw]:
    return {f["check"]: f for f in report["findings"] if f["level"] == level}


def named(api: ClusterApi, kind: str, name: str) -> Raw:
    return next(
        raw for raw in api.objects if raw["kind"] == kind and raw["metadata"]["name"] == name
    )


def test_a_cluster_that_is_ready_passes(tmp_path: Path, redis: str) -> None:
    code, report = before(ready(), tmp_path, redis)
    assert (code, of_level(report, "failed"), of_level(report, "warning")) == (0, {}, {})
    assert len(of_level(report, "ok")) >= 18
    checks = {finding["check"] for finding in report["findings"]}
    assert {"pods verifier", "pods draft", "pods head", "secret dspark-internal-tls"} <= checks
    assert "secret not-wanted" not in checks  # of a test hook alone


def no_crd(api: ClusterApi) -> None:
    del api.served["ray.io/v1"]


def old_crd(api: ClusterApi) -> None:
    api.served["ray.io/v1"] = ["RayCluster"]


def no_monitors(api: ClusterApi) -> None:
    del api.served["monitoring.coreos.com/v1"]


def no_operator(api: ClusterApi) -> None:
    api.objects = remove(api.objects, "Deployment")


def operator_down(api: ClusterApi) -> None:
    status = named(api, "Deployment", "kuberay-operator")["status"]
    status["availableReplicas"] = 0
    status["conditions"] = [
        {
            "type": "Available",
            "status": "False",
            "reason": "MinimumReplicasUnavailable",
            "message": "Deployment does not have minimum availability.",
        }
    ]


def old_operator(api: ClusterApi) -> None:
    container = named(api, "Deployment", "kuberay-operator")["spec"]["template"]["spec"]
    container["containers"][0]["image"] = "quay.io/kuberay/operator:v1.3.2"


def old_kubernetes(api: ClusterApi) -> None:
    api.version = {"major": "1", "minor": "27+", "gitVersion": "v1.27.9-eks-1"}


def no_gpu_nodes(api: ClusterApi) -> None:
    for name in ("h100-1", "l4-1", "l4-2"):
        api.objects = remove(api.objects, "Node", name)


def wrong_labels(api: ClusterApi) -> None:
    named(api, "Node", "h100-1")["metadata"]["labels"]["nvidia.com/gpu.product"] = "NVIDIA-A100"


def untolerated_taint(api: ClusterApi) -> None:
    taint = {"key": "dedicated", "value": "training", "effect": "NoSchedule"}
    named(api, "Node", "h100-1")["spec"]["taints"].append(taint)


def cordoned(api: ClusterApi) -> None:
    named(api, "Node", "h100-1")["spec"]["unschedulable"] = True


def no_device_plugin(api: ClusterApi) -> None:
    del named(api, "Node", "h100-1")["status"]["allocatable"]["nvidia.com/gpu"]


def gpus_taken(api: ClusterApi) -> None:
    resources = {"requests": {"cpu": "1"}, "limits": {"nvidia.com/gpu": "6"}}
    api.objects.append(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "training-0", "namespace": "research"},
            "spec": {"nodeName": "h100-1", "containers": [{"name": "t", "resources": resources}]},
            "status": {"phase": "Running"},
        }
    )


def no_storage_class(api: ClusterApi) -> None:
    api.objects = remove(api.objects, "StorageClass", "shared")


def one_node_disks(api: ClusterApi) -> None:
    named(api, "StorageClass", "shared")["provisioner"] = "ebs.csi.aws.com"


def missing_secret(api: ClusterApi) -> None:
    api.objects = remove(api.objects, "Secret", "dspark-redis")


def wrong_key(api: ClusterApi) -> None:
    missing_secret(api)
    api.objects.append(secret("dspark-redis", pass_word=b"hidden-word"))


def no_api_keys(api: ClusterApi) -> None:
    api.objects = remove(api.objects, "Secret", "dspark-keys")
    api.objects.append(secret("dspark-keys"))


def certificate(**how: Any) -> Callable[[ClusterApi], None]:
    def change(api: ClusterApi) -> None:
        api.objects = remove(api.objects, "Secret", "dspark-internal-tls")
        made = {"name": "dspark-internal-tls", "dns_name": "dspark.internal"} | how
        api.objects.append(tls_secret(**made))

    return change


def another_key(api: ClusterApi) -> None:
    other = tls_secret("other", "dspark.internal")["data"]["tls.key"]
    named(api, "Secret", "dspark-internal-tls")["data"]["tls.key"] = other


def quota_used_up(api: ClusterApi) -> None:
    used = named(api, "ResourceQuota", "team")["status"]["used"]
    used["requests.nvidia.com/gpu"] = "12"


def tight_limit_range(api: ClusterApi) -> None:
    named(api, "LimitRange", "bounds")["spec"]["limits"][0]["max"]["memory"] = "64Gi"


def no_rights(api: ClusterApi) -> None:
    api.may_not_create = {"rayservices"}


@pytest.mark.parametrize(
    ("broken", "check", "got", "remedy"),
    [
        (no_crd, "ray.io/v1", "RayService not served", "helm install kuberay-operator"),
        (old_crd, "ray.io/v1", "RayService not served", "helm install kuberay-operator"),
        (no_monitors, "monitoring.coreos.com/v1", "PodMonitor", "monitors off"),
        (no_operator, "KubeRay operator", "no deployment", "install KubeRay"),
        (operator_down, "KubeRay operator", "does not have minimum", "describe deployment"),
        (old_operator, "KubeRay operator", "v1.3.2", "1.7 or newer"),
        (old_kubernetes, "Kubernetes", "v1.27.9", "1.30 or newer"),
        (no_gpu_nodes, "pods verifier", "no node has", "label the nodes"),
        (wrong_labels, "pods verifier", "NVIDIA-H100-80GB-HBM3", "NVIDIA-A100"),
        (untolerated_taint, "pods verifier", "dedicated=training:NoSchedule", "key: dedicated"),
        (cordoned, "pods verifier", "cordoned or not ready: h100-1", "uncordon"),
        (no_device_plugin, "pods verifier", "none offers nvidia.com/gpu", "device plugin"),
        (no_device_plugin, "device plugin", "h100-1", "GPU operator"),
        (gpus_taken, "pods verifier", "room for 0 of 2", "add nodes"),
        (no_storage_class, "claim demo-dspark-models", "there is standard", "name one"),
        (one_node_disks, "claim demo-dspark-models", "one node at a time", "shared file"),
        (missing_secret, "secret dspark-redis", "does not exist", "password"),
        (wrong_key, "secret dspark-redis", "lacks password; it has pass.word", "add"),
        (no_api_keys, "secret dspark-keys", "no API key", "add one"),
        (certificate(days=-3), "secret dspark-internal-tls", "expired on", "renew"),
        (certificate(dns_name="x.test"), "secret dspark-internal-tls", "x.test", "dspark.internal"),
        (certificate(stranger=True), "secret dspark-internal-tls", "did not sign", "CA"),
        (another_key, "secret dspark-internal-tls", "not the key", "anew"),
        (quota_used_up, "quota team", "6 asked for, 4 left", "raised"),
        (tight_limit_range, "limit range bounds", "128.0 GiB, at most 64.0 GiB", "changed"),
        (no_rights, "rights", "rayservices.ray.io", "grant"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_cluster_is_diagnosed(
    tmp_path: Path,
    redis: str,
    broken: Callable[[ClusterApi], None],
    check: str,
    got: str,
    remedy: str,
) -> None:
    api = ready()
    broken(api)
    code, report = before(api, tmp_path, redis)
    failures = of_level(report, "failed")
    assert code == 1
    assert report["failed"] == len(failures)
    assert check in failures, failures
    assert got in failures[check]["got"]
    assert remedy in failures[check]["remedy"]
    related = {check, "pods draft"} if broken is no_gpu_nodes else {check}
    if broken is no_device_plugin:
        related = {"pods verifier", "device plugin"}
    assert failures.keys() == related  # and nothing else is blamed


def test_nodes_that_come_when_needed_are_only_warned_of(tmp_path: Path, redis: str) -> None:
    api = ready()
    no_gpu_nodes(api)
    manifests = str(DATA / "manifests.yaml")
    options = ("--manifests", manifests, "--store-url", redis, "--nodes-from-zero")
    code, report = diagnose(api, tmp_path, *options)
    assert code == 0
    assert {"pods verifier", "pods draft", "nodes"} == of_level(report, "warning").keys()


def test_what_may_not_be_seen_is_said_and_not_taken_for_well(tmp_path: Path, redis: str) -> None:
    api = ready()
    api.forbidden = {"nodes", "secrets", "deployments", "storageclasses"}
    code, report = before(api, tmp_path, redis)
    unseen = of_level(report, "warning")
    assert code == 0
    assert {"nodes", "KubeRay operator", "claim demo-dspark-models"} < unseen.keys()
    assert all("forbidden" in finding["got"] for finding in unseen.values())


@pytest.fixture
def helm_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(helm()).parent), prepend=os.pathsep)


@pytest.mark.usefixtures("helm_on_path")
def test_values_are_rendered_and_what_they_want_is_looked_for(tmp_path: Path) -> None:
    trial = ("--values", str(CHART / "values-trial.yaml"))
    code, report = diagnose(ready(), tmp_path, *trial)
    assert (code, of_level(report, "failed"), of_level(report, "warning")) == (0, {}, {})
    well = of_level(report, "ok")
    assert {"pods head", "pods verifier", "pods draft", "claim dspark-models"} <= well.keys()
    assert "comes with the chart" in well["Redis"]["got"]
    mine = tmp_path / "mine.yaml"  # goes over the first, as with helm
    mine.write_text("modelCache: {pvc: {storageClass: fast}}")
    code, report = diagnose(ready(), tmp_path, *trial, "--values", str(mine))
    assert code == 1
    assert "no storage class fast" in of_level(report, "failed")["claim dspark-models"]["got"]


@pytest.mark.usefixtures("helm_on_path")
def test_rights_in_the_namespace_alone_are_none_to_what_is_of_the_cluster(tmp_path: Path) -> None:
    api = ready()
    api.only_in = "serving"  # such as a Role of all verbs on all resources
    code, report = diagnose(api, tmp_path, "--values", str(CHART / "values-trial.yaml"))
    assert code == 1
    got = of_level(report, "failed")["rights"]["got"]
    assert "clusterrolebindings.rbac.authorization.k8s.io, clusterroles.rbac" in got
    assert "services" not in got


@pytest.mark.usefixtures("helm_on_path")
def test_values_that_the_chart_refuses_are_told_in_its_words(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("redis: {mode: external}")
    refused = refusal(tmp_path, "--values", str(mine))
    assert "redis.mode is external and redis.external.host is empty: name its host" in refused


def test_values_without_helm_are_refused_with_the_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    values = ("--values", str(CHART / "values-trial.yaml"))
    assert "render elsewhere and give the output to --manifests" in refusal(tmp_path, *values)
    both = (*values, "--manifests", str(DATA / "manifests.yaml"))
    assert "leave --values out" in refusal(tmp_path, *both)


def refusal(folder: Path, *options: str) -> str:
    """What is said where nothing could be looked at."""
    with serving(ready(), folder) as kubeconfig:
        command = ["doctor", "--kube", "--kubeconfig", kubeconfig, *options]
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    return " ".join(done.stderr.split())


def test_redis_that_does_not_answer_fails(tmp_path: Path) -> None:
    code, report = before(ready(), tmp_path, "redis://:hidden-word@127.0.0.1:9/0")
    assert code == 1
    assert of_level(report, "failed").keys() == {"Redis"}


def test_without_a_chart_the_cluster_itself_is_looked_at(tmp_path: Path) -> None:
    code, report = diagnose(ready(), tmp_path)
    assert code == 0, report
    assert {"ray.io/v1", "KubeRay operator", "nodes", "storage classes"} <= of_level(
        report, "ok"
    ).keys()


def test_a_release_that_serves_passes(tmp_path: Path) -> None:
    code, report = diagnose(installed(), tmp_path, "--release", "demo")
    assert (code, of_level(report, "failed"), of_level(report, "warning")) == (0, {}, {})
    assert "1 workers run without being ready" in of_level(report, "ok")["pods"]["got"]


def container(api: ClusterApi, **status: Any) -> None:
    pod = named(api, "Pod", VERIFIER)
    pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
    pod["status"]["containerStatuses"][0].update(ready=False, **status)


def image_pull(api: ClusterApi) -> None:
    said = 'Back-off pulling image "dspark/verifier:0.1.0"'
    container(api, state={"waiting": {"reason": "ImagePullBackOff", "message": said}})
    named(api, "Pod", VERIFIER)["status"]["phase"] = "Pending"


def unschedulable(api: ClusterApi) -> None:
    status = named(api, "Pod", VERIFIER)["status"]
    said = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
    placed = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    status.update(phase="Pending", conditions=[placed], containerStatuses=[])


def out_of_memory(api: ClusterApi) -> None:
    ended = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}
    container(api, state=waiting, lastState=ended, restartCount=7)


def crash_loop(api: ClusterApi) -> None:
    ended = {"terminated": {"reason": "Error", "exitCode": 3}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}
    container(api, state=waiting, lastState=ended, restartCount=7)


def deploy_failed(api: ClusterApi) -> None:
    applications = named(api, "RayService", "demo-dspark")["status"]["activeServiceStatus"]
    said = "ConfigError: block_size must be at most 7; got 9"
    applications["applicationStatuses"]["verifier"] = {"status": "DEPLOY_FAILED", "message": said}


def given_up(api: ClusterApi) -> None:
    named(api, "RayService", "demo-dspark")["status"]["conditions"] = [
        {"type": "Ready", "status": "False", "reason": "InitializingTimeout", "message": "1800s"}
    ]


def claim_pending(api: ClusterApi) -> None:
    named(api, "PersistentVolumeClaim", "demo-dspark-models")["status"] = {"phase": "Pending"}


def no_release(api: ClusterApi) -> None:
    for name in ("RayService", "Pod"):
        api.objects = remove(api.objects, name)


@pytest.mark.parametrize(
    ("broken", "check", "got", "remedy"),
    [
        (image_pull, f"pod {VERIFIER}", "cannot be pulled: Back-off pulling", "pullSecrets"),
        (unschedulable, f"pod {VERIFIER}", "4 Insufficient nvidia.com/gpu", "--values"),
        (out_of_memory, f"pod {VERIFIER}", "killed for memory, 7 restarts", "memory"),
        (crash_loop, f"pod {VERIFIER}", "exit code 3", "--previous"),
        (deploy_failed, "application verifier", "must be at most 7", "logs"),
        (given_up, "RayService demo-dspark", "given up", "delete the RayService"),
        (claim_pending, "claim demo-dspark-models", "Pending", "describe pvc"),
        (certificate(days=-1), "certificate dspark-internal-tls", "expired", "renew"),
        (operator_down, "KubeRay operator", "is down", "describe"),
        (no_release, "RayService", "none with", "helm list"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_release_that_is_not_well_is_diagnosed(
    tmp_path: Path, broken: Callable[[ClusterApi], None], check: str, got: str, remedy: str
) -> None:
    api = installed()
    broken(api)
    code, report = diagnose(api, tmp_path, "--release", "demo")
    failures = of_level(report, "failed")
    assert code == 1
    assert got in failures[check]["got"]
    assert remedy in failures[check]["remedy"]
    assert len(failures) == (2 if broken is no_release else 1)


def test_what_is_only_worth_knowing_is_warned_of(tmp_path: Path) -> None:
    api = installed()
    certificate(days=5)(api)
    api.objects = remove(api.objects, "NetworkPolicy")
    named(api, "PodDisruptionBudget", "demo-dspark-draft")["status"]["disruptionsAllowed"] = 0
    about = {"kind": "Pod", "namespace": "serving"}
    worker = "demo-dspark-x7k2p-draft-worker-q4r9t"
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "e1", "namespace": "serving"},
        "type": "Warning",
        "reason": "FailedMount",
        "message": 'MountVolume.SetUp failed for volume "keys"',
        "count": 4,
        "involvedObject": {**about, "name": VERIFIER},
    }
    unready = deepcopy(event) | {"reason": "Unhealthy", "message": "Readiness probe failed"}
    unready["involvedObject"]["name"] = worker  # by design, without a replica
    others = deepcopy(event)
    others["involvedObject"]["name"] = "somebody-else"
    api.objects += [event, unready, others]
    code, report = diagnose(api, tmp_path, "--release", "demo")
    assert code == 0
    assert of_level(report, "warning").keys() == {
        "certificate dspark-internal-tls",
        "network policies",
        "disruption budget demo-dspark-draft",
        "event FailedMount",
    }


def test_an_upgrade_beside_the_old_cluster_is_told(tmp_path: Path) -> None:
    api = installed()
    status = named(api, "RayService", "demo-dspark")["status"]
    status["pendingServiceStatus"] = {"rayClusterName": "demo-dspark-new"}
    code, report = diagnose(api, tmp_path, "--release", "demo")
    assert code == 0
    assert "twice the GPUs" in of_level(report, "warning")["upgrade of demo-dspark"]["got"]


def test_the_table_says_the_same(tmp_path: Path) -> None:
    api = ready()
    missing_secret(api)
    with serving(api, tmp_path) as kubeconfig:
        command = ["doctor", "--kube", "--kubeconfig", kubeconfig]
        done = CliRunner().invoke(app, [*command, "--manifests", str(DATA / "manifests.yaml")])
    assert done.exit_code == 1
    assert "secret" in done.output
    assert "dspark-redis" in done.output
    assert "failed" in done.output


def test_expired_credentials_and_dead_servers_are_one_line(tmp_path: Path) -> None:
    api = ready()
    api.token = "another"
    with serving(api, tmp_path) as kubeconfig:
        command = ["doctor", "--kube", "--kubeconfig", kubeconfig]
        refused = CliRunner().invoke(app, command)
    dead = CliRunner().invoke(app, command)
    assert (refused.exit_code, dead.exit_code) == (1, 1)
    assert "does not know who asks (401)" in refused.stderr
    assert "does not answer" in dead.stderr


def test_options_of_kube_alone_are_refused_without_it() -> None:
    done = CliRunner().invoke(app, ["doctor", "--release", "demo"])
    assert done.exit_code == 2
    assert "--kube" in done.output


def test_a_ca_of_the_pods_does_not_keep_redis_from_being_dialled(tmp_path: Path) -> None:
    url = "rediss://127.0.0.1:9/1?ssl_ca_certs=/etc/dspark/redis-ca/ca.crt"
    code, report = before(ready(), tmp_path, url)
    assert code == 1
    assert (
        "does not answer from here: ConnectionError" in of_level(report, "failed")["Redis"]["got"]
    )
