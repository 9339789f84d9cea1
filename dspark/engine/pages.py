"""Who holds which page of a paged cache, and which full pages can be found again by what they hold.

A page is free, held by one or more sequences, or idle: held by nobody, but kept because it is named
by the tokens in it and all before it. Idle pages go, least recently used first, when pages run out.

No tensors here: what lies beside a page's keys and values (context features) is found with it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from dspark.kernels.attention_plan import PAGE_SIZE

PageKey = bytes


class PagePool:
    """Hands out page numbers 1..n-1; page 0 pads index tables and belongs to nobody."""

    def __init__(self, num_pages: int) -> None:
        self.total = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._holders: dict[int, int] = {}  # page -> sequences that hold it, at least one
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    @property
    def free(self) -> int:
        """Pages that can be had: those that nobody holds."""
        return len(self._free) + len(self._idle)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None (and nothing taken) when there are too few."""
        if count > self.free:
            return None
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """One holder lets go; RuntimeError if nobody held a page, since two owners would follow.

        The last of `pages` is the first to be reused: a prefix outlives what follows it.
        """
        for page in reversed(list(pages)):
            holders = self._holders.get(page)
            if holders is None:
                raise RuntimeError(f"page {page} was released but nobody holds it")
            if holders > 1:
                self._holders[page] = holders - 1
                continue
            del self._holders[page]
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, key: PageKey) -> None:
        """A held page is full, and holds what `key` says; another page of that name stays it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, keys: Iterable[PageKey]) -> list[int]:
        """Pages of the longest known run of `keys`, each held once more from now on."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1
            pages.append(page)
        return pages

    def check(self, held: Iterable[Iterable[int]]) -> None:
        """RuntimeError unless `held`, the pages of each holder, is what the pool believes."""
        counted = Counter(page for pages in held for page in pages)
        if counted != self._holders:
            wrong = {
                page: (counted[page], self._holders.get(page, 0))
                for page in counted.keys() | self._holders.keys()
                if counted[page] != self._holders.get(page, 0)
            }
            raise RuntimeError(f"pages with (holders, believed holders): {wrong}")
        everyone = sorted([*self._free, *self._idle, *self._holders])
        if everyone != list(range(1, self.total + 1)):
            raise RuntimeError("a page is lost, or both free and held")
        names = {page: key for key, page in self._page_of.items()}
        if names != self._key_of or not self._idle.keys() <= names.keys():
            raise RuntimeError("names and pages do not match")


def page_keys(tokens: Sequence[int], parent: PageKey = b"") -> list[PageKey]:
    """Names of the full pages of `tokens`, each of its own tokens and all before it.

    A cryptographic hash: prompts come from strangers, and a collision would mix up their caches.
    """
    full = len(tokens) // PAGE_SIZE * PAGE_SIZE
    pages = np.asarray(tokens[:full], dtype=np.int64).reshape(-1, PAGE_SIZE)
    keys = []
    for page in pages:
        parent = blake2b(parent + page.tobytes(), digest_size=16).digest()
        keys.append(parent)
    return keys
