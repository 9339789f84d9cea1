"""What the kubelet runs in the pods: probes and hooks, run here."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers.chart import cases, render


@contextmanager
def health(status: int) -> Iterator[int]:
    """The port of a proxy that answers /health so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_address[1]
        server.shutdown()


def container(case: str, pool: str) -> dict[str, Any]:
    one: dict[str, Any] = render(cases()[case]).groups[pool]["template"]["spec"]["containers"][0]
    return one


@pytest.mark.parametrize(
    ("status", "listens", "ready"), [(200, True, True), (200, False, False), (503, True, False)]
)
def test_a_gateway_is_ready_with_both_its_listeners(
    status: int, listens: bool, ready: bool
) -> None:
    command = container("trial", "gateway")["readinessProbe"]["exec"]["command"]
    with health(status) as http, socket.socket() as grpc:
        grpc.bind(("127.0.0.1", 0))
        if listens:
            grpc.listen()
        port = str(grpc.getsockname()[1])
        here = [word.replace(":8000/", f":{http}/").replace("50051", port) for word in command]
        assert here != command
        ran = subprocess.run(here, capture_output=True, timeout=20)
    assert (ran.returncode == 0) == ready, ran.stderr


def test_a_gateway_with_tls_is_asked_with_tls() -> None:
    rendering = render(
        {**cases()["trial"], "tls": {"http": {"enabled": True, "existingSecret": "x"}}}
    )
    probe = rendering.groups["gateway"]["template"]["spec"]["containers"][0]["readinessProbe"]
    assert "https://127.0.0.1:8000/health" in probe["exec"]["command"][-1]
