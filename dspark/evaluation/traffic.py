"""What users ask of a server: when requests come, how long they are, and what they say.

Closed loop: N users, each asking again as soon as it is answered, so a slow server is asked less.
Open loop: requests come as a Poisson process of a given rate, whatever the server makes of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dspark.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many users, each with one request under way."""

    users: int

    def __str__(self) -> str:
        return f"{self.users} users" if self.users > 1 else "1 user"


@dataclass(frozen=True, slots=True)
class Poisson:
    """Requests at random moments, `rate_per_s` of them a second on average."""

    rate_per_s: float

    def __str__(self) -> str:
        return f"{self.rate_per_s:g} req/s"

    def gaps_s(self, rng: random.Random) -> Iterator[float]:
        """Seconds from one arrival to the next, without end; the first counts from the start."""
        while True:
            yield rng.expovariate(self.rate_per_s)


Load = ClosedLoop | Poisson


def closed_loops(option: str, text: str) -> list[Load]:
    """`1,2,4` as so many users each; ConfigError names `option`."""
    return [ClosedLoop(_whole(option, part, "1,2,4")) for part in text.split(",")]


def poissons(option: str, text: str) -> list[Load]:
    """`0.5,1,2` as requests a second; ConfigError names `option`."""
    return [Poisson(_positive(option, part, "0.5,1,2")) for part in text.split(",")]


class Lengths(Protocol):
    """A law of lengths, in whatever unit the option that named it has."""

    def draw(self, rng: random.Random) -> int:
        """A length of at least 1."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    length: int

    def draw(self, rng: random.Random) -> int:
        return self.length


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `low` to `high`, both included, alike."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """exp(N(μ, σ²)) with μ = ln(mean) − σ²/2, rounded; what falls outside takes the bound."""

    mean: float
    sigma: float  # of the logarithm
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        drawn = rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return round(min(max(drawn, self.low), self.high))


def lengths(option: str, text: str) -> Lengths:
    """`128`, `uniform:32..256` or `lognormal:MEAN,SIGMA,LOW..HIGH`; ConfigError names `option`."""
    kind, _, rest = text.partition(":")
    match kind:
        case "uniform":
            return Uniform(*_bounds(option, rest, "uniform:32..256"))
        case "lognormal":
            example = "lognormal:128,0.8,16..512"
            parts = rest.split(",")
            if len(parts) != 3:
                raise _refusal(option, rest, "a mean, a sigma and bounds", example)
            mean, sigma = (_positive(option, part, example) for part in parts[:2])
            return Lognormal(mean, sigma, *_bounds(option, parts[2], example))
        case _:
            return Fixed(_whole(option, text, "128, uniform:32..256 or lognormal:128,0.8,16..512"))


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a user turn, and how many tokens may answer it."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Where asks come from: `texts` in turn, or so many `words` from a random place in them."""

    texts: Sequence[str]
    output_tokens: Lengths
    words: Lengths | None = None

    def asks(self, seed: str, mark: str = "") -> Iterator[Ask]:
        """Without end, the same for the same seed.

        With a `mark`, each prompt begins with it and a number: unlike prompts of other marks, so
        that no cache of prompts helps one endpoint with what another was asked.
        """
        rng = random.Random(seed)
        words = " ".join(self.texts).split()
        number = 0
        while True:
            if self.words is None:
                prompt = self.texts[number % len(self.texts)]
            else:
                begin, count = rng.randrange(len(words)), self.words.draw(rng)
                prompt = " ".join(words[(begin + i) % len(words)] for i in range(count))
            number += 1
            said = f"({mark}/{number}) {prompt}" if mark else prompt
            yield Ask(said, self.output_tokens.draw(rng))


def _whole(option: str, text: str, example: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise _refusal(option, text, "whole numbers from 1 on", example)
    return number


def _positive(option: str, text: str, example: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise _refusal(option, text, "numbers above 0", example)
    return number


def _bounds(option: str, text: str, example: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    if not dots:
        raise _refusal(option, text, "bounds LOW..HIGH", example)
    bounds = _whole(option, low, example), _whole(option, high, example)
    if bounds[0] > bounds[1]:
        raise _refusal(option, text, "the lower bound first", example)
    return bounds


def _refusal(option: str, got: str, want: str, example: str) -> ConfigError:
    return ConfigError(f"{option} wants {want}, such as {example}; got {got!r}")
