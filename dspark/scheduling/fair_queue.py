"""Whose work is done next, where several clients have work waiting. Pure.

Deficits are counted in works: whoever got least is next. So, of clients that have work waiting,
none is ever ahead of another by more than one item, however large the items that others put in;
this is start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996).
Nobody saves up: a client that had nothing waiting starts where the others are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Client(Generic[T]):
    got: int  # works, on the queue's scale: where its next item starts
    items: deque[tuple[int, T]] = field(default_factory=deque)  # with their works


class FairQueue(Generic[T]):
    """Items of clients, each client's in order. Not thread-safe."""

    def __init__(self) -> None:
        self._clients: dict[int, _Client[T]] = {}  # the one served last comes last
        self._now = 0  # where the item served last started
        self.works = 0  # waiting

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return any(client.items for client in self._clients.values())

    def put(self, client: int, item: T, works: int) -> None:
        """Append an item to a client's. One without works is a mark, which costs nothing."""
        known = self._clients.setdefault(client, _Client(self._now))
        if not known.items:
            known.got = max(known.got, self._now)
        known.items.append((works, item))
        self.works += works

    def drop(self, client: int) -> None:
        """Forget a client and what it has waiting."""
        gone = self._clients.pop(client, None)
        if gone is not None:
            self.works -= sum(works for works, _ in gone.items)

    def take(self, most: int) -> list[T]:
        """The next run: items of at most so many works in all, or a larger one alone.

        A client's works before a mark and those after it do not share a run.
        """
        taken: list[T] = []
        room, begun, closed = most, set[int](), set[int]()
        while waiting := [name for name, client in self._clients.items() if client.items]:
            # Among equals, whoever was served longest ago.
            name = min(waiting, key=lambda name: self._clients[name].got)
            client = self._clients[name]
            works, item = client.items[0]
            if works and (name in closed or (begun and works > room)):
                break
            client.items.popleft()
            taken.append(item)
            if not works:
                closed |= {name} & begun
                continue
            begun.add(name)
            room -= works
            self.works -= works
            self._now = client.got
            client.got += works
            self._clients[name] = self._clients.pop(name)
        # Who neither waits nor is ahead of anyone may start anew.
        self._clients = {n: c for n, c in self._clients.items() if c.items or c.got > self._now}
        return taken
