"""Recalibration at work: reports in, fits in a thread, tables to the store and to verifiers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dspark.errors import CalibrationError, UnavailableError
from dspark.pb import scheduler_pb2 as pb
from dspark.scheduling.calibration import CalibrationTable
from dspark.scheduling.cluster import Cluster
from dspark.scheduling.recalibration import CalibrationStatus, Drafter, Recalibration, Sample
from dspark.services.scheduler.leadership import LeaderStore
from dspark.wire.plans import outcomes_from_pb, table_to_pb

log = logging.getLogger(__name__)

_PREFIX = "calibration/"
_KEEP_S = 30 * 24 * 3600.0  # in the store, for a drafter that is used no more
_MAX_MODEL_CHARS = 1024


@dataclass(slots=True, eq=False)
class Follower:
    """A verifier's stream, which is told when there may be something new for it."""

    incarnation: str = ""  # until it has said its name
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def introduce(self, incarnation: str) -> None:
        """Take its name from a report."""
        if incarnation != self.incarnation:
            self.incarnation = incarnation
            self.changed.set()


class Calibrations:
    """One for each scheduler; lives on its event loop."""

    def __init__(self, cluster: Cluster, store: LeaderStore) -> None:
        self._cluster, self._store = cluster, store
        self._recalibration = Recalibration(time.monotonic)
        self._followers: set[Follower] = set()
        self._fits: set[asyncio.Task[None]] = set()

    async def restore(self) -> None:
        """Take in tables of an earlier scheduler; UnavailableError without the store.

        A value that is no table is ignored with a warning: traffic will bring another.
        """
        for key, value in (await self._store.list(_PREFIX)).items():
            try:
                table = CalibrationTable.from_json(value)
                start = f"{_PREFIX}{table.drafter_fingerprint}/"
                model = key.removeprefix(start)
                if not key.startswith(start) or not 0 < len(model) <= _MAX_MODEL_CHARS:
                    raise CalibrationError("it is kept under a name that is not its drafter's")
            except CalibrationError as error:
                log.warning("ignored what the store holds as %.200s: %s", key, error)
                continue
            self._recalibration.restore(Drafter(model, table.drafter_fingerprint), table)

    @contextmanager
    def following(self) -> Iterator[Follower]:
        """A stream that is told of new tables while it lasts."""
        follower = Follower()
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    def tell(self) -> None:
        """There is something new for every stream."""
        for follower in self._followers:
            follower.changed.set()

    def take(self, report: pb.StepReport) -> None:
        """Take in a report's outcomes, if it has any; ProtocolError if they cannot be."""
        if not report.HasField("outcomes"):
            return
        outcomes = outcomes_from_pb(report.outcomes)
        drafter = self._drafter(report.incarnation)
        if drafter is None:
            return  # it has not registered yet: what its blocks are of is not known
        self._recalibration.take(drafter, outcomes, report.calibration_epoch)
        sample = self._recalibration.due(drafter)
        if sample is not None:
            fit = asyncio.create_task(self._fit(sample))
            self._fits.add(fit)
            fit.add_done_callback(self._fits.discard)

    def table(self, incarnation: str) -> CalibrationTable | None:
        """What a verifier's drafter is to be calibrated by."""
        drafter = self._drafter(incarnation)
        return None if drafter is None else self._recalibration.table(drafter)

    def statuses(self) -> list[pb.CalibrationStatus]:
        """For operators."""
        return [_status_to_pb(status) for status in self._recalibration.statuses()]

    async def _fit(self, sample: Sample) -> None:
        try:
            refit = await asyncio.to_thread(sample.refit)
        except Exception:  # no task awaits this one, and a drafter must not stay unfitted for good
            log.exception("the calibration of drafter %s failed", sample.drafter.fingerprint)
            self._recalibration.give_up(sample.drafter)
            return
        before = self._recalibration.table(refit.drafter)
        table = self._recalibration.settle(refit)
        if table is None:
            return
        if table is not before:
            log.info(
                "calibration %d of drafter %s for %s: error %.3f, was %.3f",
                table.epoch, refit.drafter.fingerprint, refit.drafter.model,
                refit.error, refit.error_in_use,
            )  # fmt: skip
            self.tell()
        key = f"{_PREFIX}{refit.drafter.fingerprint}/{refit.drafter.model}"
        try:
            await self._store.put(key, table.to_json().encode(), _KEEP_S)
        except UnavailableError as error:
            log.warning("a calibration table is kept in memory alone: %s", error)

    def _drafter(self, incarnation: str) -> Drafter | None:
        replica = self._cluster.replica(incarnation)
        if replica is None or not replica.drafter_fingerprint:
            return None
        return Drafter(replica.model, replica.drafter_fingerprint)


def _status_to_pb(status: CalibrationStatus) -> pb.CalibrationStatus:
    return pb.CalibrationStatus(
        model=status.drafter.model,
        drafter_fingerprint=status.drafter.fingerprint,
        table=None if status.table is None else table_to_pb(status.table),
        window_blocks=status.blocks,
        raw_error=status.raw_error,
        error=status.error,
        misfits=status.misfits,
    )
