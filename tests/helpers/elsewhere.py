"""Stands for the scheduler's Serve application, for replicas that are to reach it elsewhere."""

from __future__ import annotations

from ray import serve

from dspark.applications import SCHEDULER


@serve.deployment(name=SCHEDULER.name, ray_actor_options={"num_cpus": 0})
class Elsewhere:
    """Says that it is at `address`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def grpc_address(self) -> str:
        return self._address
