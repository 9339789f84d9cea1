"""Whether drafting pays at all (promise: never slower than without).

Algorithm 1 sees the block when it has been paid for, and can only trim. Under a load where nothing
of a block is worth verifying, the drafting itself is the loss. The gate asks what rounds with
blocks like the latest ones would bring at the load at hand, drafting included, and compares with
rounds without. What it knows of blocks holds at every load; what it knows of times, it learns by
load, and a load that it has not seen is tried.

While it is closed, a few rounds in a row are drafted now and then, since texts change and machines
do: the first rounds after a start are often slow. Pauses double until the time that this takes is a
small share.

It looks at blocks of the past only, never at the one at hand, so it cannot bias what is emitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dspark.scheduling.planner import plan_lengths
from dspark.scheduling.round_times import RoundTimes
from dspark.types import FloatArray

_BLOCKS = 128  # remembered
_SAMPLES = 16  # rounds that are imagined for an estimate
_EVERY = 16  # rounds between estimates
_PROBE_ROUNDS = 3  # in a row, so that what only the first of them suffers from does not count
_PROBE_SHARE = 0.004  # of the time, spent on probing in the long run
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 2048  # rounds
_LEAST_GAIN = 1.0
_CLOSE_BELOW = 0.995  # hysteresis: an open gate is closed by less than this


class DraftGate:
    """Open: blocks are asked for. One gate a verifier, asked once a round."""

    def __init__(self, times: RoundTimes) -> None:
        self._times = times
        self._blocks: deque[FloatArray] = deque(maxlen=_BLOCKS)
        self._paying = True
        self._requests = 0  # of the last estimate
        self._age = 0  # rounds since
        self._pause = _FIRST_PAUSE  # the next one
        self._rest = 0  # rounds that are left of the pause under way
        self._probe = 0  # and of the probe after it

    def record(self, survivals: Sequence[FloatArray]) -> None:
        """Blocks that were drafted."""
        self._blocks.extend(survivals)

    def open(self, requests: int) -> bool:
        """Whether to draft for a coming round of `requests` requests."""
        if not self._blocks or not self._times.drafting_known(requests):
            return True
        self._age += 1
        probed = not self._paying and self._rest == 0 and self._probe == 0
        if probed or requests != self._requests or self._age >= _EVERY:
            self._requests, self._age = requests, 0
            gain = self.gain(requests)
            self._paying = gain > (_CLOSE_BELOW if self._paying else _LEAST_GAIN)
        if self._paying:
            self._pause, self._rest, self._probe = _FIRST_PAUSE, 0, 0
            return True
        if self._rest == 0 and self._probe == 0:
            self._rest, self._probe = self._pause, _PROBE_ROUNDS
            cost = self._times.draft_ms(requests) / self._times.plain_ms(requests)
            enough = _PROBE_ROUNDS * cost / _PROBE_SHARE
            self._pause = int(min(2 * self._pause, max(enough, _FIRST_PAUSE), _LONGEST_PAUSE))
        if self._rest:
            self._rest -= 1
            return False
        self._probe -= 1
        return True

    def gain(self, requests: int) -> float:
        """Expected tokens a second with drafting, over those without."""

        def round_ms(tokens: int) -> float:
            return self._times.round_ms(requests, tokens)

        blocks = list(self._blocks)
        committed = took_ms = 0.0
        for sample in range(max(1, min(_SAMPLES, len(blocks) // requests))):
            # The latest come first; few blocks stand for many requests by coming again.
            chosen = [blocks[-1 - (sample * requests + r) % len(blocks)] for r in range(requests)]
            lengths = plan_lengths(chosen, round_ms)
            pairs = zip(chosen, lengths, strict=True)
            committed += requests + sum(float(block[:n].sum()) for block, n in pairs)
            took_ms += round_ms(requests + sum(lengths))
        return (committed / took_ms) / (requests / self._times.plain_ms(requests))
