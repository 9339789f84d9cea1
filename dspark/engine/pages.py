"""Who owns which page of a paged cache. No tensors here."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out page numbers 1..n-1; page 0 pads index tables and belongs to nobody."""

    def __init__(self, num_pages: int) -> None:
        self.total = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None (and nothing taken) when there are too few."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; RuntimeError if one was not taken, since two owners would follow."""
        for page in pages:
            if page not in self._taken:
                raise RuntimeError(f"page {page} was released but nobody owns it")
            self._taken.remove(page)
            self._free.append(page)
