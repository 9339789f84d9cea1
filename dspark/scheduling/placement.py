"""Which verifier takes a request: marginal throughput, after prefix affinity. Pure.

A verifier that runs R requests makes Θ(R) = R·τ / T(R, R·q, C) tokens a second: τ tokens that a
request commits in a step and q rows that it takes there, both by its reports, over the step time of
its table at their mean context C. One more request adds Θ(R+1) - Θ(R). Steps that are padded make Θ
a saw; what is added is read from the least concave curve above it, so that it never rises with R:
a verifier does not become less attractive by having fewer requests.

A prompt that begins like one that a verifier was given before is computed there from where they
part. That verifier is chosen if what prefill saves, tokens × ms a token, is more than what the
request loses by slower steps, until as many tokens as are likely have come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from dspark.scheduling.step_means import StepMeans
from dspark.scheduling.step_table import StepTimeTable

_MOST_REQUESTS = 256  # on a curve; more add what the last of them does
_PREFILL_ROWS = 256  # of a prompt in one step, by which the time of one is judged
_ALIKE = 0.2  # of the largest gain: τ is of the traffic, too, and differs so much by chance
_LIKELY_TOKENS = 128  # of an answer, unless it may have fewer
_FURTHER = 8  # requests that a verifier may have more than the best one, for a prefix
_FURTHER_BLINDLY = 1  # the same where step times are not known


@dataclass(frozen=True, slots=True)
class Curve:
    """A verifier by how many requests it runs."""

    gains: tuple[float, ...]  # tokens/s that the first, second, … of them adds; never rising
    token_ms: tuple[float, ...]  # between two tokens of one of them; never falling
    prefill_ms: float  # of one prompt token

    @classmethod
    def of(cls, table: StepTimeTable, means: StepMeans, most_requests: int) -> Curve:
        """For 1 to `most_requests` requests."""
        sizes = range(1, max(1, min(most_requests, _MOST_REQUESTS)) + 1)
        times = table.at(means.context)
        # A table is monotone at equal rows a request, and may not be where steps are padded.
        step_ms = list(accumulate((times.ms(r, r * means.rows) * means.slow for r in sizes), max))
        throughput = [r * means.committed / ms * 1e3 for r, ms in zip(sizes, step_ms, strict=True)]
        prompt_ms = (times.ms(1, 1 + _PREFILL_ROWS) - times.ms(1, 1)) * means.slow
        return cls(
            gains=_concave_steps([0.0, *throughput]),
            token_ms=tuple(ms / means.committed for ms in step_ms),
            prefill_ms=prompt_ms / _PREFILL_ROWS,
        )

    def gain(self, requests: int) -> float:
        """What one more adds to so many, in tokens/s."""
        return self.gains[min(requests, len(self.gains) - 1)]

    def wait_ms(self, requests: int) -> float:
        """Between two tokens of one more beside so many."""
        return self.token_ms[min(requests, len(self.token_ms) - 1)]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request will take."""

    prompt_tokens: int = 0
    max_tokens: int = 0  # of its answer
    cached: Mapping[str, int] = field(default_factory=dict)  # prompt tokens given before, by name

    @property
    def positions(self) -> int:
        """Of prompt and answer."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """A verifier that may be chosen."""

    name: str
    requests: int  # that it has or is about to get
    queued: int = 0  # of these, not running for all that is known
    most_requests: int = 0  # that it runs at a time; 0: not told
    free_pages: int = 0
    page_tokens: int = 0  # positions in a page; 0: not told
    curve: Curve | None = None  # None: no step times or no reports of it are known

    def has_room(self, prompt_tokens: int) -> bool:
        """Whether such a request could begin at once, for all that is known."""
        if self.most_requests and self.requests >= self.most_requests:
            return False
        if not self.page_tokens:
            return True
        # As in a verifier's own admission: a page for each of the others to grow into.
        return self.free_pages >= -(-prompt_tokens // self.page_tokens) + self.requests


def choose(candidates: Sequence[Candidate], ask: Ask) -> Candidate:
    """The verifier for a request; there must be one. Equal candidates give an equal choice."""
    roomy = [c for c in candidates if c.has_room(ask.prompt_tokens)]
    if not roomy:
        return min(candidates, key=lambda c: (c.queued, c.requests, c.name))
    best = _most_gaining(roomy)
    saved_ms = {c.name: _saved_ms(c, best, ask) for c in roomy}
    return min(roomy, key=lambda c: (-saved_ms[c.name], c is not best, c.requests, c.name))


def _most_gaining(candidates: Sequence[Candidate]) -> Candidate:
    """The least busy of those that gain most; where a curve is not known, of all."""
    gains = [c.curve.gain(c.requests) for c in candidates if c.curve is not None]
    if len(gains) == len(candidates):
        enough = max(gains) - _ALIKE * abs(max(gains))
        some = [c for c, gain in zip(candidates, gains, strict=True) if gain >= enough]
        return min(some, key=lambda c: (c.requests, c.name))
    return min(candidates, key=lambda c: (c.requests, -c.free_pages, c.name))


def _saved_ms(one: Candidate, best: Candidate, ask: Ask) -> float:
    """What a prefix saves beyond what going there costs; 0 if it does not."""
    more = ask.cached.get(one.name, 0) - ask.cached.get(best.name, 0)
    if one is best or more <= 0:
        return 0.0
    if one.curve is None or best.curve is None:  # any prefix is worth a little
        return float(more) if one.requests - best.requests <= _FURTHER_BLINDLY else 0.0
    if one.requests - best.requests > _FURTHER:
        return 0.0
    slower_ms = one.curve.wait_ms(one.requests) - best.curve.wait_ms(best.requests)
    lost_ms = max(0.0, slower_ms) * min(ask.max_tokens, _LIKELY_TOKENS)
    return max(0.0, more * one.curve.prefill_ms - lost_ms)


def _concave_steps(values: Sequence[float]) -> tuple[float, ...]:
    """From each value to the next on the least concave curve that is nowhere below them."""
    corners = [0]
    for i in range(1, len(values)):
        while len(corners) > 1 and _slope(values, corners[-1], i) >= _slope(values, *corners[-2:]):
            corners.pop()
        corners.append(i)
    steps: list[float] = []
    for a, b in pairwise(corners):
        steps += [_slope(values, a, b)] * (b - a)
    return tuple(steps)


def _slope(values: Sequence[float], a: int, b: int) -> float:
    return (values[b] - values[a]) / (b - a)
