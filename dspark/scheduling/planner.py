"""How many drafted tokens of each request to verify (paper §3.2, Algorithm 1, and §5.2).

Draft tokens are admitted by falling survival, times the weight of their request where requests are
not alike. What is sought is the number B of target tokens at which the expected throughput
Θ(B) = τ(B) · SPS(B) is largest: τ starts at one token a request (the bonus), each admitted token
adds its survival to τ and one token to B.

Whether draft token k is admitted must not depend on its own value. Confidence c_k is computed
before x_k is drawn, but c_{k+1} is not: a search that looks past k for a better optimum lets x_k
decide whether it is itself verified (Appendix A: 0.85 where the target says 0.70). So there are
three searches:

- `causal`, Algorithm 1: stop at the first token that does not raise Θ;
- `ranked`: admit as many as an earlier step's blocks said (`capacity`), whatever Θ is. Survivals at
  hand only say which. It needs no Θ without dents, which padded shapes do not give;
- `global`: the best of all. Only where the emitted token does not depend on what is verified:
  greedy, and in `coupled` mode.

A request may have a floor: tokens that it should commit in this step. The prefix that is expected
to bring them is reserved before anything else is admitted. Position k is reserved if the positions
before it fall short, which is known before x_k is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dspark.scheduling.survival import ABSENT
from dspark.types import DoubleArray, FloatArray, IntArray

_FEW = 48  # draft tokens in all, up to which numpy costs more than it saves

Search = Literal["causal", "ranked", "global"]
# T(B) of rounds with the first, …, the second number of target tokens.
RoundsMs = Callable[[int, int], DoubleArray]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to verify, and what should come of it."""

    lengths: list[int]  # ℓ_r
    promised: list[float]  # draft tokens of each request that should be accepted
    round_ms: float  # that the round should take

    @property
    def expected(self) -> float:
        """Tokens that the step should commit, bonus tokens included."""
        return len(self.lengths) + sum(self.promised)

    @property
    def throughput(self) -> float:
        """Θ: expected tokens a second."""
        return 1e3 * self.expected / self.round_ms


def plan_lengths(
    survivals: FloatArray,  # [R, γ], never increasing along a row; ABSENT past a block's end
    rounds_ms: RoundsMs,
    *,
    extra_tokens: int = 0,  # other target tokens in the same step, such as prefill
    ceiling: int | None = None,  # on draft tokens, known from an earlier step
    search: Search = "causal",
    weights: DoubleArray | None = None,  # [R] of a token of each request; None: all alike
    reserved: IntArray | None = None,  # [R] tokens that are admitted first; together ≤ ceiling
) -> Plan:
    """ℓ_r for each request. Equal inputs give equal plans; ties go by position, then request."""
    requests, width = survivals.shape
    ask = _Ask(rounds_ms, requests + extra_tokens, ceiling, search)
    if survivals.size <= _FEW:
        return _plan_few(survivals, ask, weights, reserved)
    keys = survivals if weights is None else survivals * weights[:, None].astype(np.float32)
    worth = float(requests if weights is None else weights.sum())
    first = np.zeros(requests, dtype=np.int64) if reserved is None else reserved
    held = int(first.sum())
    if held:
        is_held = np.arange(width) < first[:, None]
        worth += float(keys[is_held].sum(dtype=np.float64))
        keys = np.where(is_held, ABSENT, keys)
    values = _falling(keys)
    if ceiling is not None:
        values = values[: max(0, ceiling - held)]
    admitted, round_ms = ask.admit(held, worth, values)
    lengths = first + _best(keys, values, admitted)
    chosen = np.arange(width) < lengths[:, None]
    promised = (survivals * chosen).sum(axis=1)
    return Plan(lengths.tolist(), promised.tolist(), round_ms)


