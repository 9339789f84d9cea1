"""Calibration kept true to the traffic: from verifiers' reports to new tables of scales.

Each drafter of each model has a window of its latest reported blocks. Now and then scales are
fitted to one half of it and judged by the other. They become a table with a new epoch only if they
lessen the error by enough: a table is replaced when the traffic has changed, and not for noise.

This keeps `rejection` mode lossless. Scales are fitted to blocks of finished steps alone; the
confidences of the step at hand do no more than rank its draft tokens, as Algorithm 1 allows them
to. So what is drawn in a step has no say in whether it is verified (paper, Appendix A).

No I/O; the clock is given. What takes long is `Sample.refit`, which shares nothing and may run in a
thread: some hundredths of a second of one core for a full window at γ = 7, and not more often than
once in REFIT_AFTER_S for each drafter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dspark.scheduling.calibration import (
    MAX_EPOCH,
    CalibrationTable,
    fit_scale,
    survival_error,
)
from dspark.types import RAW_SCALES, BlockOutcomes, BoolArray, FloatArray, IntArray, Scales

WINDOW = 8192  # blocks
FIRST_BLOCKS = 2048  # of evidence before the first fit
FRESH_BLOCKS = 1024  # since the last one
REFIT_AFTER_S = 30.0
LEAST_GAIN = 0.005  # of calibration error, by which a new table must be better
_MOST_DRAFTERS = 32  # remembered, those that were heard of last


@dataclass(frozen=True, slots=True)
class Drafter:
    """Whose confidences a table is of: the same drafter fares otherwise with another target."""

    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Refit:
    """Scales, and calibration errors of survivals on blocks that they were not fitted to."""

    drafter: Drafter
    scales: Scales
    block_size: int
    blocks: int  # fitted to
    raw_error: float  # without any
    error_in_use: float  # with those in use
    error: float  # with these


@dataclass(frozen=True, slots=True)
class Sample:
    """A copy of a window, to fit to."""

    drafter: Drafter
    confidences: FloatArray  # [N, γ]
    verified: IntArray  # [N]
    accepted: IntArray  # [N]
    greedy: BoolArray  # [N]
    in_use: Scales

    def refit(self) -> Refit:
        """Fit to every other block of each kind, judge by the rest."""
        sampled, greedy = np.nonzero(~self.greedy)[0], np.nonzero(self.greedy)[0]
        scales = Scales(
            sampled=fit_scale(*self._blocks(sampled[::2])[:3], self.in_use.sampled),
            greedy=fit_scale(*self._blocks(greedy[::2])[:3], self.in_use.greedy),
        )
        judged = self._blocks(np.concatenate([sampled[1::2], greedy[1::2]]))
        return Refit(
            drafter=self.drafter,
            scales=scales,
            block_size=self.confidences.shape[1],
            blocks=len(sampled[::2]) + len(greedy[::2]),
            raw_error=survival_error(*judged),
            error_in_use=survival_error(*judged, self.in_use),
            error=survival_error(*judged, scales),
        )

    def _blocks(self, chosen: IntArray) -> tuple[FloatArray, IntArray, IntArray, BoolArray]:
        return (
            self.confidences[chosen],
            self.verified[chosen],
            self.accepted[chosen],
            self.greedy[chosen],
        )


@dataclass(frozen=True, slots=True)
class CalibrationStatus:
    """How a drafter's calibration stands."""

    drafter: Drafter
    table: CalibrationTable | None  # that was published last
    blocks: int  # in the window
    raw_error: float  # at the last fit, by raw confidences; 0 before any
    error: float  # and with those that were in use after it
    misfits: int  # reports left out, being of another block size


class _Window:
    """The latest blocks of one drafter, in a ring."""

    def __init__(self, block_size: int) -> None:
        self.confidences = np.zeros((WINDOW, block_size), dtype=np.float32)
        self.verified = np.zeros(WINDOW, dtype=np.int64)
        self.accepted = np.zeros(WINDOW, dtype=np.int64)
        self.greedy = np.zeros(WINDOW, dtype=np.bool_)
        self.taken = 0  # blocks, ever
        self.fitted_at = 0  # of `taken`
        self.fitted_at_s = -np.inf
        self.fitting = False
        self.reported = RAW_SCALES  # that verifiers use
        self.reported_epoch = 0  # of their table

    @property
    def size(self) -> int:
        return min(self.taken, WINDOW)

    def take(self, outcomes: BlockOutcomes, epoch: int) -> None:
        where = np.arange(self.taken, self.taken + len(outcomes.verified)) % WINDOW
        self.confidences[where] = outcomes.confidences
        self.verified[where] = outcomes.verified
        self.accepted[where] = outcomes.accepted
        self.greedy[where] = outcomes.greedy
        self.taken += len(where)
        if epoch >= self.reported_epoch:
            self.reported, self.reported_epoch = outcomes.scales, epoch


