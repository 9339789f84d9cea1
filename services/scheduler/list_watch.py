"""One kind of Kubernetes object, listed and then watched, on a thread of its own.

A list comes in pages; the watch goes on from the list's resourceVersion, moved on by each event
and bookmark, so that a connection that breaks is taken up where it broke. Where the server has
forgotten that version (410), or sends what cannot be read, everything is listed anew. The last view
stays until a list is complete.

A connection can die without a word. The server is asked to end each watch after a while, and one
that is silent for much longer is given up.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import urllib3
from kubernetes.client.exceptions import ApiException

from dspark.scheduling.cluster_load import ClusterInventory, Kind

log = logging.getLogger(__name__)

# A call of the client: list_node and the like, with the arguments that say what is listed.
Call = Callable[..., Any]

_PAGE = 250  # objects
_CHUNK_BYTES = 1 << 16
_MAX_LINE_BYTES = 4 << 20  # one event; etcd takes objects of up to 1.5 MiB
_MAX_PAGE_BYTES = 64 << 20
_MAX_ERROR_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Waits:
    """How long what may take, in seconds."""

    watch_s: int = 60  # after which the server ends a watch
    answer_s: float = 15.0  # for an answer, and beyond watch_s for the end of a watch
    list_s: float = 120.0  # for all pages
    first_retry_s: float = 0.5  # at most; the wait is drawn at random, and its bound doubles
    longest_retry_s: float = 30.0
    refused_s: float = 300.0  # until asked again after 403


class AnswerError(Exception):
    """The API answered with an error."""

    def __init__(self, status: int, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.retry_after_s = status, retry_after_s


class _UnreadableError(Exception):
    """The stream holds something else than events."""


class ListWatch:
    """Keeps one kind of an inventory as the API tells it."""

    def __init__(
        self, kind: Kind, call: Call, inventory: ClusterInventory, grant: str, waits: Waits
    ) -> None:
        self._kind, self._call, self._inventory = kind, call, inventory
        self._grant, self._waits = grant, waits
        self._version = ""  # to go on from; empty: list first
        self._heard_at: float | None = None
        self._failures = 0  # since something was last heard
        self._trouble = ""  # that was logged last
        self._stopping = threading.Event()
        self._response: urllib3.BaseHTTPResponse | None = None
        # Nobody waits for it at the end of the process: a call that gets no answer cannot be
        # interrupted before its headers are there.
        self._thread = threading.Thread(target=self._run, name=f"watch-{kind}", daemon=True)

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end, and break off what it reads; `join` waits for it."""
        self._stopping.set()
        response = self._response
        if response is not None:
            # It may be closed by its own thread at this very moment, which is as good.
            with suppress(Exception):
                response.shutdown()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def age_s(self) -> float | None:
        """Since the API last said anything of these objects; None: never yet."""
        return None if self._heard_at is None else time.monotonic() - self._heard_at

    def _run(self) -> None:
        while not self._stopping.is_set():
            wait_s = 0.0
            try:
                if not self._version:
                    self._list()
                self._watch()
            except AnswerError as error:
                if error.status == 410:
                    self._version = ""
                elif error.status == 403:
                    self._note(f"{error}; going on without; {self._grant}")
                    wait_s = self._waits.refused_s
                else:
                    self._note(str(error))
                wait_s = wait_s or min(error.retry_after_s, self._waits.longest_retry_s)
            except _UnreadableError as error:
                self._version = ""
                self._note(str(error))
            # Besides sockets' errors, those of whatever gets us credentials.
            except Exception as error:
                self._note(f"{type(error).__name__}: {error}")
            self._stopping.wait(wait_s + self._retry_s())

    def _retry_s(self) -> float:
        bound = self._waits.first_retry_s * 2 ** min(self._failures, 16)
        self._failures += 1
        return random.uniform(0, min(bound, self._waits.longest_retry_s))

    def _well(self) -> None:
        """The watch works."""
        self._heard_at = time.monotonic()
        self._failures = 0
        self._note("")

    def _note(self, trouble: str) -> None:
        """Say it once: again only after it was well in between."""
        if self._stopping.is_set():
            return  # what fails now was broken off
        if trouble and not self._trouble:
            log.warning("no news of Kubernetes %s: %s", self._kind, trouble[:1000])
        elif self._trouble and not trouble:
            log.info("Kubernetes tells of %s again", self._kind)
        self._trouble = trouble

    def _list(self) -> None:
        version = ""

        def objects() -> Iterator[dict[str, Any]]:
            nonlocal version
            deadline = time.monotonic() + self._waits.list_s
            more = ""
            while True:
                query = {"_continue": more} if more else {}
                page = self._page(deadline, limit=_PAGE, **query)
                items, metadata = page.get("items"), page.get("metadata")
                if not isinstance(metadata, dict) or not isinstance(items, list | None):
                    raise _UnreadableError(f"a list of {self._kind} without items and metadata")
                yield from (item for item in items or () if isinstance(item, dict))
                more = metadata.get("continue") or ""
                if not more:
                    version = str(metadata.get("resourceVersion") or "")
                    return

        self._inventory.replace(self._kind, objects())
        if not version:
            raise _UnreadableError(f"a list of {self._kind} without a resourceVersion")
        self._version = version
        self._heard_at = time.monotonic()

    def _page(self, deadline: float, **query: Any) -> dict[str, Any]:
        body = bytearray()
        with closing(self._chunks(self._waits.answer_s, deadline, **query)) as chunks:
            for chunk in chunks:
                body += chunk
                if len(body) > _MAX_PAGE_BYTES:
                    raise _UnreadableError(
                        f"a page of {self._kind} of over {_MAX_PAGE_BYTES} bytes"
                    )
        return _read(body)

    def _watch(self) -> None:
        """Take events in until the server ends the stream."""
        silence_s = self._waits.watch_s + self._waits.answer_s
        began = time.monotonic()
        chunks = self._chunks(
            silence_s,
            began + silence_s,
            watch=True,
            allow_watch_bookmarks=True,
            resource_version=self._version,
            timeout_seconds=self._waits.watch_s,
        )
        with closing(chunks):
            for line in _lines(chunks):
                self._take(_read(line))
                self._well()
        if time.monotonic() - began >= self._waits.watch_s / 2:
            self._well()  # it ran its course, and nothing happened

    def _take(self, event: dict[str, Any]) -> None:
        kind, raw = event.get("type"), event.get("object")
        if not isinstance(raw, dict):
            raise _UnreadableError(f"an event of {self._kind} without an object")
        if kind == "ERROR":
            code = raw.get("code")
            raise AnswerError(code if isinstance(code, int) else 0, str(raw.get("message"))[:256])
        if kind in ("ADDED", "MODIFIED"):
            self._inventory.put(self._kind, raw)
        elif kind == "DELETED":
            self._inventory.drop(self._kind, raw)
        metadata = raw.get("metadata")
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if not isinstance(version, str) or not version:
            raise _UnreadableError(f"an event of {self._kind} without a resourceVersion")
        self._version = version

    def _chunks(
        self, silence_s: float, deadline: float, **query: Any
    ) -> Generator[bytes, None, None]:
        """The body of an answer as it comes; it is given up after `silence_s` or at `deadline`."""
        timeouts = (self._waits.answer_s, silence_s)
        try:
            response = self._call(_preload_content=False, _request_timeout=timeouts, **query)
        except ApiException as error:  # older clients look at the status first
            raise AnswerError(error.status or 0, str(error.body)[:_MAX_ERROR_BYTES]) from error
        with closing(response):
            self._response = response
            try:
                if response.status != 200:
                    raise _refusal(response)
                while not self._stopping.is_set():
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"an answer about {self._kind} that did not end in time")
                    chunk = response.read1(_CHUNK_BYTES)
                    if not chunk:
                        return
                    yield chunk
            finally:
                self._response = None


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines; what a broken connection leaves of the last one is dropped."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise _UnreadableError(f"an event of over {_MAX_LINE_BYTES} bytes")
        yield from (line for line in lines if line.strip())


def _read(text: bytes | bytearray) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _UnreadableError(f"what is no JSON: {bytes(text[:80])!r}") from error
    if not isinstance(value, dict):
        raise _UnreadableError(f"what is no object: {bytes(text[:80])!r}")
    return value


def _refusal(response: Any) -> AnswerError:
    text = response.read1(_MAX_ERROR_BYTES).decode("utf-8", "replace")
    with suppress(ValueError, AttributeError):
        text = str(json.loads(text).get("message"))
    wait = str(response.headers.get("Retry-After", ""))
    return AnswerError(
        response.status, text, float(wait) if wait.isascii() and wait.isdigit() else 0
    )
