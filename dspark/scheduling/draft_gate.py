"""Whether drafting pays at all, and how long a block (promise: never slower than without).

Algorithm 1 sees the block when it has been paid for, and can only trim. Under a load where little
of a block is worth verifying, the drafting itself is the loss. The gate asks what rounds with
blocks like the latest ones would bring at the load at hand, drafting included, for each length that
it might ask for, and compares with rounds without. What it knows of blocks holds at every load;
what it knows of times, it learns by load, and guesses a load that it has not seen from others. Such
a guess is soon put to the test, both ways.

While it is closed, drafting is tried now and then (dspark.scheduling.closed_load), at each load for
itself, since loads come and go.

While it is open, every so often another length is asked for than the best, and nothing at all, for
the same reason: what a round without drafts takes is half of every comparison.

It looks at blocks of the past only, never at the one at hand, so it cannot bias what is emitted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dspark.scheduling.closed_load import DOUBT, LEAST_GAIN, LONGEST_PAUSE, PROBE_WIDTH, ClosedLoad
from dspark.scheduling.planner import Search, best_count
from dspark.scheduling.round_times import RoundTimes, load_of
from dspark.types import DoubleArray, FloatArray

_BLOCKS = 128  # remembered
_EVERY = 32  # rounds between estimates, or as many as take so long, where they are short
_EVERY_MS = 100.0
_GRAIN = 16  # prompt tokens that capacities are told apart by
_EXPLORE = 64  # rounds at least between those that are run to learn of other lengths, or of none
_EXPLORE_SHARE = 0.003  # of the time, spent on each of the two at most
_NONE_ROUNDS = 4  # without drafts in a row: the first is not like others
_FIRST_LOOK = 6  # rounds before the first of those at a load
_LOOK_GROWTH = 4  # and before each further one, until they are as far apart as their cost wants
_OTHER_ROUNDS = 2  # of another length in a row, for the same reason
# Gain over verifying whole blocks, from which they are trimmed: more than times may be wrong by.
_LEAST_TRIMMING = 1.005  # where steps are padded to sizes, and those were measured
_LEAST_TRIMMING_BETWEEN = 1.02  # where they are read off lines between lengths that were measured
_CLOSE_BELOW = 0.995  # hysteresis: an open gate is closed by less than this
_BETTER = 1.005  # another length replaces the one in use if it brings this much more
_USUAL_WEIGHT = 0.05  # of the latest round
_OUTCOMES = 256.0  # accepted tokens that the yield is over
_TINY = np.float32(1e-30)
_PRIOR = 16.0  # tokens' worth of belief in the confidences


class DraftGate:
    """Asked once a round how long the next blocks should be. One gate a verifier."""

    def __init__(self, times: RoundTimes) -> None:
        self._times = times
        self._latest: list[Sequence[FloatArray]] = []  # rounds that are yet to be looked at
        self._blocks = np.ones((0, 0), dtype=np.float32)  # survivals, the latest last
        self._usual = np.ones(0, dtype=np.float32)  # chance of each position, given the one before
        self._promised = self._accepted = _PRIOR  # of draft tokens that were verified
        self._size = 0  # that pays best; 0: none pays
        self._guessed = False  # what rounds with such blocks take
        self._fresh = False  # and it was made since the last round
        self._best = 0  # that loses least
        self._gains: dict[int, float] = {}  # by lengths, of the last estimate
        self._hope = 0.0  # the most, were drafting as cheap as at smaller loads
        self._doubt = 0.0  # or rounds with blocks not as dear as they seem
        self._requests = 0  # of the last estimate
        self._rounds = 0  # since the start
        self._age = 0  # rounds since the last estimate
        self._every = _EVERY
        self._capacities: dict[tuple[int, int, int], int] = {}  # found since a certain round
        self._capacities_from = 0
        self._since_none = self._since_other = 0  # rounds since some were run to learn
        self._turn = 0  # which length is the next to learn of
        self._looking = False  # rounds without drafts are run to learn
        self._other = self._others = 0  # that is learnt of now, and for how many rounds yet
        self._looks: defaultdict[int, int] = defaultdict(int)  # by load: runs without drafts so far
        self._closed: defaultdict[int, ClosedLoad] = defaultdict(ClosedLoad)  # by load
        self.width: int | None = None  # requests that the next blocks are for; None: all
        self.planning_ms = 0.0  # that a step waits for where not all of its blocks are verified

    def record(self, survivals: Sequence[FloatArray]) -> None:
        """Blocks that were drafted in one round. Looked at when an estimate is made."""
        self._latest.append(survivals)

    def _take_in(self) -> None:
        """What short blocks do not say is taken from the usual."""
        rounds, latest = len(self._latest), [block for one in self._latest for block in one]
        self._latest.clear()
        weight = 1.0 - (1.0 - _USUAL_WEIGHT) ** rounds
        for length in sorted({len(block) for block in latest}, reverse=True):
            blocks = np.stack([block for block in latest if len(block) == length])
            before = np.pad(blocks[:, :-1], ((0, 0), (1, 0)), constant_values=1.0)
            chances = blocks / np.maximum(before, _TINY)  # a long block's survival may underflow
            found = chances[blocks[:, 0] > 0.0]  # others were none, for one reason or another
            seen = found.mean(axis=0) if len(found) else np.zeros(length, dtype=np.float32)
            if length > len(self._usual):
                self._usual = np.append(self._usual, seen[len(self._usual) :])
                self._blocks = np.ones((0, length), dtype=np.float32)  # once or twice, at the start
            if len(found):
                self._usual[:length] += weight * (seen - self._usual[:length])
            tail = np.cumprod(self._usual[length:])
            whole = np.concatenate([blocks, blocks[:, -1:] * tail], axis=1)
            self._blocks = np.concatenate([self._blocks, whole])[-_BLOCKS:]

    def settle(self, promised: float, accepted: int) -> None:
        """Of the draft tokens of one step, how many should have survived, and how many did."""
        self._promised += promised
        self._accepted += accepted
        if self._accepted > _OUTCOMES:
            self._promised, self._accepted = 0.5 * self._promised, 0.5 * self._accepted

    @property
    def rest(self) -> int:
        """Rounds until blocks are asked for again; 0 while they are.

        Many in those that are run to learn of rounds without: these send no context ahead either.
        """
        if self._looking:
            return LONGEST_PAUSE
        return 0 if self._size else self._closed[load_of(self._requests)].rest

    @property
    def _known(self) -> bool:
        """Whether there is anything to judge by."""
        return bool(len(self._blocks) or self._latest) and self._times.drafting_known

    @property
    def _gain(self) -> float:
        """With the length that loses least."""
        return self._gains.get(self._best, 1.0)

    @property
    def usual_size(self) -> int:
        """Draft tokens of a block as they pay best; another length is asked for to learn."""
        return self._size

    @property
    def open(self) -> bool:
        """Whether blocks are asked for other than to probe: they pay, or nothing is known yet."""
        return self._size > 0 or not self._known

    def would_pay(
        self, requests: int, most: int, latency_ms: float = 0.0, search: Search = "global"
    ) -> bool:
        """Whether blocks should pay at this load by what is known, though none can be had now."""
        sizes = lengths(most)
        return not self._known or any(
            self.gain(requests, size, latency_ms, search) > LEAST_GAIN for size in sizes
        )

    def block_size(self, requests: int, most: int) -> int:
        """Tokens to draft for each of `requests` requests, or `width` of them, at most `most`.

        0: none, now; `width` is then that of the blocks that come after `rest` rounds.
        """
        self.width, self._looking = None, False
        if not self._known:
            return most
        if self.due(requests):
            self.estimate(requests, most)
        fresh, self._fresh = self._fresh, False
        self._rounds += 1
        self._age += 1
        load = load_of(requests)
        closed = self._closed[load]
        if self._size:
            if closed.open():
                del self._closed[load]
            # A round that an estimate has made longer is none to learn from.
            return min(self._size, most) if fresh else self._another(most)
        closed.round()
        if closed.rest == 0 and closed.probe == 0:
            self._pause(closed, requests, most)
        self.width = PROBE_WIDTH if closed.narrow else None
        return closed.size(min(self._best or most, most), most)

    def due(self, requests: int) -> bool:
        """Whether the next `block_size` wants another estimate first."""
        if not self._known:
            return False
        closed = self._closed[load_of(requests)]
        learns = self._size or not (closed.rest or closed.probe)
        timed = self._guessed and self._times.knows_length(requests, self._size)
        return bool((learns and self._age + 1 >= self._every) or timed or self._elsewhere(requests))

    def estimate(
        self, requests: int, most: int, latency_ms: float = 0.0, search: Search = "global"
    ) -> None:
        """Judge anew which blocks pay, where that is `due`. It takes as long as some rounds do.

        `latency_ms`: how long after they are asked for blocks come, if other steps may run
        meanwhile. `search`: as the blocks will be planned.
        """
        if self._elsewhere(requests) and not self._looks[load_of(requests)]:
            self._since_none = min(self._since_none, _FIRST_LOOK)  # or a look would be cut short
        self._requests, self._age, self._fresh = requests, 0, True
        self._every = max(_EVERY, round(_EVERY_MS / self._times.plain_ms(requests)))
        self._take_in()
        self._compare(requests, most, latency_ms, search)

    def _elsewhere(self, requests: int) -> bool:
        """Whether this is another load than that of the last estimate."""
        return not self._gains or load_of(requests) != load_of(self._requests)

    def _pause(self, closed: ClosedLoad, requests: int, most: int) -> None:
        times, plain_ms = self._times, self._times.plain_ms(requests)
        few_ms = times.few_ms(requests)
        closed.begin(
            requests,
            times.draft_ms(requests, most) / plain_ms,
            None if few_ms is None else few_ms / plain_ms,
            known=times.knows_drafting(requests),
            gain=self._gain,
            hope=self._hope,
            doubt=self._doubt,
        )

    def _another(self, most: int) -> int:
        """While open: the best length but for rounds that are run to learn."""
        best, gain = min(self._size, most), max(self._gain, LEAST_GAIN)
        self._since_none += 1
        self._since_other += 1
        load = load_of(self._requests)
        # What the first rounds of a load say of none is the table's word, and what a single look
        # does may be an odd moment's.
        none_from = min(
            _FIRST_LOOK * _LOOK_GROWTH ** self._looks[load],
            _apart(_NONE_ROUNDS * (1.0 - 1.0 / gain)),
        )
        if self._since_none > none_from:
            if self._since_none >= none_from + _NONE_ROUNDS:
                self._since_none, self._age = 0, self._every  # to be judged by what they showed
                self._looks[load] += 1
            self._looking = True
            return 0
        if self._others:
            self._others -= 1
            return min(self._other, most)
        sizes = lengths(most)
        # Only whole blocks say what later positions are worth.
        other = sizes[self._turn // 2 % len(sizes)] if self._turn % 2 else most
        if self._since_other <= _apart(_OTHER_ROUNDS * (1.0 - self._gains.get(other, gain) / gain)):
            return best
        self._since_other = 0
        self._turn += 1
        self._other, self._others = other, _OTHER_ROUNDS - 1
        return other

    def _compare(self, requests: int, most: int, latency_ms: float, search: Search) -> None:
        gains = {size: self.gain(requests, size, latency_ms, search) for size in lengths(most)}
        if not self._times.knows_drafting(requests):
            self._hope = max(
                self.gain(requests, size, latency_ms, search, grows=False) for size in gains
            )
        best = max(gains, key=lambda size: gains[size])
        if gains.get(self._size, 0.0) * _BETTER > gains[best]:
            best = self._size
        self._best, self._gains = best, gains
        self._size = best if gains[best] > (_CLOSE_BELOW if self._size else LEAST_GAIN) else 0
        self._guessed = self._size > 0 and not self._times.knows_length(requests, self._size)
        if not self._size:
            self._doubt = max(
                self.gain(requests, size, latency_ms, search, doubt=DOUBT) for size in gains
            )

    def gain(
        self,
        requests: int,
        size: int,
        latency_ms: float = 0.0,
        search: Search = "global",
        *,
        grows: bool = True,
        doubt: float = 0.0,
    ) -> float:
        """Expected tokens a second with blocks of `size` tokens, over those without.

        `grows`: what drafting takes, with the load, beyond the largest where it is known. `doubt`:
        share of what rounds with blocks take more than those without, that they do not take.

        Draft tokens are admitted by survival, as Algorithm 1 does, from all remembered blocks as
        one: that is what many requests do on the average.
        """
        tokens, committed, took_ms = self._rounds_of(requests, size, grows=grows)
        best = self._best_count(committed / took_ms, search)
        least_ms = float(took_ms[best])
        if latency_ms:
            halved = self._times.overlapped_ms(requests, float(tokens[best]), size, latency_ms)
            least_ms = min(least_ms, halved)
        plain_ms = self._times.plain_ms(requests)
        least_ms -= doubt * max(0.0, least_ms - plain_ms)
        gain = float(committed[best]) / least_ms / (requests / plain_ms)
        # If no token is worth verifying, what seems a gain is one of the times' own errors.
        return gain if best else min(gain, LEAST_GAIN)

    def capacity(self, requests: int, size: int, extra_tokens: int = 0) -> int | None:
        """Draft tokens worth verifying beside `extra_tokens`; None: nothing is known yet.

        From blocks of earlier rounds alone, whatever dents Θ has: ask before `record` is given
        those at hand. All that there are, unless trimming gains more than times may be wrong by.
        """
        if not self._known:
            return None
        if self._rounds - self._capacities_from >= self._every:
            self._capacities.clear()
            self._capacities_from = self._rounds
        if not self._times.table.padded:  # prompts are of any length: one that is near will do
            extra_tokens = -(-extra_tokens // _GRAIN) * _GRAIN
        asked = (requests, size, extra_tokens)
        if asked not in self._capacities:
            _, committed, took_ms = self._rounds_of(requests, size, extra_tokens)
            took_ms[:-1] += self.planning_ms
            best = self._best_count(committed / took_ms, "global")
            self._capacities[asked] = round(best / len(self._blocks) * requests)
        return self._capacities[asked]

    def _best_count(self, throughput: DoubleArray, search: Search) -> int:
        """Draft tokens that are admitted: all, or where the search stops if trimming pays."""
        best = best_count(throughput, "global")
        least = _LEAST_TRIMMING if self._times.table.padded else _LEAST_TRIMMING_BETWEEN
        if throughput[best] <= least * throughput[-1]:
            return len(throughput) - 1
        return best_count(throughput, search)

    def _rounds_of(
        self, requests: int, size: int, extra_tokens: int = 0, *, grows: bool = True
    ) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
        """Target tokens, tokens committed and ms of rounds, by draft tokens that are admitted.

        As many for each request as one of the remembered blocks is to all of them.
        """
        if not len(self._blocks):
            self._take_in()
        blocks = self._blocks[:, :size]
        survivals = np.sort(blocks, axis=None)[::-1].astype(np.float64)
        tokens = requests * (1.0 + np.arange(len(survivals) + 1) / len(blocks)) + extra_tokens
        accepted = np.concatenate([[0.0], np.cumsum(survivals)]) / len(blocks)
        committed = requests * (1.0 + accepted * (self._accepted / self._promised))
        return tokens, committed, self._times.round_ms(requests, tokens, size, grows=grows)


def _apart(cost: float) -> int:
    """Rounds between those that are run to learn, if they lose so many."""
    return max(_EXPLORE, round(cost / _EXPLORE_SHARE))


def lengths(most: int) -> list[int]:
    """Draft tokens of blocks that are worth telling apart, up to `most`."""
    return [size for size in (1, 2, 3, 5, 7, 10, 15) if size < most] + [most]
