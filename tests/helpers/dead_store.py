"""A store that never answers."""

from __future__ import annotations

from dspark.errors import UnavailableError
from dspark.store import Holding, LeaseFence, MemoryStore


class DeadStore(MemoryStore):
    async def put(
        self, key: str, value: bytes, ttl_s: float | None = None, fence: LeaseFence | None = None
    ) -> None:
        raise UnavailableError("scripted")

    async def acquire(
        self, lease: str, holder: str, ttl_s: float, *, above: int = 0, force: bool = False
    ) -> Holding:
        raise UnavailableError("scripted")

    async def list(self, prefix: str) -> dict[str, bytes]:
        raise UnavailableError("scripted")
