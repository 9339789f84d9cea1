"""Calibration of the confidences: the paper's Sequential Temperature Scaling, with a bias (§3.2).

The paper finds for each position k the temperature T_k at which the survival Π_{i≤k} c_i is off by
the least. A temperature cannot move a confidence over one half, and that is what greedy requests
need: of tokens that a drafter is half sure of, more than half are the target's likeliest. So a
position's confidences become σ(logit(c) / T + b), which keeps their order as well; T and b are the
likeliest, among the blocks whose first k - 1 tokens stood, for what became of the k-th (logistic
regression, Platt 1999). Chances that hold given what came before make survivals that hold. Requests
that sample and greedy ones have scales of their own. docs/benchmarks.md has what it brings.

Blocks of served traffic are verified in part, and how far depends on their confidences. Position k
is fitted on the blocks that were verified at k. Which those are follows from their confidences, not
from what became of their tokens; so among blocks that promise the same, the share that stands is
what it is among all. What trimming leaves out is not learned from: scales are best where draft
tokens are worth verifying.

N blocks, γ block size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark.errors import CalibrationError
from dspark.scheduling.survival import logits, survivals_of
from dspark.types import (
    RAW_SCALE,
    RAW_SCALES,
    BoolArray,
    DoubleArray,
    FloatArray,
    IntArray,
    Scale,
    Scales,
)

log = logging.getLogger(__name__)

BINS = 10
LEAST_SAMPLES = 512  # blocks verified at a position, for a table that is to be kept
MAX_TABLE_BYTES = 32768  # as JSON
_TEMPERATURES, _BIASES = (0.05, 20.0), (-8.0, 8.0)  # wherever they were fitted
_MAX_POSITIONS = 256
_MAX_TEXT = 128
MAX_EPOCH = _MAX_COUNT = 2**63 - 1
# Belief in the scale there was: it weighs as much as some twenty blocks do.
_PRECISION = 4.0
_MOST_STEPS, _CONVERGED = 50, 1e-9
_WHERE = np.array([[1.0 / _TEMPERATURES[1], _BIASES[0]], [1.0 / _TEMPERATURES[0], _BIASES[1]]])


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """Scales of one drafter's confidences, for each position in the block.

    A block that is shorter than the drafter's γ takes the first ones. CalibrationError if a value
    cannot be.
    """

    scales: Scales
    block_size: int  # γ, the drafter's own
    drafter_fingerprint: str
    blocks: int  # of the last fit
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
        for kind in _KINDS:
            scale = getattr(self.scales, kind)
            lengths = {len(scale.temperatures), len(scale.biases)}
            if lengths != {self.block_size} or not scale_can_be(scale):
                refuse(f"{kind} scale", scale, f"block_size of each; {_scale_wanted()}")

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
        table = _members(raw, "a calibration table", cls.__slots__)
        kinds = _members(table["scales"], "its scales", _KINDS)
        scales = Scales(**{kind: _scale_from(kinds[kind], f"its {kind} scale") for kind in _KINDS})
        return cls(**{**table, "scales": scales})


def scale_can_be(scale: Scale) -> bool:
    """Whether a scale's numbers lie where a fit may have put them."""
    return all(
        isinstance(value, float) and low <= value <= high
        for values, (low, high) in (
            (scale.temperatures, _TEMPERATURES),
            (scale.biases, _BIASES),
        )
        for value in values
    )


def whole_scale(scale: Scale, block_size: int) -> Scale:
    """With the values that are missing."""
    more = block_size - len(scale.temperatures), block_size - len(scale.biases)
    return Scale(scale.temperatures + (1.0,) * more[0], scale.biases + (0.0,) * more[1])


class CalibrationInUse:
    """The newest table of one drafter. Those of others are refused: counted, and logged once."""

    def __init__(
        self, block_size: int, fingerprint: str, table: CalibrationTable | None = None
    ) -> None:
        self._block_size, self._fingerprint = block_size, fingerprint
        self._table = table
        self.refused = 0

    @property
    def scales(self) -> Scales:
        """Those that change nothing before any table came."""
        return RAW_SCALES if self._table is None else self._table.scales

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


