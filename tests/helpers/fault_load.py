"""Clients that stream through faults: every answer is checked, and every token has its time."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dspark.pb import common_pb2
from dspark.rpc.client import InferenceClient, chat_request

WINDOW_S = 2.0  # that tokens are counted in
BACK = 0.9  # of the level, at which clients count as served as before
_STEP_S = 0.1
_STOP_S = 150.0  # above a gateway's patience: what has not ended by then has failed


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose answer does not depend on who verifies, who drafts and what fails."""

    prompt: str
    seed: int | None = None  # None: greedy; else temperature 1, coupled

    def to_pb(self, model: str, max_tokens: int) -> object:
        """As it is sent."""
        settings: dict[str, object] = {"temperature": 0.0}
        if self.seed is not None:
            settings = {
                "temperature": 1.0,
                "seed": self.seed,
                "mode": common_pb2.VERIFY_MODE_COUPLED,
            }
        return chat_request(model, [("user", self.prompt)], max_tokens=max_tokens, **settings)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a stream brought, in full."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: int
    completion_tokens: int  # as the last part counts them


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that is over."""

    asked_at: float  # time.monotonic, as all times here
    ended_at: float
    drafted: int
    accepted: int
    failure: str  # empty: it had the answer that it should


class Timeline:
    """When tokens came, by client."""

    def __init__(self, arrivals: Sequence[Sequence[tuple[float, int]]]) -> None:
        self._arrivals = arrivals  # of each client, (time, tokens) in order
        merged = sorted(one for client in arrivals for one in client)
        self._times = [at for at, _ in merged]
        self._counts = [0, *accumulate(tokens for _, tokens in merged)]  # up to each of them

    def rate(self, since: float, until: float) -> float:
        """Tokens a second."""
        first, last = bisect_left(self._times, since), bisect_left(self._times, until)
        return (self._counts[last] - self._counts[first]) / (until - since)

    def longest_wait_s(self, since: float, until: float) -> float:
        """Of any client for its next token, be it of this answer or of the next."""
        waits = [
            min(after, until) - max(before, since)
            for one in self._arrivals
            for (before, _), (after, _) in pairwise([*one, (until, 0)])
            if after > since and before < until
        ]
        return max(waits, default=0.0)

    def slowest(self, since: float, until: float) -> tuple[float, float]:
        """Start of the window with the fewest tokens, and its tokens a second."""
        return min(self._windows(since, until), key=lambda window: window[1])

    def back_after_s(self, since: float, until: float, level: float) -> float:
        """Time to the first window, not before the slowest, that has `BACK` of `level`.

        0 if none has less. Infinite if none had it before `until`.
        """
        slowest, rate = self.slowest(since, until)
        if rate >= BACK * level:
            return 0.0
        for begin, rate in self._windows(slowest, until):
            if rate >= BACK * level:
                return begin - since
        return float("inf")

    def _windows(self, since: float, until: float) -> list[tuple[float, float]]:
        count = max(1, int((until - since - WINDOW_S) / _STEP_S) + 1)
        starts = (since + i * _STEP_S for i in range(count))
        return [(begin, self.rate(begin, begin + WINDOW_S)) for begin in starts]


class Load:
    """Clients on threads, each asking its requests in turn without a pause."""

    def __init__(self, address: str, model: str, asks: Sequence[Ask], max_tokens: int) -> None:
        self._address, self._model, self._max_tokens = address, model, max_tokens
        self._asks = asks
        self._references: dict[Ask, Answer] = {}
        self._arrivals: list[list[tuple[float, int]]] = []
        self._over = threading.Event()
        self.ended: list[Ended] = []

    def timeline(self, since: float) -> Timeline:
        """Of all clients up to now."""
        recent = []
        for one in self._arrivals:
            first = bisect_left(one, (since, 0))
            recent.append(one[max(0, first - 1) :])  # with the last before, for who waits since
        return Timeline(recent)

    def learn(self) -> int:
        """Ask for each answer twice, which must agree; returns the tokens of the shortest."""
        with InferenceClient(self._address) as client, ThreadPoolExecutor(len(self._asks)) as pool:
            passes = [
                list(pool.map(lambda ask: self._stream(client, ask, [])[0], self._asks))
                for _ in range(2)
            ]
        if passes[0] != passes[1]:
            raise AssertionError("a request had two answers before any fault")
        self._references = dict(zip(self._asks, passes[0], strict=True))
        return min(len(answer.token_ids) for answer in passes[0])

    @contextmanager
    def running(self, clients: int) -> Iterator[None]:
        """So many clients; at the end, waits for what they have under way."""
        self._arrivals += [[] for _ in range(clients)]
        threads = [
            threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            deadline = time.monotonic() + _STOP_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            hanging = sum(thread.is_alive() for thread in threads)
            now = time.monotonic()
            self.ended += [Ended(now, now, 0, 0, "it never ended")] * hanging

    def _client(self, number: int) -> None:
        turn = number  # apart from each other, so that all kinds are under way at a time
        with InferenceClient(self._address) as client:
            while not self._over.is_set():
                ask = self._asks[turn % len(self._asks)]
                turn += 1
                asked_at = time.monotonic()
                drafted = accepted = 0
                try:
                    answer, drafted, accepted = self._stream(client, ask, self._arrivals[number])
                    failure = _difference(answer, self._references[ask])
                except Exception as error:  # whatever it is, this request has failed
                    failure = f"{type(error).__name__}: {error}"
                    self._over.wait(0.1)  # who refuses is not stormed
                self.ended.append(Ended(asked_at, time.monotonic(), drafted, accepted, failure))

    def _stream(
        self, client: InferenceClient, ask: Ask, arrivals: list[tuple[float, int]]
    ) -> tuple[Answer, int, int]:
        token_ids: list[int] = []
        text = ""
        last = None
        for last in client.generate(ask.to_pb(self._model, self._max_tokens)):
            if last.token_ids:
                arrivals.append((time.monotonic(), len(last.token_ids)))
            token_ids += last.token_ids
            text += last.text
        if last is None:
            return Answer((), "", 0, 0), 0, 0
        answer = Answer(tuple(token_ids), text, last.finish_reason, last.usage.completion_tokens)
        return answer, last.speculation.drafted_tokens, last.speculation.accepted_tokens


def _difference(got: Answer, want: Answer) -> str:
    """Empty if there is none."""
    if got == want:
        return ""
    if got.token_ids == want.token_ids:
        return f"the same tokens, but otherwise {got}, where {want} was due"
    same = 0
    for one, other in zip(got.token_ids, want.token_ids, strict=False):
        if one != other:
            break
        same += 1
    return (
        f"{len(got.token_ids)} tokens, where {len(want.token_ids)} were due; the first {same} agree"
    )
