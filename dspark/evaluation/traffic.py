"""What users send and when: lengths of answers, and arrivals in an open or a closed loop.

A closed loop keeps so many users busy, each asking again as soon as it is answered: the load adapts
to the server. An open loop sends at the times of a Poisson process, whatever the server does: the
load of strangers, and the only one under which a queue can grow.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from dspark.errors import ConfigError

_FORMS = "a number, uniform:LEAST..MOST, or lognormal:MEDIAN,SIGMA,LEAST..MOST"
_UNIFORM = re.compile(r"uniform:(\d+)\.\.(\d+)")
_LOGNORMAL = re.compile(r"lognormal:(\d+),(\d+(?:\.\d+)?),(\d+)\.\.(\d+)")


class Lengths(Protocol):
    """A law of lengths in tokens."""

    def draw(self, rng: random.Random) -> int:
        """One length."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from least to most alike; a fixed length is one where both are equal."""

    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.least, self.most)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Many short and a few long, as answers of real services are; cut at its bounds."""

    median: int
    sigma: float  # of the logarithm
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        """One length."""
        length = round(rng.lognormvariate(math.log(self.median), self.sigma))
        return min(max(length, self.least), self.most)


def parse_lengths(text: str) -> Lengths:
    """A law from its description; ConfigError says what can be written."""
    if text.isdecimal() and int(text) > 0:
        return Uniform(int(text), int(text))
    if match := _UNIFORM.fullmatch(text):
        least, most = map(int, match.groups())
        if 0 < least <= most:
            return Uniform(least, most)
    if match := _LOGNORMAL.fullmatch(text):
        median, least, most = (int(match[i]) for i in (1, 3, 4))
        if 0 < least <= median <= most:
            return Lognormal(median, float(match[2]), least, most)
    raise ConfigError(f"lengths are {_FORMS}, all above 0 and in order; got {text!r}")


def poisson_arrivals(rate: float, rng: random.Random) -> Iterator[float]:
    """Times in seconds from now on, without end; `rate` requests a second on average."""
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate)
        yield at_s
