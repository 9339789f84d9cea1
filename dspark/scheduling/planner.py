"""Algorithm 1 (paper §3.2): how many drafted tokens of each request to verify.

Over all requests of the step, admit draft tokens in descending survival while the expected
throughput Θ(B) = τ(B) · SPS(B) rises: τ starts at one token a request (the bonus), each admitted
token adds its survival to τ and one token to B.

The stop at the first token that does not raise Θ is what keeps `rejection` mode lossless. Whether
draft token k is admitted must not depend on its own value. Confidence c_k is computed before x_k is
drawn, but c_{k+1} is not: a search that looks past k for a better optimum lets x_k decide whether
it is itself verified (Appendix A: 0.85 where the target says 0.70). `search="global"` is that
search; it is allowed in `coupled` mode only, where the emitted token does not depend on the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from dspark.types import FloatArray

Search = Literal["causal", "global"]


def plan_lengths(
    survivals: Sequence[FloatArray],  # one [γ_r] a request, never increasing
    step_ms: Callable[[int], float],  # T(B): time of a round with B target tokens
    *,
    extra_tokens: int = 0,  # other target tokens in the same step, such as prefill
    max_draft_tokens: int = 0,  # ceiling known from an earlier step; 0: none
    search: Search = "causal",
) -> list[int]:
    """ℓ_r for each request."""
    lengths = [0] * len(survivals)
    if not survivals:
        return lengths
    order = _descending(survivals)
    if max_draft_tokens:
        order = order[:max_draft_tokens]
    base = len(survivals) + extra_tokens
    expected = float(len(survivals))
    best = expected / step_ms(base)
    admitted = 0
    for count, (request, position) in enumerate(order, start=1):
        expected += float(survivals[request][position])
        throughput = expected / step_ms(base + count)
        if throughput > best:
            best, admitted = throughput, count
        elif search == "causal":
            break
    for request, position in order[:admitted]:
        lengths[request] = position + 1
    return lengths


def _descending(survivals: Sequence[FloatArray]) -> list[tuple[int, int]]:
    # Ties go by position, then request: a rule that no token's value enters.
    requests = np.concatenate([np.full(len(a), r) for r, a in enumerate(survivals)])
    positions = np.concatenate([np.arange(len(a)) for a in survivals])
    values = np.concatenate([np.asarray(a, dtype=np.float64) for a in survivals])
    order = np.lexsort((requests, positions, -values))
    return [(int(requests[i]), int(positions[i])) for i in order]
