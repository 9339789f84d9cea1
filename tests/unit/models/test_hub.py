"""Drafters by hub id: from a hub over a real socket, then from the cache that it filled."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_drafter, tiny_target

from dspark.config import ModelConfig
from dspark.errors import ConfigError
from dspark.models.checkpoint import fingerprint, save_drafter
from dspark.models.drafter_folder import drafter_folder

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
# The hub's settings are read once in a process, so each look-up has its own.
SCRIPT = """
import sys
from dspark.errors import DownloadError
from dspark.models.hub import fetch_drafter
try:
    print(fetch_drafter(sys.argv[1]))
except DownloadError as error:
    sys.exit(str(error))
"""


class Hub(ThreadingHTTPServer):
    """As much of huggingface.co as serves one repository."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.fetched: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        headers, body = self._found(self.path.partition("?")[0].strip("/").split("/"))
        self.send_response(200 if headers is not None else 404)
        for name, value in (headers or {"X-Error-Code": "RepoNotFound"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _found(self, path: list[str]) -> tuple[dict[str, str] | None, bytes]:
        files = self.server.files
        match path:
            case ["api", "models", "some", "drafter", "revision", name] if name in COMMITS:
                known = {"sha": COMMITS[name], "siblings": [{"rfilename": f} for f in files]}
                return {}, json.dumps({"id": "some/drafter", **known}).encode()
            case ["api", "models", "some", "drafter", "tree", *_]:
                tree = [
                    {"type": "file", "path": f, "size": len(data), "oid": _digest(data)}
                    for f, data in files.items()
                ]
                return {}, json.dumps(tree).encode()
            case ["some", "drafter", "resolve", commit, *parts]:
                name = "/".join(parts)
                self.server.fetched.append(name)
                tags = {"ETag": f'"{_digest(files[name])}"', "X-Repo-Commit": commit}
                return tags, files[name]
        return None, b"{}"

    def log_message(self, *_: object) -> None:
        pass


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository with more in it than a drafter."""
    folder = tmp_path / "published"
    save_drafter(tiny_drafter(tiny_target()), folder, torch.float32)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"another")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    server = Hub(published)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def look_up(name: str, cache: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        env={**os.environ, "HF_HOME": str(cache), **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_only_a_drafters_files_are_fetched_and_once(
    hub: Hub, published: Path, tmp_path: Path
) -> None:
    online = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    done = look_up("some/drafter", tmp_path / "cache", **online)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert {path.name for path in folder.rglob("*")} == {"config.json", "model.safetensors"}
    assert fingerprint(folder) == fingerprint(published)
    assert set(hub.fetched) == {"config.json", "model.safetensors"}
    hub.fetched.clear()

    again = look_up("some/drafter@v1", tmp_path / "cache", **online)
    assert Path(again.stdout.strip()).name == COMMITS["v1"]
    assert fingerprint(again.stdout.strip()) == fingerprint(published)

    hub.fetched.clear()
    offline = look_up("some/drafter", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout
    other = look_up("some/other", tmp_path / "cache", **online)
    assert "Repository Not Found" in other.stderr
    unknown = look_up("some/other", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert "outgoing traffic has been disabled" in unknown.stderr
    assert not hub.fetched


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "/a/b", "some/drafter@", "some/", "so..me/drafter"]
)
def test_what_is_neither_folder_nor_id_is_an_error_that_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no folder here, nor .* Hugging Face id"):
        drafter_folder(ModelConfig(drafter=name))


def test_a_folder_comes_first(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(published.parent.parent)
    name = f"{published.parent.name}/{published.name}"
    assert drafter_folder(ModelConfig(drafter=name)) == Path(name)
