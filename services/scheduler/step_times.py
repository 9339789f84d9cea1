"""Step times that verifiers measured, in the store, for those of the same kind that start later."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from math import inf

from dspark.errors import (
    InvalidRequestError,
    OverloadedError,
    StepTableError,
    UnavailableError,
)
from dspark.pb import scheduler_pb2 as pb
from dspark.scheduling.step_table import StepTimeTable
from dspark.services.scheduler.leadership import LeaderStore
from dspark.wire.step_times import step_times_from_pb, step_times_to_pb

log = logging.getLogger(__name__)

_PREFIX = "step_times/"
_KEEP_S = 30 * 24 * 3600.0  # for a kind of verifier that starts no more
_MOST_TABLES = 256
_LOOK_AGAIN_S = 30.0  # for a table that is not there
_FINGERPRINT = re.compile(r"[0-9a-f]{16,64}")


class StepTimes:
    """Tables by fingerprint. UnavailableError while the store does not answer."""

    def __init__(self, store: LeaderStore) -> None:
        self._store = store
        self._known: dict[str, StepTimeTable] = {}
        self._looked_at: dict[str, float] = {}
        self._looks: set[asyncio.Task[None]] = set()

    def known(self, fingerprint: str) -> StepTimeTable | None:
        """A table that has been put or learned here; waits for nothing."""
        return self._known.get(fingerprint)

    def learn(self, fingerprint: str) -> None:
        """See to it that the table is soon known, if the store has it."""
        now = time.monotonic()
        lately = now - self._looked_at.get(fingerprint, -inf) < _LOOK_AGAIN_S
        if lately or fingerprint in self._known:
            return
        if len(self._looked_at) >= _MOST_TABLES:
            self._looked_at.clear()
        self._looked_at[fingerprint] = now
        look = asyncio.create_task(self._look(fingerprint))
        self._looks.add(look)
        look.add_done_callback(self._looks.discard)

    async def _look(self, fingerprint: str) -> None:
        try:
            message = await self.get(fingerprint)
            if message is not None:
                self._keep(step_times_from_pb(message))
        except UnavailableError as error:
            log.warning("step times of %s are not known for now: %s", fingerprint, error)

    async def get(self, fingerprint: str) -> pb.StepTimeTable | None:
        """The table of a fingerprint; InvalidRequestError if it is none.

        A value that is no such table is ignored with a warning: it will be replaced.
        """
        key = _key(fingerprint)
        value = (await self._store.list(key)).get(key)
        if value is None:
            return None
        try:
            table = StepTimeTable.from_json(value)
            table.check_fits(fingerprint)
        except StepTableError as error:
            log.warning("ignored what the store holds as %s: %s", key, error)
            return None
        return step_times_to_pb(table)

    async def put(self, message: pb.StepTimeTable) -> None:
        """Keep a table.

        InvalidRequestError or ProtocolError if it is none, OverloadedError if too many are kept.
        """
        key = _key(message.fingerprint)
        table = step_times_from_pb(message)
        kept = await self._store.list(_PREFIX)
        if key not in kept and len(kept) >= _MOST_TABLES:
            raise OverloadedError(f"{len(kept)} step-time tables are kept, which is the most")
        self._keep(table)
        await self._store.put(key, table.to_json().encode(), _KEEP_S)

    def _keep(self, table: StepTimeTable) -> None:
        if len(self._known) >= _MOST_TABLES:
            del self._known[next(iter(self._known))]
        self._known[table.fingerprint] = table


def check_fingerprint(fingerprint: str) -> None:
    """InvalidRequestError unless it can name a table."""
    _key(fingerprint)


def _key(fingerprint: str) -> str:
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise InvalidRequestError(
            f"a fingerprint is 16 to 64 hexadecimal digits; got {fingerprint!r:.80}",
            param="fingerprint",
        )
    return _PREFIX + fingerprint
