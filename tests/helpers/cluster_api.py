"""A Kubernetes API that is only read, over real sockets, and reviews what one may do.

What it serves is a list of whole objects (`kind` and `apiVersion` in each), which is what
`kubectl get -o yaml` records. It knows discovery of the versions that are served, lists in pages,
selectors of labels by equality, the field selector of events' type, single objects, and 403 for
what is forbidden.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Raw = dict[str, Any]


@dataclass
class ClusterApi:
    """What there is, and who may see it."""

    objects: list[Raw]
    served: dict[str, list[str]]  # kinds by apiVersion, beyond the built-in ones
    version: Raw = field(
        default_factory=lambda: {"major": "1", "minor": "34", "gitVersion": "v1.34.2"}
    )
    forbidden: set[str] = field(default_factory=set)  # resources, in any namespace
    may_not_create: set[str] = field(default_factory=set)
    only_in: str = ""  # rights are to this namespace, and to nothing of the cluster's own
    page: int = 3  # objects at most, whatever is asked for
    token: str = "t0ken"
    asked: list[str] = field(default_factory=list)

    def get(self, path: str, query: dict[str, str]) -> tuple[int, Raw]:
        parts = path.strip("/").split("/")
        if parts == ["version"]:
            return 200, self.version
        version, rest = (
            ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        )
        if parts[0] == "apis" and not rest:
            kinds = self.served.get(version)
            resources = [{"kind": kind, "name": plural(kind)} for kind in kinds or ()]
            return (
                (200, {"kind": "APIResourceList", "resources": resources}) if kinds else missing()
            )
        namespace = None
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        if rest[0] in self.forbidden:
            return 403, status(403, f'{rest[0]} is forbidden: User "ops" cannot list resource')
        found = [
            raw
            for raw in self.objects
            if (raw["apiVersion"], plural(raw["kind"])) == (version, rest[0])
            and namespace in (None, raw["metadata"].get("namespace"))
        ]
        if len(rest) == 2:
            return next(((200, r) for r in found if r["metadata"]["name"] == rest[1]), missing())
        return 200, self._listed(found, query)

    def review(self, body: Raw) -> Raw:
        asked = body["spec"]["resourceAttributes"]
        within = self.only_in in ("", asked["namespace"])
        allowed = asked["resource"] not in self.may_not_create and within
        return {**body, "status": {"allowed": allowed}}

    def _listed(self, found: list[Raw], query: dict[str, str]) -> Raw:
        name, _, value = query.get("labelSelector", "").partition("=")
        if name:
            found = [r for r in found if r["metadata"].get("labels", {}).get(name) == value]
        field_name, _, wanted = query.get("fieldSelector", "").partition("=")
        if field_name:
            found = [raw for raw in found if raw.get(field_name) == wanted]
        start = int(query.get("continue", "0"))
        end = start + min(self.page, int(query["limit"]))
        more = {"continue": str(end)} if end < len(found) else {}
        return {"kind": "List", "metadata": more, "items": found[start:end]}


def plural(kind: str) -> str:
    low = kind.lower()
    if low.endswith("s"):
        return low + "es"
    return low[:-1] + "ies" if low.endswith("y") else low + "s"


def status(code: int, message: str) -> Raw:
    return {"kind": "Status", "apiVersion": "v1", "code": code, "message": message}


def missing() -> tuple[int, Raw]:
    return 404, status(404, "the server could not find the requested resource")


@contextmanager
def serving(api: ClusterApi, folder: Path) -> Iterator[str]:
    """The path of a kubeconfig that leads to it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # an answer in one packet: in two it would wait for an ACK

        def _answer(self) -> None:
            split = urlsplit(self.path)
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            api.asked.append(split.path)
            if self.headers.get("Authorization") != f"Bearer {api.token}":
                code, answer = 401, status(401, "Unauthorized")
            elif self.command == "POST":
                code, answer = 201, api.review(body)
            else:
                query = {name: values[0] for name, values in parse_qs(split.query).items()}
                code, answer = api.get(split.path, query)
            sent = json.dumps(answer, default=str).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = _answer  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield kubeconfig(folder / "kubeconfig", f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def kubeconfig(path: Path, url: str) -> str:
    """For the user `ops`, in the namespace `serving`."""
    context = {"cluster": "c", "user": "ops", "namespace": "serving"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": context}],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "ops", "user": {"token": "t0ken"}}],
    }
    path.write_text(yaml.safe_dump(config))
    return str(path)


def read_objects(*paths: Path) -> list[Raw]:
    """All documents of YAML files."""
    found: list[Raw] = []
    for path in paths:
        found += [raw for raw in yaml.safe_load_all(path.read_text("utf-8")) if raw]
    return found


def remove(objects: Sequence[Raw], kind: str, name: str = "") -> list[Raw]:
    """All but those of a kind, or one of it."""
    return [
        raw for raw in objects if raw["kind"] != kind or (name and raw["metadata"]["name"] != name)
    ]
