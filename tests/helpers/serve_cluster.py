"""A Ray cluster of labelled nodes that takes Serve configs, as KubeRay sends them.

Its nodes are processes of this machine: they share its address, and its ports.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from helpers.ports import free_ports

POOL_LABEL = "dspark.io/pool"
_API = "/api/serve/applications/"
_PATIENCE_S = 120.0  # until a test gives up; never the time that it takes
_POLL_S = 0.2


def serve_config(source: Path | Mapping[str, Any]) -> dict[str, Any]:
    """A Serve config: itself, or as the RayService among rendered manifests has it."""
    if isinstance(source, Mapping):
        return dict(source)
    documents = [one for one in yaml.safe_load_all(source.read_text(encoding="utf-8")) if one]
    if len(documents) == 1 and "applications" in documents[0]:
        found: dict[str, Any] = documents[0]
        return found
    services = [one for one in documents if one.get("kind") == "RayService"]
    assert len(services) == 1, f"{source} has {len(services)} RayServices"
    rendered: dict[str, Any] = yaml.safe_load(services[0]["spec"]["serveConfigV2"])
    return rendered


def on_this_machine(
    config: Mapping[str, Any], model: Mapping[str, Any], http_port: int, grpc_port: int
) -> dict[str, Any]:
    """`config` with another model on the CPU, and with ports of this machine's.

    All nodes are this machine, so that there can be one proxy and one gateway.
    """
    made = copy.deepcopy(dict(config))
    made["proxy_location"] = "HeadOnly"
    made["http_options"] = {"host": "127.0.0.1", "port": http_port}
    for application in made["applications"]:
        args = application["args"]
        if "model" in args:
            args["model"] = {**args["model"], **model, "device": "cpu"}
        if "gateway" in args:
            args["gateway"] |= {"grpc_host": "127.0.0.1", "grpc_port": grpc_port}
        for deployment in application["deployments"]:
            for name in ("num_gpus", "accelerator_type"):
                deployment["ray_actor_options"].pop(name, None)
    return made


class ServeCluster:
    """Where configs are deployed to, and what became of them."""

    def __init__(self, dashboard: str, pools: Mapping[str, str]) -> None:
        self._http = httpx.Client(base_url=dashboard, timeout=60.0)
        self._pools = pools  # by node id

    def deploy(self, config: Mapping[str, Any]) -> None:
        """What is not in it is taken down; returns when Serve has accepted it."""
        answer = self._http.put(_API, json=config)
        assert answer.status_code == 200, answer.text

    def application(self, name: str) -> dict[str, Any]:
        """What Serve says of it; empty without one."""
        answer = self._http.get(_API).raise_for_status().json()
        found: dict[str, Any] = answer["applications"].get(name, {})
        return found

    def replicas(self, name: str) -> dict[str, str]:
        """Pools that the running replicas of an application of one deployment are in, by id."""
        application = self.application(name)
        deployment = application["deployments"].get(name)
        assert deployment is not None, application
        return {
            replica["replica_id"]: self._pools[replica["node_id"]]
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        }

    def processes(self, name: str) -> dict[int, str]:
        """The same, by process id."""
        (deployment,) = self.application(name)["deployments"].values()
        return {
            replica["pid"]: self._pools[replica["node_id"]]
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        }

    def await_status(self, status: str, *names: str) -> None:
        """Until the applications all have it; an AssertionError tells what they have instead."""
        for name in names:
            self.until(
                lambda name=name: self.application(name).get("status") == status,
                lambda name=name: f"{name} never became {status}: {self.application(name)}",
            )

    def await_user_config(self, name: str, user_config: Mapping[str, Any]) -> None:
        """Until all replicas of an application's deployment have been given it."""

        def given() -> bool:
            deployment = self.application(name)["deployments"][name]
            has = deployment["deployment_config"]["user_config"]
            return has == user_config and deployment["status"] == "HEALTHY"

        self.until(given, lambda: f"{name} never had {user_config}: {self.application(name)}")

    def until(self, reached: Callable[[], object], otherwise: Callable[[], str]) -> None:
        """Ask until it is so."""
        deadline = time.monotonic() + _PATIENCE_S
        while not reached():
            assert time.monotonic() < deadline, otherwise()
            time.sleep(_POLL_S)  # Serve offers nothing to wait for

    def close(self) -> None:
        self._http.close()


@contextmanager
def running_serve_cluster(*pools: str, cpus: int = 8) -> Iterator[ServeCluster]:
    """A head without CPUs, as in production, and a node in each of `pools`."""
    from ray.cluster_utils import Cluster

    # Nodes are processes that read these when they start; a token would be asked for otherwise.
    added = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    (port,) = free_ports(1)
    nodes = Cluster()
    try:
        nodes.add_node(
            num_cpus=0, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=port
        )
        by_node = {
            nodes.add_node(num_cpus=cpus, labels={POOL_LABEL: pool}).node_id: pool for pool in pools
        }
        cluster = ServeCluster(f"http://127.0.0.1:{port}", by_node)
        try:
            yield cluster
        finally:
            cluster.close()
    finally:
        nodes.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
