"""A Serve config, deployed as KubeRay does: four applications over labelled nodes of a cluster.

What a user_config changes, and what is deployed anew, must cost no request that is under way.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from helpers.ports import free_ports
from helpers.serve_cluster import (
    POOL_LABEL,
    ServeCluster,
    on_this_machine,
    running_serve_cluster,
    serve_config,
)
from helpers.tiny import save_models

from dspark.applications import check_serve_config
from dspark.errors import InvalidRequestError
from dspark.rpc.client import InferenceClient, chat_request

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ALL = ("scheduler", "draft", "verifier", "gateway")
POOLS = {"scheduler": "gateway", "draft": "draft", "verifier": "verifier", "gateway": "gateway"}
MESSAGES = [("user", "one two three")]
CLIENTS = 3


class Deployed:
    """The config that is in force, and clients of it."""

    def __init__(self, cluster: ServeCluster, config: dict[str, Any]) -> None:
        self.cluster, self.config = cluster, config
        gateway = next(one for one in config["applications"] if one["name"] == "gateway")
        self.model: str = gateway["args"]["model"]["target"]
        self.grpc_address = f"127.0.0.1:{gateway['args']['gateway']['grpc_port']}"
        self.http_url = f"http://127.0.0.1:{config['http_options']['port']}"

    def deploy(self, **user_configs: dict[str, Any]) -> None:
        """The same with other user_configs."""
        config = copy.deepcopy(self.config)
        for application in config["applications"]:
            if application["name"] in user_configs:
                application["deployments"][0]["user_config"] = user_configs[application["name"]]
        self.cluster.deploy(config)

    def ask(self, **settings: Any) -> Any:
        """The last part of an answer over gRPC; whatever goes wrong is raised."""
        asked = chat_request(self.model, MESSAGES, max_tokens=60, temperature=0.0, **settings)
        with InferenceClient(self.grpc_address) as client:
            *_, last = client.generate(asked)
        return last

    def drafted(self) -> int:
        return int(self.ask().speculation.drafted_tokens)

    def replicas(self) -> dict[str, dict[str, str]]:
        return {name: self.cluster.replicas(name) for name in ALL}

    @contextmanager
    def under_load(self) -> Iterator[None]:
        """Requests all the time; none may fail."""
        over = threading.Event()

        def load() -> int:
            answers = 0
            while not over.is_set():
                self.ask()
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


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    target, drafter = save_models(tmp_path_factory.mktemp("tiny"))
    http_port, grpc_port = free_ports(2)
    tiny = {"target": str(target), "drafter": str(drafter), "dtype": "float32", "threads": 1}
    config = on_this_machine(serve_config(CONFIG), tiny, http_port, grpc_port)
    check_serve_config(config)
    with running_serve_cluster("gateway", "draft", "verifier") as cluster:
        made = Deployed(cluster, config)
        cluster.deploy(config)
        cluster.await_status("RUNNING", *ALL)
        health = f"{made.http_url}/health"
        cluster.until(lambda: httpx.get(health).status_code == 200, lambda: httpx.get(health).text)
        cluster.until(made.drafted, lambda: "nothing was ever drafted")
        yield made


def test_each_role_runs_in_its_pool_and_answers_both_protocols(deployed: Deployed) -> None:
    for name, replicas in deployed.replicas().items():
        assert list(replicas.values()) == [POOLS[name]]
    body = {
        "model": deployed.model,
        "messages": [{"role": role, "content": content} for role, content in MESSAGES],
        "temperature": 0,
        "max_tokens": 60,
    }
    answer = httpx.post(f"{deployed.http_url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    with InferenceClient(deployed.grpc_address) as client:
        asked = chat_request(deployed.model, MESSAGES, max_tokens=60, temperature=0.0)
        text = "".join(part.text for part in client.generate(asked))
    assert answer.json()["choices"][0]["message"]["content"] == text


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
    assert "EngineConfig has no setting 'max_request'" in message
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
