"""Algorithm 1 (paper §3.2): how many drafted tokens of each request to verify.

Over all requests of the step, admit draft tokens in descending survival while the expected
throughput Θ(B) = τ(B) · SPS(B) rises: τ starts at one token a request (the bonus), each admitted
token adds its survival to τ and one token to B.

The stop at the first token that does not raise Θ is what keeps `rejection` mode lossless. Whether
draft token k is admitted must not depend on its own value. Confidence c_k is computed before x_k is
drawn, but c_{k+1} is not: a search that looks past k for a better optimum lets x_k decide whether
it is itself verified (Appendix A: 0.85 where the target says 0.70). `search="global"` is that
search; it is allowed where the emitted token does not depend on the plan: greedy, and in `coupled`
mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from dspark.types import DoubleArray, FloatArray, IntArray

Search = Literal["causal", "global"]


def plan_lengths(
    survivals: Sequence[FloatArray],  # one [γ_r] a request, never increasing
    step_ms: Callable[[DoubleArray], DoubleArray],  # T(B): rounds with so many target tokens
    *,
    extra_tokens: int = 0,  # other target tokens in the same step, such as prefill
    max_draft_tokens: int = 0,  # ceiling known from an earlier step; 0: none
    search: Search = "causal",
) -> list[int]:
    """ℓ_r for each request."""
    if not survivals:
        return []
    requests, values = _descending(survivals)
    if max_draft_tokens:
        requests, values = requests[:max_draft_tokens], values[:max_draft_tokens]
    counts = np.arange(len(values) + 1, dtype=np.float64)
    expected = len(survivals) + np.concatenate([[0.0], np.cumsum(values)])
    tokens = len(survivals) + extra_tokens + counts
    admitted = best_count(expected / step_ms(tokens), search)
    lengths: list[int] = np.bincount(requests[:admitted], minlength=len(survivals)).tolist()
    return lengths


def best_count(
    throughput: DoubleArray,  # Θ with 0, 1, … draft tokens admitted
    search: Search,
) -> int:
    """Where the search stops."""
    if search == "global":
        return int(np.argmax(throughput))
    stops = np.flatnonzero(np.diff(throughput) <= 0.0)
    return int(stops[0]) if len(stops) else len(throughput) - 1


def _descending(survivals: Sequence[FloatArray]) -> tuple[IntArray, DoubleArray]:
    """Whose each draft token is, and its survival, by falling survival."""
    if len(survivals) == 1:  # sorted as it is
        return np.zeros(len(survivals[0]), dtype=np.int64), survivals[0].astype(np.float64)
    # Ties go by position, then request: a rule that no token's value enters.
    sizes = [len(a) for a in survivals]
    requests = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    values = np.concatenate(survivals).astype(np.float64)
    order = np.lexsort((requests, positions, -values))
    return requests[order], values[order]
