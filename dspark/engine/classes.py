"""What service classes ask of one verifier's steps, and how far they get it (design §5).

A floor is in tokens a second for each user. A round commits 1 + its accepted draft tokens for a
request, so a floor of f in rounds of T seconds asks for f · T - 1 accepted draft tokens of each.
T is that of earlier rounds: nothing here looks at what is drafted in the step at hand.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

import numpy as np

from dspark.config import DEFAULT_CLASS, ServiceClass
from dspark.engine.sequence import Sequence
from dspark.types import ClassLoad, DoubleArray

_WEIGHT = 0.1  # of the latest round in the usual one


class ServiceClasses:
    """Belongs to one engine. Without classes, nothing is asked and nothing is counted."""

    def __init__(self, classes: Mapping[str, ServiceClass]) -> None:
        self._late: Counter[str] = Counter()  # first tokens since the start, by class
        self._round_s = 0.0  # usual; 0: not known yet
        self.change(classes)

    def change(self, classes: Mapping[str, ServiceClass]) -> None:
        """Count and ask by these from now on; what was learnt and counted stays."""
        self._known = tuple(sorted({DEFAULT_CLASS, *classes})) if classes else ()
        self._weighs = len({1.0, *(c.weight for c in classes.values())}) > 1
        self.has_floors = any(c.min_tokens_per_s for c in classes.values())
        self._has_ceilings = any(c.max_first_token_s for c in classes.values())

    def learn(self, round_ms: float) -> None:
        """A round in which tokens were decided took so long."""
        took_s = round_ms / 1e3
        self._round_s += (_WEIGHT if self._round_s else 1.0) * (took_s - self._round_s)

    def weights(self, sequences: Seq[Sequence]) -> DoubleArray | None:
        """Of a token of each; None if all weigh the same."""
        if not self._weighs:
            return None
        return np.array([s.service.weight for s in sequences], dtype=np.float64)

    def wanted(self, sequences: Seq[Sequence]) -> DoubleArray | None:
        """Accepted draft tokens that floors ask of a step for each; None if nobody's does."""
        if not self.has_floors:
            return None
        floors = np.array([s.service.min_tokens_per_s for s in sequences], dtype=np.float64)
        wanted = np.maximum(floors * self._round_s - 1.0, 0.0)
        return wanted if wanted.any() else None

    def urgent(self, prompts: Iterable[Sequence]) -> bool:
        """Whether a first token would come too late if prompts went on waiting their turn."""
        if not self._has_ceilings:
            return False
        now = time.monotonic()
        return any(
            s.service.max_first_token_s
            and not s.first_token_at
            and now - s.arrived_at > 0.5 * s.service.max_first_token_s
            for s in prompts
        )

    def first_token(self, sequence: Sequence) -> None:
        """The first token of a request is there."""
        sequence.first_token_at = time.monotonic()
        ceiling, request = sequence.service.max_first_token_s, sequence.request
        # One that was continued from elsewhere had its first token there.
        if ceiling and not request.epoch:
            took_s = sequence.first_token_at - sequence.arrived_at
            self._late[request.service_class or DEFAULT_CLASS] += took_s > ceiling

    def loads(self, running: Iterable[Sequence]) -> tuple[ClassLoad, ...]:
        """How each class fares; none without classes."""
        if not self._known:
            return ()
        requests: Counter[str] = Counter()
        floors: Counter[str] = Counter()
        missed: Counter[str] = Counter()
        now = time.monotonic()
        for sequence in running:
            name = sequence.request.service_class or DEFAULT_CLASS
            floor = sequence.service.min_tokens_per_s
            requests[name] += 1
            floors[name] += floor > 0.0
            missed[name] += sequence.tokens_per_s(now) < floor
        return tuple(
            ClassLoad(name, requests[name], floors[name], missed[name], self._late[name])
            for name in self._known
        )
