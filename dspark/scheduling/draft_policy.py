"""For which requests to draft, and how long a block: the gate's question, asked of each request.

The gate asks whether drafting pays for all requests together. Among them texts differ: code is
foreseen better than a chat at high temperature, and one request's text changes on its way. Here
each request is judged by what its own latest blocks were worth.

A round of τ tokens takes T, so a moment is worth Θ = τ / T tokens. One more row in the step costs
so many moments, and so does one more block. A block is worth what its positions bring above the
price of their rows, those that bring less not being verified, on the average of the latest; it
should be above the price of drafting it. Requests whose blocks are not are left out, for a while
that doubles each time, and then drafted for once, to see. Blocks end one position behind the last
that any of the latest blocks was worth.

Where only so many blocks can be had, they go to those that they bring most.

Only blocks of earlier rounds are looked at, so it cannot bias what is emitted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark.scheduling.round_times import RoundTimes
from dspark.types import DoubleArray, FloatArray

_LATEST = 8  # blocks that a request is judged by
_EVERY = 8  # rounds between judgements
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 256  # rounds
_PRIOR = 4.0  # draft tokens' worth of belief in the confidences
_OUTCOMES = 64.0  # promised draft tokens that the yield is over
_BENEFIT = 0.7  # of the doubt: what is priced is known within so much
_AHEAD = 1  # positions beyond those that were worth it, so that it is seen when more are


@dataclass(slots=True)
class Prospect:
    """What blocks for one request have been worth. Belongs to its sequence."""

    latest: deque[FloatArray] = field(default_factory=lambda: deque(maxlen=_LATEST))  # survivals
    promised: float = _PRIOR  # draft tokens that should have stood, of those verified
    accepted: float = _PRIOR
    gain: float = math.inf  # tokens that a block brings above its price; not known yet
    length: int = 0  # draft tokens that may be worth it; 0: not known yet
    pause: int = _FIRST_PAUSE  # the next one
    rest: int = 0  # rounds that are left of the one under way
    left_out: bool = False  # of the round under way

    def see(self, survivals: FloatArray) -> None:  # [n]
        """Take in a block."""
        if self.pause > _FIRST_PAUSE:
            # It was left out: what its text was like then says little of what it is now.
            while len(self.latest) > 1:
                self.latest.popleft()
        self.latest.append(survivals)

    def settle(self, promised: float, accepted: int) -> None:
        """Of its draft tokens that were verified, how many should have stood, and how many did."""
        self.promised += promised
        self.accepted += accepted
        if self.promised > _OUTCOMES:
            self.promised, self.accepted = 0.5 * self.promised, 0.5 * self.accepted

    def blocks(self, size: int) -> DoubleArray:  # [n, size]
        """The latest blocks as they turned out; nothing where they were shorter."""
        out = np.zeros((len(self.latest), size))
        for row, block in zip(out, self.latest, strict=True):
            row[: len(block)] = block[:size]
        return out * (self.accepted / self.promised)


class DraftPolicy:
    """One a verifier. Asked once a round, while the gate is open."""

    def __init__(self, times: RoundTimes) -> None:
        self._times = times
        self._rounds = 0

    def sizes(
        self,
        prospects: Sequence[Prospect],
        size: int,  # most draft tokens of a block
        *,
        weights: DoubleArray | None = None,  # of a token of each
        most_blocks: int = 0,  # that can be had; 0: as many as are wanted
    ) -> list[int]:
        """Draft tokens to ask for, for each; 0: leave it out of this round."""
        probed = any(p.pause > _FIRST_PAUSE and not p.left_out for p in prospects)
        if self._rounds % _EVERY == 0 or probed:
            self._judge(prospects, size, weights)
        self._rounds += 1
        for prospect in prospects:
            prospect.left_out = not _takes_part(prospect)
        if most_blocks:
            taken = [p for p in prospects if not p.left_out]
            taken.sort(key=lambda p: p.gain, reverse=True)
            for prospect in taken[most_blocks:]:
                prospect.left_out = True
        return [0 if p.left_out else min(p.length or size, size) for p in prospects]

    def _judge(self, prospects: Sequence[Prospect], size: int, weights: DoubleArray | None) -> None:
        known = [i for i, prospect in enumerate(prospects) if prospect.latest]
        if not known:
            return
        weight = np.ones(len(prospects)) if weights is None else weights
        blocks = [weight[i] * prospects[i].blocks(size) for i in known]
        worth = float(sum(block.mean(axis=0).sum() for block in blocks)) / len(known)
        row_price, block_price = self._prices(len(prospects), float(weight.sum()), worth, size)
        for i, block in zip(known, blocks, strict=True):
            spare = np.maximum(block - row_price, 0.0)
            prospects[i].gain = float(spare.sum()) / len(block) - block_price
            prospects[i].length = min(size, int(np.count_nonzero(spare.any(axis=0))) + _AHEAD)

    def _prices(self, requests: int, weight: float, worth: float, size: int) -> tuple[float, float]:
        """Of one more row, and one more block, in (weighted) tokens; with benefit of the doubt.

        `weight`: of one token of each request; `worth`: of a whole block, on the average.
        """
        times = self._times
        step_ms, plain_ms = times.step_ms(requests, requests), times.plain_ms(requests)
        whole_ms = times.draft_ms(requests, size)
        fewer = requests // 2
        fewer_ms = times.draft_ms(fewer, size) if fewer else plain_ms - step_ms
        block_ms = max(0.0, whole_ms - fewer_ms) / (requests - fewer)
        # Rows are many at a time, so they are priced at the mean of what they cost.
        rows = requests * (1 + size)
        row_ms = (times.step_ms(requests, rows) - step_ms) / (requests * size)
        drafted = (weight + requests * worth) / (times.step_ms(requests, rows) + whole_ms)
        per_ms = max(weight / plain_ms, drafted)
        return _BENEFIT * per_ms * row_ms, _BENEFIT * per_ms * block_ms


def _takes_part(prospect: Prospect) -> bool:
    """Whether it pays, is not known yet, or is to be looked at again."""
    if prospect.gain > 0.0:
        prospect.pause, prospect.rest = _FIRST_PAUSE, 0
        return True
    if prospect.rest:
        prospect.rest -= 1
        return prospect.rest == 0
    prospect.rest = prospect.pause
    prospect.pause = min(2 * prospect.pause, _LONGEST_PAUSE)
    return False
