"""Calibration of the confidences: Sequential Temperature Scaling (STS, paper §3.2).

For k = 1..γ in turn, with the positions before k fixed, a grid search finds the temperature of
c_k's logit at which the survival Π_{i≤k} c_i is off by the least, against "the first k draft tokens
were accepted". A temperature keeps the order of a position's confidences.

Blocks of served traffic are verified in part, and how far depends on their confidences. Position k
is fitted on the blocks that were verified at k, on all of them and on no others. Which those are
follows from their confidences, not from what became of their tokens; so among blocks that promise
the same, the share that survives is what it is among all. A block that fell within a shorter cut is
left out although it did not survive to k: those that stood up to the same cut cannot be counted
beside it, and failures alone would make every late position look worse than it is. What trimming
leaves out is not learned from: temperatures are best where draft tokens are worth verifying.

N blocks, γ block size.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark.errors import CalibrationError
from dspark.scheduling.survival import logits, survival, tempered
from dspark.types import DoubleArray, FloatArray, IntArray

log = logging.getLogger(__name__)

BINS = 10
LEAST_SAMPLES = 512  # blocks verified at a position; the bins of fewer are mostly noise
# From 1/8 to 8 in steps of 9 %, the nearest to 1 first: of equal ones it is taken.
_GRID = sorted((2.0 ** (step / 8) for step in range(-24, 25)), key=lambda t: abs(math.log(t)))
MAX_TABLE_BYTES = 16384  # as JSON
_RANGE = (0.05, 20.0)  # of a temperature, wherever it was fitted
_MAX_POSITIONS = 256
_MAX_TEXT = 128
MAX_EPOCH = _MAX_COUNT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """Temperatures of one drafter's confidences, by position in the block.

    A block that is shorter than the drafter's γ takes the first ones. CalibrationError if a value
    cannot be.
    """

    temperatures: tuple[float, ...]  # [γ]
    block_size: int  # γ, the drafter's own
    drafter_fingerprint: str
    blocks: int  # that were fitted on
    epoch: int = 0  # grows with each table that a scheduler publishes; 0: a checkpoint's

    def __post_init__(self) -> None:
        def refuse(name: str, got: object, want: str) -> None:
            raise CalibrationError(f"{name} of a calibration table must be {want}; got {got!r}")

        for name in ("block_size", "blocks", "epoch"):
            value, least = getattr(self, name), int(name == "block_size")
            most = _MAX_POSITIONS if name == "block_size" else _MAX_COUNT
            if type(value) is not int or not least <= value <= most:
                refuse(name, value, f"a whole number from {least} to {most}")
        fingerprint = self.drafter_fingerprint
        if not isinstance(fingerprint, str) or not 0 < len(fingerprint) <= _MAX_TEXT:
            refuse("drafter_fingerprint", fingerprint, f"a text of 1 to {_MAX_TEXT} characters")
        if len(self.temperatures) != self.block_size or not all(
            map(temperature_can_be, self.temperatures)
        ):
            low, high = _RANGE
            refuse("temperatures", self.temperatures, f"block_size numbers from {low} to {high}")

    def check_fits(self, block_size: int, fingerprint: str) -> None:
        """CalibrationError if the table is not of the drafter of that γ and fingerprint."""
        own = (self.block_size, self.drafter_fingerprint)
        if own != (block_size, fingerprint):
            raise CalibrationError(
                f"this calibration table is of a drafter with block size {own[0]} and fingerprint "
                f"{own[1]!r}; the drafter here has {block_size} and {fingerprint!r}: calibrate "
                "this one"
            )

    def to_json(self) -> str:
        """As text, for files and stores."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> CalibrationTable:
        """From text that anybody may have written; CalibrationError if it is no table."""
        if len(text) > MAX_TABLE_BYTES:
            raise CalibrationError(
                f"a calibration table has at most {MAX_TABLE_BYTES} bytes; got {len(text)}"
            )
        try:
            raw: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"a calibration table must be JSON: {error}") from error
        names = set(cls.__slots__)
        if not isinstance(raw, dict) or raw.keys() != names:
            raise CalibrationError(
                f"a calibration table is an object of {sorted(names)}; got "
                f"{sorted(raw) if isinstance(raw, dict) else type(raw).__name__}"
            )
        if not isinstance(raw["temperatures"], list) or not all(
            type(t) in (int, float) for t in raw["temperatures"]
        ):
            raise CalibrationError("temperatures of a calibration table must be a list of numbers")
        return cls(**{**raw, "temperatures": tuple(map(float, raw["temperatures"]))})


def temperature_can_be(value: float) -> bool:
    """Whether a temperature lies where a fit may have put it."""
    return isinstance(value, float) and _RANGE[0] <= value <= _RANGE[1]