@dataclass(slots=True)
class _Account:
    """All that is known of a drafter's calibration."""

    table: CalibrationTable | None = None
    window: _Window | None = None
    epoch: int = 0  # the greatest heard of
    raw_error: float = 0.0
    error: float = 0.0
    misfits: int = 0


class Recalibration:
    """Tables of all drafters that are heard of."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: OrderedDict[Drafter, _Account] = OrderedDict()  # last heard of last

    def restore(self, drafter: Drafter, table: CalibrationTable) -> None:
        """Go on from a table of an earlier scheduler."""
        account = self._account(drafter)
        account.table, account.epoch = table, max(account.epoch, table.epoch)

    def take(self, drafter: Drafter, outcomes: BlockOutcomes, epoch: int) -> None:
        """Take in reported blocks; `epoch` is of the table that the verifier uses.

        A drafter has one block size: blocks of another are left out, and counted.
        """
        account = self._account(drafter)
        # An epoch that a scheduler before this one published, should the store have lost it.
        account.epoch = max(account.epoch, epoch)
        size = outcomes.confidences.shape[1]
        known = size if account.table is None else account.table.block_size
        if account.window is not None:
            known = account.window.confidences.shape[1]
        if size != known:
            account.misfits += 1
            return
        if account.window is None:
            account.window = _Window(size)
        account.window.take(outcomes, epoch)

    def due(self, drafter: Drafter) -> Sample | None:
        """What to fit to, if it is time; the next is due after it was settled or given up."""
        account = self._accounts.get(drafter)
        window = None if account is None else account.window
        if account is None or window is None or window.fitting or window.taken < FIRST_BLOCKS:
            return None
        now = self._clock()
        if (
            window.taken - window.fitted_at < FRESH_BLOCKS
            or now - window.fitted_at_s < REFIT_AFTER_S
        ):
            return None
        window.fitting, window.fitted_at, window.fitted_at_s = True, window.taken, now
        table, size = account.table, window.size
        in_use = window.reported
        # Verifiers may have a newer table than the store had kept.
        if table is not None and table.epoch >= window.reported_epoch:
            in_use = table.scales
        return Sample(
            drafter,
            window.confidences[:size].copy(),
            window.verified[:size].copy(),
            window.accepted[:size].copy(),
            window.greedy[:size].copy(),
            in_use,
        )

    def settle(self, refit: Refit) -> CalibrationTable | None:
        """The drafter's table from now on; a new one if the fit is worth it, None without any."""
        account = self._accounts.get(refit.drafter)
        if account is None or account.window is None:
            return None  # forgotten in between
        account.window.fitting = False
        account.raw_error, account.error = refit.raw_error, refit.error_in_use
        if refit.error_in_use - refit.error >= LEAST_GAIN:
            account.epoch = min(account.epoch + 1, MAX_EPOCH)
            account.error = refit.error
            account.table = CalibrationTable(
                refit.scales,
                refit.block_size,
                refit.drafter.fingerprint,
                refit.blocks,
                account.epoch,
            )
        return account.table

    def give_up(self, drafter: Drafter) -> None:
        """The fit that was due came to nothing; the next is due when it would be after any."""
        account = self._accounts.get(drafter)
        if account is not None and account.window is not None:
            account.window.fitting = False

    def table(self, drafter: Drafter) -> CalibrationTable | None:
        """The latest published."""
        account = self._accounts.get(drafter)
        return None if account is None else account.table

    def statuses(self) -> list[CalibrationStatus]:
        """For operators."""
        return [
            CalibrationStatus(
                drafter=drafter,
                table=one.table,
                blocks=0 if one.window is None else one.window.size,
                raw_error=one.raw_error,
                error=one.error,
                misfits=one.misfits,
            )
            for drafter, one in self._accounts.items()
        ]

    def _account(self, drafter: Drafter) -> _Account:
        account = self._accounts.setdefault(drafter, _Account())
        self._accounts.move_to_end(drafter)
        if len(self._accounts) > _MOST_DRAFTERS:
            self._accounts.popitem(last=False)
        return account
