"""Nobody starves, nothing is lost, and everybody's items keep their order."""

from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise

from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.fair_queue import FairQueue

Item = tuple[int, int, int]  # client, its item's number, works

MOST = 64
sizes = st.integers(1, 100)
queues = st.lists(st.lists(sizes, min_size=1, max_size=12), min_size=2, max_size=5)


def filled(queues: list[list[int]]) -> FairQueue[Item]:
    queue: FairQueue[Item] = FairQueue()
    for client, works in enumerate(queues):
        for number, size in enumerate(works):
            queue.put(client, (client, number, size), size)
    return queue


def served(queue: FairQueue[Item], most: int = MOST) -> list[Item]:
    items: list[Item] = []
    while queue:
        run = queue.take(most)
        assert run, "something waits and nothing is done"
        assert len(run) == 1 or sum(works for _, _, works in run) <= most
        items += run
    return items


@given(queues)
def test_clients_with_work_waiting_are_never_an_item_apart(queues: list[list[int]]) -> None:
    largest = max(map(max, queues))
    got = Counter(dict.fromkeys(range(len(queues)), 0))
    left = Counter({client: len(works) for client, works in enumerate(queues)})
    for client, _, works in served(filled(queues)):
        got[client] += works
        left[client] -= 1
        if not all(left.values()):
            return
        assert max(got.values()) - min(got.values()) <= largest


@given(queues)
def test_nobody_waits_for_more_than_a_round_of_the_others(queues: list[list[int]]) -> None:
    """Between two of a client's items, each other gets as much as the first, and one item more."""
    largest = max(map(max, queues))
    items = served(filled(queues))
    for client in range(len(queues)):
        own = [i for i, item in enumerate(items) if item[0] == client]
        for before, after in pairwise(own):
            between = Counter[int]()
            for other, _, size in items[before + 1 : after]:
                between[other] += size
            assert all(size <= items[before][2] + largest for size in between.values())


@given(queues, st.integers(0, 20), sizes)
def test_a_newcomer_waits_for_one_item_of_each_at_most(
    queues: list[list[int]], runs: int, size: int
) -> None:
    queue = filled(queues)
    for _ in range(runs):
        if queue:
            queue.take(MOST)
    newcomer = len(queues)
    queue.put(newcomer, (newcomer, 0, size), size)
    before: Counter[int] = Counter()
    for client, _, _ in served(queue):
        if client == newcomer:
            break
        before[client] += 1
    assert all(count <= 1 for count in before.values())


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.booleans()), max_size=60),
    st.integers(1, 64),
)
def test_nothing_is_lost_or_done_twice_and_a_client_keeps_its_order(
    story: list[tuple[int, int, bool]], most: int
) -> None:
    queue: FairQueue[Item] = FairQueue()
    items: list[Item] = []
    for number, (client, works, take) in enumerate(story):
        queue.put(client, (client, number, works), works)
        if take:
            items += queue.take(most)
    while queue:
        items += queue.take(most)
    assert queue.works == 0
    by_client = {
        client: [number for _, number, _ in group]
        for client, group in groupby(sorted(items, key=lambda item: item[0]), lambda i: i[0])
    }
    for client, numbers in by_client.items():
        assert numbers == [n for n, (one, _, _) in enumerate(story) if one == client]
    assert len(items) == len(story)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40))
def test_works_around_a_mark_do_not_share_a_run(story: list[tuple[int, int]]) -> None:
    queue: FairQueue[Item] = FairQueue()
    for number, (client, works) in enumerate(story):
        queue.put(client, (client, number, works), works)
    while queue:
        run = queue.take(MOST)
        for client in range(3):
            shape = "".join("w" if works else "m" for one, _, works in run if one == client)
            assert "w" not in shape.lstrip("m").lstrip("w"), shape


def test_idling_saves_nothing_up() -> None:
    queue: FairQueue[Item] = FairQueue()
    queue.put(1, (1, 0, 1), 1)
    for number in range(50):
        queue.put(0, (0, number, 10), 10)
    for _ in range(40):
        queue.take(10)
    for number in range(1, 50):
        queue.put(1, (1, number, 1), 1)
    ahead = [queue.take(1)[0][0] for _ in range(25)]
    assert ahead.count(0) == 2, "the client that was idle has ten works for each of the other's"


def test_a_client_that_leaves_takes_its_work_along() -> None:
    queue = filled([[3, 4], [5]])
    queue.drop(0)
    queue.drop(7)
    assert queue.works == 5
    queue.put(0, (0, 2, 0), 0)
    assert served(queue) == [(1, 0, 5), (0, 2, 0)]
    assert 0 not in queue._clients, "clients come and go, and are remembered for good"
