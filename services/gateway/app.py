"""The gateway as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from dspark.config import ServeConfig
from dspark.models.tokenizer import load_tokenizer
from dspark.services.gateway.service import GatewayService

_DRAIN_S = 20.0
# Serve must not count requests down before we do: the answer to too many is our 429.
_SPARE_REQUESTS = 64


@serve.deployment(
    name="gateway",
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=2,
    health_check_timeout_s=5,
    graceful_shutdown_timeout_s=_DRAIN_S + 10,
)
@serve.ingress()  # the app is built per replica, below
class Gateway:
    """HTTP through Serve's proxy, gRPC on a server of its own."""

    # Serve awaits it; the servers that start here live on the loop that serves requests.
    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, scheduler: DeploymentHandle
    ) -> None:
        tokenizer: Any = await asyncio.to_thread(load_tokenizer, config.model.target)
        self._service = GatewayService(config, tokenizer, lambda: scheduler.grpc_address.remote())
        await self._service.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service.http_app()

    async def check_health(self) -> None:
        """Raises when Serve should replace this replica."""
        await self._service.check()

    async def __del__(self) -> None:  # Serve awaits it, once HTTP requests are through
        service: GatewayService | None = getattr(self, "_service", None)
        if service is not None:  # else the constructor failed
            await service.stop(_DRAIN_S)


def deployment(config: ServeConfig, scheduler: Any) -> Any:
    """The bound deployment; `scheduler` is the scheduler's."""
    limit = config.gateway.max_in_flight + _SPARE_REQUESTS
    gateway: Any = Gateway  # Serve's decorators are untyped
    return gateway.options(max_ongoing_requests=limit).bind(config, scheduler)
