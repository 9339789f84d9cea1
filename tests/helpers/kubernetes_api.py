"""A Kubernetes API over real sockets: lists in pages, watches in chunks, and fails as asked.

It is no kube-apiserver, only what a list-and-watch sees of one: `limit` and `continue` over a
snapshot, a history that watches replay from a resourceVersion, bookmarks, 410 for a version that
was compacted, `timeoutSeconds`, and equality selectors on labels.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

DEADLINE_S = 30.0
Raw = dict[str, Any]
# Answers a request in place of the server; the rest of the history goes to those of watches.
Fault = Callable[["Handler", list[bytes]], None]


@dataclass
class Asked:
    """A request as it came."""

    path: str
    query: dict[str, str]

    @property
    def kind(self) -> str:
        return self.path.rsplit("/", 1)[1]

    @property
    def watch(self) -> bool:
        return self.query.get("watch", "").lower() == "true"

    @property
    def version(self) -> int:
        return int(self.query.get("resourceVersion") or 0)


@dataclass
class Api:
    """State of the cluster, and what was asked of it."""

    objects: dict[tuple[str, str, str], Raw] = field(default_factory=dict)
    history: list[tuple[int, str, str, Raw]] = field(default_factory=list)  # version, kind, type
    version: int = 100
    compacted: int = 0  # versions below are forgotten
    asked: list[Asked] = field(default_factory=list)
    faults: dict[tuple[str, bool], deque[Fault]] = field(default_factory=dict)
    standing: dict[str, Fault] = field(default_factory=dict)  # by kind, until it is taken away
    changed: threading.Condition = field(default_factory=threading.Condition)
    generation: int = 0  # of watches; older ones end
    brief: bool = False  # watches tell what there is, and end
    snapshots: dict[str, tuple[list[Raw], int]] = field(default_factory=dict)  # by continue token
    newest: dict[str, int] = field(default_factory=dict)
    closed: bool = False

    def put(self, kind: str, raw: Raw) -> None:
        self._event(kind, raw, "MODIFIED" if self._key(kind, raw) in self.objects else "ADDED")

    def delete(self, kind: str, raw: Raw) -> None:
        if self._key(kind, raw) in self.objects:
            self._event(kind, raw, "DELETED")

    def bookmark(self, kind: str) -> None:
        self._event(kind, {"metadata": {}}, "BOOKMARK")

    def compact(self) -> None:
        """Forget all history: a watch from an earlier version is told 410."""
        with self.changed:
            self.version += 1
            self.compacted = self.version
            self.history.clear()

    def fail(self, kind: str, fault: Fault, *, watch: bool) -> None:
        """The next list or watch of a kind."""
        with self.changed:
            self.faults.setdefault((kind, watch), deque()).append(fault)

    def await_asked(
        self, wanted: Callable[[Asked], bool], *, since: int = 0, times: int = 1
    ) -> None:
        """Until so many such requests came after the first `since`."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: sum(map(wanted, self.asked[since:])) >= times, DEADLINE_S
            ), f"it was never asked; only {self.asked[since:]}"

    def settle(self, *kinds: str) -> None:
        """End all watches until they come again from the newest version: all was taken in then."""
        with self.changed:
            since = len(self.asked)
            self.brief = True
            self.changed.notify_all()
        for kind in kinds or ("nodes", "pods"):
            newest = self.newest.get(kind, 0)

            def wanted(asked: Asked, kind: str = kind, newest: int = newest) -> bool:
                return asked.kind == kind and asked.watch and asked.version >= newest

            self.await_asked(wanted, since=since)
        self.brief = False

    def end_watches(self) -> None:
        """Those of now, once."""
        with self.changed:
            self.generation += 1
            self.changed.notify_all()

    def close(self) -> None:
        """Let go of every request that waits."""
        with self.changed:
            self.closed = True
            self.end_watches()

    def _event(self, kind: str, raw: Raw, what: str) -> None:
        with self.changed:
            self.version += 1
            raw = {**raw, "metadata": {**raw["metadata"], "resourceVersion": str(self.version)}}
            if what == "DELETED":
                del self.objects[self._key(kind, raw)]
            elif what != "BOOKMARK":
                self.objects[self._key(kind, raw)] = raw
            self.history.append((self.version, kind, what, raw))
            self.newest[kind] = self.version
            self.changed.notify_all()

    @staticmethod
    def _key(kind: str, raw: Raw) -> tuple[str, str, str]:
        return kind, raw["metadata"].get("namespace", ""), raw["metadata"].get("name", "")


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    api: Api

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        asked = Asked(split.path, {k: v[0] for k, v in parse_qs(split.query).items()})
        api = self.api
        with api.changed:
            api.asked.append(asked)
            api.changed.notify_all()
            queue = api.faults.get((asked.kind, asked.watch))
            fault = queue.popleft() if queue else api.standing.get(asked.kind)
            told = [line for _, line in self.lines(asked, asked.version)]
        try:
            if fault is not None:
                fault(self, told)
            elif asked.watch:
                self.watch(asked)
            else:
                self.page(asked)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def page(self, asked: Asked) -> None:
        api = self.api
        with api.changed:
            token = asked.query.get("continue", "")
            if token and token not in api.snapshots:
                self.answer(410, {"kind": "Status", "code": 410, "message": "expired token"})
                return
            items, version = api.snapshots.pop(token) if token else self.snapshot(asked)
            limit = int(asked.query["limit"])
            metadata = {"resourceVersion": str(version)}
            if rest := items[limit:]:
                metadata["continue"] = f"{version}-{len(rest)}"
                api.snapshots[metadata["continue"]] = (rest, version)
        self.answer(200, {"kind": "List", "metadata": metadata, "items": items[:limit]})

    def snapshot(self, asked: Asked) -> tuple[list[Raw], int]:
        items = [
            raw
            for (kind, _, _), raw in sorted(self.api.objects.items())
            if kind == asked.kind and self.selected(asked, raw)
        ]
        return items, self.api.version

    def watch(self, asked: Asked) -> None:
        api, at = self.api, asked.version
        with api.changed:
            generation = api.generation
            if at < api.compacted:
                gone = {"type": "ERROR", "object": {"kind": "Status", "code": 410}}
                self.start_chunks()
                self.chunk(json.dumps(gone).encode() + b"\n")
                self.end_chunks()
                return
        self.start_chunks()
        over = False
        while not over:
            with api.changed:

                def news(at: int = at) -> bool:
                    return api.generation > generation or api.brief or bool(self.lines(asked, at))

                over = not api.changed.wait_for(news, float(asked.query["timeoutSeconds"]))
                over = over or api.brief or api.generation > generation
                lines = self.lines(asked, at) if api.generation == generation else []
            for version, line in lines:
                self.chunk(line)
                at = version
        self.end_chunks()

    def lines(self, asked: Asked, since: int) -> list[tuple[int, bytes]]:
        return [
            (version, json.dumps({"type": what, "object": raw}).encode() + b"\n")
            for version, kind, what, raw in self.api.history
            if version > since
            and kind == asked.kind
            and (what == "BOOKMARK" or self.selected(asked, raw))
        ]

    def selected(self, asked: Asked, raw: Raw) -> bool:
        metadata = raw["metadata"]
        parts = asked.path.split("/")
        namespace = parts[4] if "namespaces" in parts else None
        selector = asked.query.get("labelSelector", "")
        name, _, value = selector.partition("=")
        return namespace in (None, metadata.get("namespace")) and (
            not selector or metadata.get("labels", {}).get(name) == value
        )

    def answer(self, status: int, body: Raw, **headers: str) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text)

    def start_chunks(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def end_chunks(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class ApiServer:
    """An Api on a port of the loopback."""

    def __init__(self) -> None:
        self.api = Api()
        handler = type("Bound", (Handler,), {"api": self.api})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.api.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def refuse(status: int, **headers: str) -> Fault:
    """Answer with an error."""
    body = {"kind": "Status", "code": status, "message": f"refused with {status}"}
    return lambda handler, _: handler.answer(status, body, **headers)


def hang_up(handler: Handler, _: list[bytes]) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


def cut_short(handler: Handler, told: list[bytes]) -> None:
    """Send all events but the last, half of that, and hang up within the chunk."""
    handler.start_chunks()
    for line in told[:-1]:
        handler.chunk(line)
    if told:
        handler.wfile.write(f"{len(told[-1]):x}\r\n".encode() + told[-1][: len(told[-1]) // 2])
    handler.close_connection = True


def expire(handler: Handler, _: list[bytes]) -> None:
    """Answer with the first page, whose token is worth nothing by the time it is used."""
    asked = Asked(urlsplit(handler.path).path, {"limit": "1"})
    handler.page(asked)
    handler.api.snapshots.clear()


def drip(handler: Handler, told: list[bytes]) -> None:
    """Send the events a few bytes at a time, and end well."""
    handler.start_chunks()
    text = b"".join(told)
    for i in range(0, len(text), 7):
        handler.chunk(text[i : i + 7])
    handler.end_chunks()


def fall_silent(handler: Handler, _: list[bytes]) -> None:
    """Begin a stream and never say a thing, nor hang up: a peer that died without a word."""
    handler.start_chunks()
    _wait_for_the_end(handler)


def never_answer(handler: Handler, _: list[bytes]) -> None:
    """Take the request and leave it at that."""
    _wait_for_the_end(handler)


def babble(text: bytes) -> Fault:
    """Send something else than events."""

    def fault(handler: Handler, _: list[bytes]) -> None:
        handler.start_chunks()
        handler.chunk(text)
        handler.end_chunks()

    return fault


def _wait_for_the_end(handler: Handler) -> None:
    with handler.api.changed:
        handler.api.changed.wait_for(lambda: handler.api.closed, DEADLINE_S)
    handler.close_connection = True