class CalibrationInUse:
    """The newest table of one drafter. Those of others are refused: counted, and logged once."""

    def __init__(
        self, block_size: int, fingerprint: str, table: CalibrationTable | None = None
    ) -> None:
        self._block_size, self._fingerprint = block_size, fingerprint
        self._table = table
        self.refused = 0

    @property
    def temperatures(self) -> tuple[float, ...]:
        """By position; empty before any table came."""
        return () if self._table is None else self._table.temperatures

    @property
    def epoch(self) -> int:
        """Of the table."""
        return 0 if self._table is None else self._table.epoch

    def offer(self, table: CalibrationTable) -> None:
        """Use a table if it fits, and is none of an earlier epoch."""
        try:
            table.check_fits(self._block_size, self._fingerprint)
        except CalibrationError as error:
            if not self.refused:
                log.warning("refused: %s", error)
            self.refused += 1
            return
        if table.epoch >= self.epoch:
            self._table = table


def fit_temperatures(
    confidences: npt.ArrayLike,  # [N, γ] raw; past verified_lengths anything, NaN included
    verified_lengths: npt.ArrayLike,  # [N]
    accepted_lengths: npt.ArrayLike,  # [N]
    previous: Sequence[float] = (),  # by position; missing ones are 1
) -> tuple[float, ...]:  # [γ]
    """Temperatures fitted to held-out blocks.

    A position at which fewer than LEAST_SAMPLES blocks were verified keeps its previous
    temperature, since neither noise nor another position's error says anything about its own.
    """
    given, verified, accepted = _blocks(confidences, verified_lengths, accepted_lengths)
    raw = logits(given)
    reached = np.ones(len(raw))  # survival up to the position before
    fitted: list[float] = []
    for k in range(raw.shape[1]):
        known = verified > k
        before, own, stood = reached[known], raw[known, k], accepted[known] > k
        temperature = previous[k] if k < len(previous) else 1.0
        if len(own) >= LEAST_SAMPLES:
            errors = [expected_calibration_error(before * tempered(own, t), stood) for t in _GRID]
            temperature = _GRID[int(np.argmin(errors))]
        reached[known] = before * tempered(own, temperature)
        fitted.append(temperature)
    return tuple(fitted)


def survival_error(
    confidences: npt.ArrayLike,  # [N, γ], like the next two as in fit_temperatures
    verified_lengths: npt.ArrayLike,  # [N]
    accepted_lengths: npt.ArrayLike,  # [N]
    temperatures: Sequence[float] = (),  # by position; missing ones are 1
) -> float:
    """Calibration error of the survivals: the mean over all verified draft tokens, by position."""
    given, verified, accepted = _blocks(confidences, verified_lengths, accepted_lengths)
    predicted = survival(given.astype(np.float32), temperatures).astype(np.float64)
    total = count = 0.0
    for k in range(given.shape[1]):
        known = verified > k
        if known.any():
            here = int(known.sum())
            error = expected_calibration_error(predicted[known, k], accepted[known] > k)
            total, count = total + here * error, count + here
    return total / count if count else 0.0


def expected_calibration_error(
    predicted: DoubleArray | FloatArray,  # [N], 0..1
    observed: npt.NDArray[np.bool_],  # [N]
    bins: int = BINS,
) -> float:
    """ECE: how far predicted and observed rates are apart, a mean over bins of equal mass.

    ValueError without samples. Few samples of a perfect prediction measure more than 0: about
    0.8·√(p(1 - p)·bins / N).
    """
    count = len(predicted)
    if not count or len(observed) != count:
        raise ValueError(f"as many predictions as outcomes, please; got {count}, {len(observed)}")
    gaps: DoubleArray = observed - np.asarray(predicted, dtype=np.float64)
    return float(np.abs(np.bincount(mass_bins(predicted, bins), weights=gaps)).sum() / count)


def mass_bins(predicted: DoubleArray | FloatArray, bins: int = BINS) -> IntArray:  # [N] -> [N]
    """The bin of each prediction, as many in one as in another; equal predictions share a bin.

    The paper does not say which bins. Survivals crowd near 0 and 1, where bins of equal width would
    leave most of them empty.
    """
    count = len(predicted)
    if not count:
        return np.zeros(0, dtype=np.int64)
    edges = np.sort(predicted)[np.arange(1, bins) * count // bins]
    return np.searchsorted(edges, predicted, side="right")


def _blocks(
    confidences: npt.ArrayLike, verified: npt.ArrayLike, accepted: npt.ArrayLike
) -> tuple[DoubleArray, IntArray, IntArray]:
    """As arrays that agree; ValueError if they do not."""
    given = np.asarray(confidences, dtype=np.float64)
    lengths, stood = np.asarray(verified, dtype=np.int64), np.asarray(accepted, dtype=np.int64)
    if given.ndim != 2 or {lengths.shape, stood.shape} != {given.shape[:1]}:
        raise ValueError(
            f"confidences [N, γ] need N lengths; got {given.shape}, {lengths.shape}, {stood.shape}"
        )
    if ((stood < 0) | (stood > lengths) | (lengths > given.shape[1])).any():
        raise ValueError("each block needs 0 ≤ accepted ≤ verified ≤ γ")
    tested = given[np.arange(given.shape[1]) < lengths[:, None]]
    if not ((tested >= 0) & (tested <= 1)).all():
        raise ValueError("confidences of verified draft tokens must lie in 0..1")
    return given, lengths, stood
