"""Step times that verifiers measured, in the store, for those of the same kind that start later."""

from __future__ import annotations

import logging
import re

from dspark.errors import InvalidRequestError, OverloadedError, StepTableError
from dspark.pb import scheduler_pb2 as pb
from dspark.scheduling.step_table import StepTimeTable
from dspark.services.scheduler.leadership import LeaderStore
from dspark.wire.step_times import step_times_from_pb, step_times_to_pb

log = logging.getLogger(__name__)

_PREFIX = "step_times/"
_KEEP_S = 30 * 24 * 3600.0  # for a kind of verifier that starts no more
_MOST_TABLES = 256
_FINGERPRINT = re.compile(r"[0-9a-f]{16,64}")


class StepTimes:
    """Tables by fingerprint. UnavailableError while the store does not answer."""

    def __init__(self, store: LeaderStore) -> None:
        self._store = store

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
        await self._store.put(key, table.to_json().encode(), _KEEP_S)


def _key(fingerprint: str) -> str:
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise InvalidRequestError(
            f"a fingerprint is 16 to 64 hexadecimal digits; got {fingerprint!r:.80}",
            param="fingerprint",
        )
    return _PREFIX + fingerprint