def fit_scale(
    confidences: npt.ArrayLike,  # [N, γ] raw; past verified_lengths anything, NaN included
    verified_lengths: npt.ArrayLike,  # [N]
    accepted_lengths: npt.ArrayLike,  # [N]
    previous: Scale = RAW_SCALE,
) -> Scale:  # of γ positions
    """The scale of held-out blocks of one kind of request.

    It stays near the previous one where there is little evidence, and keeps it where there is none.
    """
    given, verified, accepted = _blocks(confidences, verified_lengths, accepted_lengths)
    raw, old = logits(given), whole_scale(previous, given.shape[1])
    temperatures, biases = [], []
    for k in range(given.shape[1]):
        known = (verified > k) & (accepted >= k)
        before = 1.0 / old.temperatures[k], old.biases[k]
        slope, bias = _likeliest(raw[known, k], accepted[known] > k, *before)
        temperatures.append(min(max(1.0 / slope, _TEMPERATURES[0]), _TEMPERATURES[1]))
        biases.append(bias)
    return Scale(tuple(temperatures), tuple(biases))


def _likeliest(
    x: DoubleArray,  # [M] logits
    stood: BoolArray,  # [M]
    slope: float,
    bias: float,
) -> tuple[float, float]:
    """Slope and bias at which σ(slope·x + bias) foretells best, close to those given."""
    around = at = np.array([slope, bias])
    rows = np.stack([x, np.ones_like(x)], axis=1)
    signs = np.where(stood, 1.0, -1.0)

    def loss(where: DoubleArray) -> float:
        misses = np.logaddexp(0.0, -signs * (rows @ where)).sum()
        return float(misses + 0.5 * _PRECISION * ((where - around) ** 2).sum())

    now = loss(at)
    for _ in range(_MOST_STEPS):
        chance = 1.0 / (1.0 + np.exp(-(rows @ at)))
        gradient = rows.T @ (chance - stood) + _PRECISION * (at - around)
        curvature = (rows * (chance * (1.0 - chance))[:, None]).T @ rows + _PRECISION * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while (then := loss(new := np.clip(at - step, *_WHERE))) > now:
            step = step / 2
        gained, at, now = now - then, new, then
        if gained <= _CONVERGED * (1.0 + now):
            break
    return float(at[0]), float(at[1])


def survival_error(
    confidences: npt.ArrayLike,  # [N, γ], like the next two as in fit_scale
    verified_lengths: npt.ArrayLike,  # [N]
    accepted_lengths: npt.ArrayLike,  # [N]
    greedy: BoolArray,  # [N] whether the request was
    scales: Scales = RAW_SCALES,
) -> float:
    """Calibration error of the survivals: the mean over all verified draft tokens, by position."""
    given, verified, accepted = _blocks(confidences, verified_lengths, accepted_lengths)
    predicted = survivals_of(given.astype(np.float32), greedy, scales).astype(np.float64)
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
    observed: BoolArray,  # [N]
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


_KINDS = ("sampled", "greedy")


def _scale_wanted() -> str:
    return (
        f"temperatures from {_TEMPERATURES[0]} to {_TEMPERATURES[1]}, biases from {_BIASES[0]} to "
        f"{_BIASES[1]}"
    )


def _members(raw: object, what: str, names: Sequence[str]) -> dict[str, Any]:
    """CalibrationError if `raw` is no object of these members."""
    if not isinstance(raw, dict) or raw.keys() != set(names):
        raise CalibrationError(
            f"{what} must be an object of {sorted(names)}; got "
            f"{sorted(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__}"
        )
    return raw


def _scale_from(raw: object, what: str) -> Scale:
    members = _members(raw, what, Scale.__slots__)
    for name, values in members.items():
        if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
            raise CalibrationError(f"{name} of {what} must be a list of numbers")
    return Scale(**{name: tuple(map(float, values)) for name, values in members.items()})


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
