"""The scheduler as a Ray Serve deployment: one leads, any others stand by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from dspark.applications import SCHEDULER, Reconfiguring
from dspark.config import ServeConfig
from dspark.services.scheduler.service import SchedulerService

_DRAIN_S = 1.0


@serve.deployment(
    name=SCHEDULER.name,
    user_config={},  # so that one that is taken away again is noticed
    health_check_period_s=2,
    health_check_timeout_s=5,
    graceful_shutdown_timeout_s=_DRAIN_S + 5,
    ray_actor_options={"num_cpus": 0},
)
class Scheduler:
    """Its own gRPC server; replicas find the leader's through `grpc_address` of any."""

    # Serve awaits it; the server that starts here lives on the replica's event loop.
    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        self._config, self._reconfiguring = config, Reconfiguring()
        self._service = SchedulerService(config)
        await self._service.start(ray.util.get_node_ip_address())

    async def grpc_address(self) -> str:
        """host:port of the leader's dspark.v1.Scheduler, as far as this replica knows."""
        return self._service.leader

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Go on by what `user_config` changes."""
        with self._reconfiguring.taking():
            self._service.reconfigure(SCHEDULER.changed(self._config, user_config).engine)

    async def check_health(self) -> None:
        """Raises when Serve should replace this replica."""
        await self._service.check()

    async def __del__(self) -> None:
        """Stop the server."""
        service: SchedulerService | None = getattr(self, "_service", None)
        if service is not None:  # else the constructor failed
            await service.stop(_DRAIN_S)


def deployment(config: ServeConfig) -> Any:
    """The bound deployment."""
    scheduler: Any = Scheduler  # Serve's decorators are untyped
    return scheduler.options(num_replicas=config.scheduler_replicas).bind(config)


def build(args: dict[str, Any]) -> Any:
    """The Serve application of a config file; RayServeException if `args` are not its settings."""
    return deployment(SCHEDULER.deployed(args))