@dataclass(frozen=True, slots=True)
class _Ask:
    """What is asked of a search, but for the draft tokens themselves."""

    rounds_ms: RoundsMs
    base: int  # target tokens without any draft token
    ceiling: int | None
    search: Search

    def admit(
        self,
        held: int,  # draft tokens that are admitted already
        worth: float,  # of them, and of the bonus tokens
        values: FloatArray,  # of the others, falling
    ) -> tuple[int, float]:
        """How many of the others are admitted, and how long the round should take."""
        if self.search == "ranked":
            return self._all(held, len(values))
        base = self.base + held
        times = self.rounds_ms(base, base + len(values))
        worths = np.empty(len(values) + 1)
        worths[0] = worth
        np.cumsum(values, out=worths[1:], dtype=np.float64)
        worths[1:] += worth
        admitted = best_count(worths / times, self.search)
        return admitted, float(times[admitted])

    def admit_few(self, held: int, worth: float, values: list[float]) -> tuple[int, float]:
        """The same, without numpy."""
        if self.search == "ranked":
            return self._all(held, len(values))
        base = self.base + held
        times = self.rounds_ms(base, base + len(values)).tolist()
        admitted, highest, gained = 0, worth / times[0], 0.0
        for count, value in enumerate(values, 1):
            gained += value
            throughput = (worth + gained) / times[count]
            if throughput > highest:
                admitted, highest = count, throughput
            elif self.search == "causal":
                break
        return admitted, times[admitted]

    def _all(self, held: int, others: int) -> tuple[int, float]:
        tokens = self.base + held + others
        return others, float(self.rounds_ms(tokens, tokens)[0])


def _plan_few(
    survivals: FloatArray, ask: _Ask, weights: DoubleArray | None, reserved: IntArray | None
) -> Plan:
    """The same, where calls of numpy would cost more than they do."""
    rows: list[list[float]] = survivals.tolist()
    weight = [1.0] * len(rows) if weights is None else weights.astype(np.float32).tolist()
    lengths = [0] * len(rows) if reserved is None else reserved.tolist()
    others = []
    worth = float(sum(weight))
    for r, (row, of_request, held) in enumerate(zip(rows, weight, lengths, strict=True)):
        worth += of_request * sum(row[:held])
        for position, survival in enumerate(row[held:]):
            if survival < 0.0:
                break
            others.append((-of_request * survival, position + held, r))
    others.sort()  # ties go by position, then request
    held = sum(lengths)
    if ask.ceiling is not None:
        del others[max(0, ask.ceiling - held) :]
    admitted, round_ms = ask.admit_few(held, worth, [-key for key, _, _ in others])
    for _, _, r in others[:admitted]:
        lengths[r] += 1
    promised = [sum(row[:n]) for row, n in zip(rows, lengths, strict=True)]
    return Plan(lengths, promised, round_ms)


def reserve(
    survivals: FloatArray,  # [R, γ], as above
    wanted: DoubleArray,  # [R] accepted draft tokens that a floor asks for; 0: it has none
    rank: DoubleArray,  # [R] whose floor goes first when there is too little: larger before smaller
    ceiling: int | None = None,
) -> IntArray:
    """Prefixes [R] that should bring `wanted`, as far as they can."""
    present = np.maximum(survivals, 0.0)
    before = np.cumsum(present, axis=1, dtype=np.float64) - present
    lengths: IntArray = np.count_nonzero((survivals > ABSENT) & (before < wanted[:, None]), axis=1)
    if ceiling is not None and lengths.sum() > ceiling:
        order = np.lexsort((np.arange(len(rank)), -rank))
        taken = np.cumsum(lengths[order]) - lengths[order]
        lengths[order] = np.clip(ceiling - taken, 0, lengths[order])
    return lengths


def best_count(
    throughput: DoubleArray,  # Θ with 0, 1, … draft tokens admitted
    search: Search,
) -> int:
    """Where a search over Θ stops."""
    if search == "global":
        return int(np.argmax(throughput))
    stops = throughput[1:] <= throughput[:-1]
    first = int(np.argmax(stops)) if len(stops) else 0
    return first if len(stops) and stops[first] else len(throughput) - 1


def _falling(keys: FloatArray) -> FloatArray:
    """All of them but ABSENT ones, the largest first."""
    values = np.sort(keys, axis=None)
    return values[np.searchsorted(values, 0.0) :][::-1]


def _best(keys: FloatArray, values: FloatArray, count: int) -> IntArray:
    """How many of each row are among the `count` largest; `values` is all of them, falling."""
    if not count:
        return np.zeros(len(keys), dtype=np.int64)
    least = values[count - 1]
    lengths: IntArray = np.count_nonzero(keys > least, axis=1)
    ties = count - int(lengths.sum())
    _, rows = np.nonzero((keys == least).T)  # position by position, in each by request
    lengths += np.bincount(rows[:ties], minlength=len(keys))
    return lengths
