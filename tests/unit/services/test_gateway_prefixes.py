"""Hashes of a prompt's beginnings: the same for the same tokens and model, and bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dspark.services.gateway.prefixes import prefixes_of

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=300)


@given(TOKENS, TOKENS, TOKENS)
def test_prompts_share_the_hashes_of_what_they_share(
    common: list[int], one: list[int], other: list[int]
) -> None:
    first, second = prefixes_of("m", common + one), prefixes_of("m", common + other)
    for a, b in zip(first, second, strict=False):
        assert a.tokens == b.tokens
        alike = (common + one)[: a.tokens] == (common + other)[: a.tokens]
        assert (a.hash == b.hash) == alike
    assert [p.tokens for p in first] == [
        n for n in (16, 32, 64, 128, 256, 512) if n < len(common + one)
    ]


def test_hashes_are_those_of_the_model_and_bounded() -> None:
    prompt = [7] * 200_000
    assert prefixes_of("m", prompt[:17])[0] != prefixes_of("n", prompt[:17])[0]
    assert len(prefixes_of("m", prompt)) == 12
    assert not prefixes_of("m", prompt[:16])  # the last token is computed in any case
