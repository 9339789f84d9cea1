"""Sampling parameters: what cannot be is refused by name, what is nearly greedy is greedy."""

from __future__ import annotations

import pytest

from dspark.errors import InvalidRequestError
from dspark.types import MAX_SEED, SamplingParams


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
    ],
)
def test_what_cannot_be_is_refused_by_name(param: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=param) as refusal:
        SamplingParams(**{param: value})  # type: ignore[arg-type]
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0.0, True), (1e-40, True), (1e-3, False), (1.0, False)]
)
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy
