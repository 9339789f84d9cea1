"""For which requests to draft, and how long a block: the gate's question, asked of each request.

The gate asks whether drafting pays for all requests together. Among them texts differ: code is
foreseen better than a chat at high temperature, and one request's text changes on its way. Here
each request is judged by what its own latest blocks were worth.

A round of τ tokens takes T, so a moment is worth Θ = τ / T tokens. One more row in the step costs
so many moments, and so does one more block: a position pays if its survival is above the price of
its row, and a block if what its positions bring beyond that is above the price of drafting it.
Blocks are cut behind the last position that might pay, and requests whose block does not pay are
left out, for a while that doubles each time, and then drafted for once, to see.

Where only so many blocks can be had, they go to those that they bring most.

Only blocks of earlier rounds are looked at, so it cannot bias what is emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark.scheduling.round_times import RoundTimes
from dspark.types import DoubleArray, FloatArray

_NEWEST, _PROBE = 0.2, 0.5  # weight of the latest block in the usual one, at least
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 256  # rounds
_PRIOR = 4.0  # draft tokens' worth of belief in the confidences
_OUTCOMES = 64.0  # promised draft tokens that the yield is over
_BENEFIT = 0.7  # of the doubt: what is priced is known within so much
_AHEAD = 1  # positions beyond those that pay, so that it is seen when more do


@dataclass(slots=True)
class Prospect:
    """What blocks for one request have been worth. Belongs to its sequence."""

    usual: FloatArray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))  # survivals
    blocks: int = 0
    promised: float = _PRIOR  # draft tokens that should have stood, of those verified
    accepted: float = _PRIOR
    pause: int = _FIRST_PAUSE  # the next one
    rest: int = 0  # rounds that are left of the one under way
    left_out: bool = False  # of the round under way

    def see(self, survivals: FloatArray) -> None:  # [n]
        """Take in a block."""
        self.blocks += 1
        n = len(survivals)
        if n > len(self.usual):
            # What has not been seen yet is thought as good as what is before it.
            last = self.usual[-1:] if len(self.usual) else np.ones(1, dtype=np.float32)
            more = np.repeat(last, n - len(self.usual))
            self.usual = np.concatenate([self.usual, more])
        probe = self.pause > _FIRST_PAUSE
        weight = np.float32(max(_PROBE if probe else _NEWEST, 1.0 / self.blocks))
        self.usual[:n] += weight * (survivals - self.usual[:n])
        np.minimum.accumulate(self.usual, out=self.usual)

    def settle(self, promised: float, accepted: int) -> None:
        """Of its draft tokens that were verified, how many should have stood, and how many did."""
        self.promised += promised
        self.accepted += accepted
        if self.promised > _OUTCOMES:
            self.promised, self.accepted = 0.5 * self.promised, 0.5 * self.accepted


class DraftPolicy:
    """One a verifier. Asked once a round, while the gate is open."""

    def __init__(self, times: RoundTimes) -> None:
        self._times = times

    def sizes(
        self,
        prospects: Sequence[Prospect],
        size: int,  # most draft tokens of a block
        *,
        weights: DoubleArray | None = None,  # of a token of each
        most_blocks: int = 0,  # that can be had; 0: as many as are wanted
    ) -> list[int]:
        """Draft tokens to ask for, for each; 0: leave it out of this round."""
        requests = len(prospects)
        usual = np.ones((requests, size), dtype=np.float64)
        for row, prospect in zip(usual, prospects, strict=True):
            known = prospect.usual[:size]
            row[: len(known)] = known * (prospect.accepted / prospect.promised)
            row[len(known) :] = row[len(known) - 1] if len(known) else 1.0
        worth = usual if weights is None else usual * weights[:, None]
        row_price, block_price = self._prices(worth, weights, size)
        spare = worth - row_price  # falls along a row
        gain = np.maximum(spare, 0.0).sum(axis=1) - block_price
        wanted = np.minimum((spare > 0.0).sum(axis=1) + _AHEAD, size)
        chosen = np.zeros(requests, dtype=bool)
        for i, prospect in enumerate(prospects):
            chosen[i] = self._is_due(prospect, float(gain[i]))
        if most_blocks and chosen.sum() > most_blocks:
            order = np.argsort(np.where(chosen, -gain, np.inf), kind="stable")
            chosen[order[most_blocks:]] = False
        for prospect, taken in zip(prospects, chosen.tolist(), strict=True):
            prospect.left_out = not taken
        sizes: list[int] = np.where(chosen, wanted, 0).tolist()
        return sizes

    def _prices(
        self, worth: DoubleArray, weights: DoubleArray | None, size: int
    ) -> tuple[float, float]:
        """Of one more row, and one more block, in (weighted) tokens; with benefit of the doubt."""
        requests, times = len(worth), self._times
        step_ms = times.step_ms(requests, requests)
        row_ms = (times.step_ms(requests, 2 * requests) - step_ms) / requests
        whole_ms = times.draft_ms(requests, size)
        beside_ms = times.plain_ms(requests) - step_ms
        fewer = requests // 2
        fewer_ms = times.draft_ms(fewer, size) if fewer else beside_ms
        block_ms = max(0.0, whole_ms - fewer_ms) / (requests - fewer)
        base = float(requests if weights is None else weights.sum())
        # Θ of a round in which all blocks are verified as far as rows pay: found by one correction.
        per_ms = base / (step_ms + beside_ms)
        admitted = worth > per_ms * row_ms
        tokens = base + float(worth[admitted].sum())
        took_ms = step_ms + whole_ms + float(admitted.sum()) * row_ms
        per_ms = max(per_ms, tokens / took_ms)
        return _BENEFIT * per_ms * row_ms, _BENEFIT * per_ms * block_ms

    def _is_due(self, prospect: Prospect, gain: float) -> bool:
        """Whether this one takes part: it pays, is not known yet, or is to be looked at again."""
        if not prospect.blocks or gain > 0.0:
            prospect.pause, prospect.rest = _FIRST_PAUSE, 0
            return True
        if prospect.rest:
            prospect.rest -= 1
            return prospect.rest == 0
        prospect.rest = prospect.pause
        prospect.pause = min(2 * prospect.pause, _LONGEST_PAUSE)
        return False
