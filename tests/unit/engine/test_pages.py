"""Pages have one owner or none."""

from __future__ import annotations

import pytest

from dspark.engine.pages import PageAllocator


def test_all_but_the_padding_page_can_be_had() -> None:
    pages = PageAllocator(5)
    assert sorted(pages.allocate(4) or []) == [1, 2, 3, 4]
    assert pages.free == 0


def test_too_few_means_none_at_all() -> None:
    pages = PageAllocator(5)
    assert pages.allocate(5) is None
    assert pages.free == pages.total == 4


@pytest.mark.parametrize("page", [0, 3, 9])
def test_a_page_that_nobody_owns_cannot_be_given_back(page: int) -> None:
    pages = PageAllocator(5)
    pages.allocate(2)  # 1 and 2
    with pytest.raises(RuntimeError, match="nobody owns it"):
        pages.release([page])


def test_a_page_is_not_given_back_twice() -> None:
    pages = PageAllocator(5)
    taken = pages.allocate(1)
    assert taken is not None
    pages.release(taken)
    with pytest.raises(RuntimeError, match="nobody owns it"):
        pages.release(taken)
