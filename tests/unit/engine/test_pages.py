"""Pages are held by those who say so, and found again by what they hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.engine.pages import PagePool, page_keys
from dspark.kernels.attention_plan import PAGE_SIZE

KEYS = page_keys(range(4 * PAGE_SIZE))


def test_all_but_the_padding_page_can_be_had() -> None:
    pool = PagePool(5)
    assert sorted(pool.allocate(4) or []) == [1, 2, 3, 4]
    assert pool.free == 0


def test_too_few_means_none_at_all() -> None:
    pool = PagePool(5)
    assert pool.allocate(5) is None
    assert pool.free == pool.total == 4


@pytest.mark.parametrize("page", [0, 3, 9])
def test_a_page_that_nobody_holds_cannot_be_given_back(page: int) -> None:
    pool = PagePool(5)
    pool.allocate(2)  # 1 and 2
    with pytest.raises(RuntimeError, match="nobody holds it"):
        pool.release([page])


def test_a_page_is_not_given_back_twice() -> None:
    pool = PagePool(5)
    taken = pool.allocate(1)
    assert taken is not None
    pool.release(taken)
    with pytest.raises(RuntimeError, match="nobody holds it"):
        pool.release(taken)


def filled(pool: PagePool, keys: list[bytes]) -> list[int]:
    """Held pages that are named."""
    pages = pool.allocate(len(keys))
    assert pages is not None
    for page, key in zip(pages, keys, strict=True):
        pool.name(page, key)
    return pages


def test_named_pages_are_found_while_held_and_after() -> None:
    pool = PagePool(6)
    pages = filled(pool, KEYS[:3])
    assert pool.find(KEYS) == pages
    pool.check([pages, pages])
    pool.release(pages)
    pool.release(pages)
    assert pool.free == pool.total
    assert pool.find([KEYS[0], b"another"]) == pages[:1]
    pool.check([pages[:1]])


def test_a_run_ends_at_the_first_unknown_page() -> None:
    pool = PagePool(6)
    filled(pool, [KEYS[0], KEYS[2]])
    assert len(pool.find(KEYS)) == 1


def test_the_end_of_an_old_prefix_is_forgotten_first() -> None:
    pool = PagePool(5)
    old, young = filled(pool, KEYS[:2]), filled(pool, [b"x", b"y"])
    pool.release(old)
    pool.release(young)
    pool.allocate(1)
    assert pool.find(KEYS[:2]) == old[:1]
    assert pool.find([b"x", b"y"]) == young


def test_a_second_page_of_a_name_is_just_a_page() -> None:
    pool = PagePool(4)
    first, second = filled(pool, KEYS[:1]), filled(pool, KEYS[:1])
    assert pool.find(KEYS[:1]) == first
    pool.release(second)
    pool.check([first, first])


@pytest.mark.parametrize("held", [[], [[1, 2]], [[1], [1]], [[1], [3]]])
def test_the_audit_tells_when_holders_and_pool_disagree(held: list[list[int]]) -> None:
    pool = PagePool(4)
    assert pool.allocate(1) == [1]
    pool.check([[1]])
    with pytest.raises(RuntimeError, match="believed"):
        pool.check(held)


def test_the_audit_tells_when_a_page_is_lost() -> None:
    pool = PagePool(4)
    pool._free.pop()
    with pytest.raises(RuntimeError, match="lost"):
        pool.check([])


tokens = st.lists(st.integers(0, 3), max_size=5 * PAGE_SIZE)


@given(tokens, tokens)
def test_keys_are_equal_exactly_where_all_tokens_so_far_are(a: list[int], b: list[int]) -> None:
    for i, (x, y) in enumerate(zip(page_keys(a), page_keys(b), strict=False)):
        end = (i + 1) * PAGE_SIZE
        assert (x == y) is (a[:end] == b[:end])


@given(tokens, st.integers(0, 5))
def test_keys_go_on_from_a_parent(a: list[int], cut: int) -> None:
    keys = page_keys(a)
    cut = min(cut, len(keys))
    rest = a[cut * PAGE_SIZE :]
    assert keys[:cut] + page_keys(rest, keys[cut - 1] if cut else b"") == keys
