"""The Lease endpoints of a Kubernetes API server, and nothing else of it, over real HTTP."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PATH = re.compile(r"/apis/coordination\.k8s\.io/v1/namespaces/([^/?]+)/leases(?:/([^/?]+))?")
# As Go's MicroTime takes it.
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")


class LeaseApi:
    """Leases with optimistic concurrency: a write of an old resourceVersion is refused with 409."""

    def __init__(self) -> None:
        self.leases: dict[tuple[str, str], dict[str, Any]] = {}
        self.out = False  # answer 503 to everything
        self.answers = threading.Event()  # cleared: requests hang
        self.answers.set()
        self._version = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            lease = self.leases.get(key)
        return (404, _status(404, "NotFound")) if lease is None else (200, lease)

    def create(self, key: tuple[str, str], lease: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            if key in self.leases:
                return 409, _status(409, "AlreadyExists")
            return self._write(key, lease, 201)

    def replace(self, key: tuple[str, str], lease: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            if key not in self.leases:
                return 404, _status(404, "NotFound")
            held = self.leases[key]["metadata"]["resourceVersion"]
            if lease["metadata"].get("resourceVersion") != held:
                return 409, _status(409, "Conflict")
            return self._write(key, lease, 200)

    def _write(
        self, key: tuple[str, str], lease: dict[str, Any], code: int
    ) -> tuple[int, dict[str, Any]]:
        spec = lease["spec"]
        for name in ("acquireTime", "renewTime"):
            if not _MICRO_TIME.fullmatch(spec[name]):
                return 400, _status(400, "BadRequest")
        for name in ("leaseDurationSeconds", "leaseTransitions"):
            if not 0 <= spec[name] < 2**31:
                return 422, _status(422, "Invalid")
        self._version += 1
        lease["metadata"]["resourceVersion"] = str(self._version)
        self.leases[key] = lease
        return code, lease


def _status(code: int, reason: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
    }


@contextmanager
def running_lease_api() -> Iterator[tuple[LeaseApi, str]]:
    """The state, to look at and to upset, and the server's URL."""
    api = LeaseApi()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(size)) if size else None
            api.answers.wait()
            found = _PATH.fullmatch(self.path.partition("?")[0])
            if api.out:
                code, answer = 503, _status(503, "ServiceUnavailable")
            elif found is None:
                code, answer = 404, _status(404, "NotFound")
            elif self.command == "POST":
                code, answer = api.create((found[1], body["metadata"]["name"]), body)
            elif self.command == "PUT":
                code, answer = api.replace((found[1], found[2]), body)
            else:
                code, answer = api.get((found[1], found[2]))
            sent = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = _answer  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield api, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        api.answers.set()
        server.shutdown()
        thread.join()
        server.server_close()
