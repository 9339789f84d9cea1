"""All four services on one machine's Ray, for `dspark serve`, the demo and the tests."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx

from dspark.applications import DRAFT, GATEWAY, VERIFIER
from dspark.config import ServeConfig
from dspark.errors import ConfigError, UnavailableError
from dspark.models.drafter_folder import drafter_folder

_START_TIMEOUT_S = 300.0

Log = Callable[[str], None]


class LocalCluster:
    """Starts on `start`, and leaves no process behind on `stop`. Also a context manager."""

    def __init__(self, config: ServeConfig, log: Log = lambda line: None) -> None:
        self.config = config
        self._log = log
        self._started = False
        self._applications: list[str] = []
        self.scheduler_address = ""  # host:port of dspark.v1.Scheduler, as it was at the start

    @property
    def http_url(self) -> str:
        """Base of the OpenAI-compatible endpoints."""
        return f"http://{self.config.gateway.http_host}:{self.config.gateway.http_port}"

    @property
    def grpc_address(self) -> str:
        """host:port of dspark.v1.Inference."""
        return f"{self.config.gateway.grpc_host}:{self.config.gateway.grpc_port}"

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start Ray and the services, and wait until a request would be answered.

        Raises ConfigError when a port is taken, UnavailableError when the services do not come up.
        """
        gateway = self.config.gateway
        if self.config.gateway_replicas != 1:
            raise ConfigError(
                f"gateway_replicas is {self.config.gateway_replicas}, but each needs a node of its "
                "own and this is one machine: leave it at 1"
            )
        _require_free(gateway.http_host, gateway.http_port, "--http-port")
        _require_free(gateway.grpc_host, gateway.grpc_port, "--grpc-port")
        drafted = drafter_folder(self.config.model) is not None
        self._log("starting Ray …")
        import ray
        from ray import serve

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray forks to start its processes, and gRPC's own care for forks kills such a child when a
        # call is under way (grpc issue 43055). Read when gRPC begins: set it earlier where it has.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        # Of a core that another program wants, too, Ray's own default of 15 leaves services 3 %.
        os.environ.setdefault("RAY_worker_niceness", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            self._started = True
            serve.start(
                http_options={"host": gateway.http_host, "port": gateway.http_port},
                proxy_location="HeadOnly",
            )
            self._run_all(serve, drafted)
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Drain the services and end Ray."""
        if not self._started:
            return
        import ray
        from ray import serve

        self._started = False
        # The gateway first, so that streams end before what they need does.
        for name in reversed(self._applications):
            with contextlib.suppress(Exception):  # it may be half started; Ray's end takes it along
                serve.delete(name)
        self._applications.clear()
        ray.shutdown()

    def _run_all(self, serve: Any, drafted: bool) -> None:
        from dspark.services.draft import app as draft
        from dspark.services.gateway import app as gateway
        from dspark.services.scheduler import app as scheduler
        from dspark.services.verifier import app as verifier

        config = self.config
        self._log("starting the scheduler …")
        name = config.scheduler.application
        self._applications.append(name)
        handle = serve.run(scheduler.deployment(config), name=name, route_prefix=None)
        self.scheduler_address = handle.grpc_address.remote().result(timeout_s=_START_TIMEOUT_S)
        others = [
            serve.RunTarget(verifier.deployment(config), VERIFIER.name, route_prefix=None),
            serve.RunTarget(gateway.deployment(config), GATEWAY.name, route_prefix="/"),
        ]
        if drafted and config.most_drafts:
            application = draft.deployment(config)
            others.insert(0, serve.RunTarget(application, DRAFT.name, route_prefix=None))
        names = [target.name for target in others]
        self._log(f"starting {', '.join(names)} …")
        self._applications += names
        serve.run_many(others)  # each takes seconds to import what it needs

    def _await_ready(self) -> None:
        """The gateway is up; wait for it to have heard of a verifier."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        reason = "no answer yet"
        while time.monotonic() < deadline:
            try:
                answer = httpx.get(f"{self.http_url}/health", timeout=5.0)
                if answer.status_code == 200:
                    return
                reason = answer.text
            except httpx.HTTPError as error:
                reason = str(error)
            time.sleep(0.1)
        raise UnavailableError(
            f"the services did not come up in {_START_TIMEOUT_S:.0f} s: {reason}"
        )


def _require_free(host: str, port: int, option: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}): stop what holds it, or "
                f"choose another with {option}"
            ) from error
