"""Prefixes: the longest that a live verifier was given last, within bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.prefixes import Prefix, PrefixMemory

ONE, TWO, FOUR = Prefix(16, 1), Prefix(32, 2), Prefix(64, 3)


def test_the_longest_prefix_of_each_verifier_counts() -> None:
    memory = PrefixMemory()
    memory.give([ONE, TWO, FOUR], "a")
    assert memory.cached_tokens([ONE, TWO, Prefix(64, 99)], {"a"}) == {"a": 32}
    memory.give([ONE, Prefix(32, 77)], "b")  # shares the first alone, which is b's from now on
    assert memory.cached_tokens([ONE, TWO, FOUR], {"a", "b"}) == {"a": 64, "b": 16}
    assert memory.cached_tokens([Prefix(16, 50)], {"a", "b"}) == {}


def test_who_is_gone_is_forgotten() -> None:
    memory = PrefixMemory()
    memory.give([ONE, TWO], "a")
    assert memory.cached_tokens([ONE, TWO], {"b"}) == {}
    assert len(memory) == 0


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.sampled_from("ab"))))
def test_memory_is_bounded_and_keeps_what_was_used_last(gifts: list[tuple[list[int], str]]) -> None:
    memory = PrefixMemory(most_kept=4)
    for hashes, name in gifts:
        prefixes = [Prefix(16, h) for h in hashes]
        memory.give(prefixes, name)
        assert len(memory) <= 4
        if prefixes:
            assert memory.cached_tokens(prefixes[-1:], {"a", "b"}) == {name: 16}
