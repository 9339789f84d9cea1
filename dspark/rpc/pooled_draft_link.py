"""A verifier's streams to several draft replicas, which its requests are spread over.

A request's context lives in one draft replica, so the request stays with it while its stream is up
and answers. It then moves to another, which finds that it holds nothing and asks for all features
(protos/draft.proto, ResyncRequest). When all are gone, requests decode plainly.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from dspark.engine.draft_link import CATCH_UP_ROWS, DraftReplies, on_host
from dspark.rpc.draft_link import FIRST_DEADLINE_S, RemoteDraftLink
from dspark.rpc.transport import PLAINTEXT, Transport
from dspark.types import DraftWork

log = logging.getLogger(__name__)

_MAX_PEERS = 64  # streams that are kept


class PooledDraftLink:
    """A DraftLink over several others. Make it on the event loop that will run the streams."""

    def __init__(
        self,
        verifier: str,
        drafter_fingerprint: str,
        vocab_size: int,
        *,
        transport: Transport = PLAINTEXT,
    ) -> None:
        self._hello = verifier, drafter_fingerprint, vocab_size
        self._transport = transport
        # Of all links, so that a wait for any of them is one wait.
        self._state = threading.Condition()
        self._links: list[RemoteDraftLink] = []  # those without a peer wait for another
        self._shares: dict[RemoteDraftLink, float] = {}
        self._homes: dict[str, RemoteDraftLink] = {}  # by session

    # -- the engine's thread --------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """Whether any link is."""
        with self._state:
            return any(link.available for link in self._links)

    @property
    def latency_s(self) -> float:
        """Of the slowest link: a round's blocks are there when its are."""
        with self._state:
            return max((link.latency_s for link in self._usable() or self._links), default=0.0)

    @property
    def catch_up_rows(self) -> int:
        """As one link's: that much is copied from a GPU, and put into messages."""
        return CATCH_UP_ROWS

    @property
    def deadline_s(self) -> float:
        """Of the slowest link, so that its blocks have a chance."""
        with self._state:
            return max((link.deadline_s for link in self._usable()), default=FIRST_DEADLINE_S)

    def submit(self, works: Sequence[DraftWork]) -> None:
        """Send each work to where its session lives; what cannot be sent leaves a gap."""
        by_link: defaultdict[RemoteDraftLink, list[DraftWork]] = defaultdict(list)
        works = on_host(works)
        with self._state:
            for work in works:
                link = self._home(work.fence.session)
                if link is not None:
                    by_link[link].append(work)
        for link, part in by_link.items():
            link.send(part)

    def free(self, sessions: Iterable[str]) -> None:
        """Forget sessions, here and where they live."""
        with self._state:
            for session in sessions:
                link = self._homes.pop(session, None)
                if link is not None:
                    link.free([session])

    def collect(self, wait_s: float) -> DraftReplies:
        """Replies of all; if there are none, waits for the next or the end of a stream."""
        with self._state:
            if any(link.awaited for link in self._links):
                self._state.wait_for(lambda: any(link.has_news for link in self._links), wait_s)
            all_of_them = DraftReplies()
            for link in self._links:
                replies = link.collect(0.0)
                all_of_them.proposals += replies.proposals
                all_of_them.resyncs += replies.resyncs
                all_of_them.pending |= replies.pending
            return all_of_them

    def missed(self, sessions: Iterable[str]) -> None:
        """Hold it against the links that owe these blocks, and no others."""
        with self._state:
            owing = defaultdict[RemoteDraftLink, list[str]](list)
            for session in sessions:
                link = self._homes.get(session)
                if link is not None:
                    owing[link].append(session)
            for link, late in owing.items():
                link.missed(late)

    def _usable(self) -> list[RemoteDraftLink]:
        return [link for link in self._links if link.usable]

    def _home(self, session: str) -> RemoteDraftLink | None:
        """Where a session lives, from now on if it has to move; None if there is nowhere."""
        home = self._homes.get(session)
        if home is not None and home.usable:
            return home
        usable = self._usable()
        if not usable:
            return home
        if home is not None:
            home.free([session])
        served = Counter(self._homes.values())
        chosen = min(usable, key=lambda link: served[link] / self._shares.get(link, 1.0))
        self._homes[session] = chosen
        return chosen

    # -- the event loop -------------------------------------------------------------------------

    @property
    def connected(self) -> int:
        """Streams that are up."""
        with self._state:
            return sum(link.connected for link in self._links)

    def set_peers(self, shares: Mapping[str, float]) -> None:
        """Keep streams to these draft replicas from now on, and to no others.

        `shares`: the part of each one's work that is meant for this verifier, above 0, by address.
        """
        if len(shares) > _MAX_PEERS:
            log.warning("of %d draft replicas, %d are used", len(shares), _MAX_PEERS)
            shares = {address: shares[address] for address in list(shares)[:_MAX_PEERS]}
        with self._state:
            kept = {link.address: link for link in self._links if link.address in shares}
            idle = [link for link in self._links if link.address not in shares]
            for address in shares:
                if address not in kept:
                    kept[address] = idle.pop() if idle else self._new_link()
                    kept[address].set_peer(address)
            for link in idle:
                link.set_peer(None)
            self._shares = {kept[address]: share for address, share in shares.items()}

    async def stop(self) -> None:
        """Close all streams."""
        for link in self._links:
            await link.stop()

    def _new_link(self) -> RemoteDraftLink:
        link = RemoteDraftLink(*self._hello, state=self._state, transport=self._transport)
        link.start()
        self._links.append(link)
        return link
