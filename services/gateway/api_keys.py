"""Who may ask: keys in a folder, one a file, whose name is the client's.

Kept as digests, compared in constant time, and read again when the folder changes: a mounted Secret
is swapped as a whole. The names may be logged; a key never is, nor a part of one.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from dspark.errors import ConfigError, UnauthenticatedError
from dspark.rpc.guard import Refusal

log = logging.getLogger(__name__)

MAX_KEYS = 256
MIN_KEY_CHARS, MAX_KEY_CHARS = 16, 256
LOOK_EVERY_S = 1.0  # so long, at most, does a withdrawn key go on

_MAX_FILE_BYTES = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}")  # of ASCII, without spaces
_SCHEME = "bearer"

_Stamp = tuple[tuple[str, int, int, int], ...]


class ApiKeys:
    """The keys of a folder. ConfigError if they cannot be used at first; later the last stay."""

    def __init__(self, folder: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = Path(folder), clock
        self._seen = self._stamp()
        self._digests = self._read()
        self._look_at = clock() + LOOK_EVERY_S
        self._told = False
        self._log_names("API keys of")

    def client_of(self, authorization: Sequence[str]) -> str:
        """The name of the client whose key is in the one such header.

        Raises UnauthenticatedError, which says nothing of what was sent.
        """
        self._look()
        if not authorization:
            raise UnauthenticatedError(
                "no API key was sent: put one into the header, as Authorization: Bearer KEY"
            )
        scheme, _, key = authorization[0].partition(" ")
        if len(authorization) > 1 or scheme.lower() != _SCHEME or not key:
            raise UnauthenticatedError(
                "the authorization header must be one, and read: Authorization: Bearer KEY"
            )
        client = ""
        if len(key) <= MAX_KEY_CHARS:
            digest = _digest(key)
            for name, known in self._digests.items():  # all of them: time tells nothing
                if hmac.compare_digest(known, digest):
                    client = name
        if not client:
            raise UnauthenticatedError(
                "the API key is not known here, or no longer: ask whoever runs the service"
            )
        return client

    def check(self, context: grpc.aio.ServicerContext) -> Refusal | None:
        """The same of a gRPC call's metadata, for rpc/guard.py."""
        sent = [str(v) for k, v in context.invocation_metadata() or () if k == "authorization"]
        try:
            self.client_of(sent)
        except UnauthenticatedError as error:
            return Refusal(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return None

    def _look(self) -> None:
        """Read again if it is time, and if something has changed."""
        if self._clock() < self._look_at:
            return
        self._look_at = self._clock() + LOOK_EVERY_S
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                self._told = False
                return
            self._digests = self._read()
        except ConfigError as error:
            if not self._told:
                log.error("API keys were changed and cannot be used, the last stay: %s", error)
            self._told = True
            return
        self._seen, self._told = stamp, False
        self._log_names("API keys changed, they are of")

    def _stamp(self) -> _Stamp:
        """Changes with the folder's files; ConfigError if there are none or too many."""
        try:
            names = sorted(name for name in os.listdir(self._folder) if not name.startswith("."))
            if not names:
                raise ConfigError(
                    f"{self._folder} holds no API keys: put one file into it for each client, or "
                    "leave gateway.api_keys_folder empty to ask for no keys"
                )
            if len(names) > MAX_KEYS:
                raise ConfigError(
                    f"{self._folder} holds {len(names)} files; at most {MAX_KEYS} keys are taken"
                )
            found = []
            for name in names:
                at = os.stat(self._folder / name)
                if not stat.S_ISREG(at.st_mode):
                    raise ConfigError(f"{self._folder / name} is no file: one file holds one key")
                found.append((name, at.st_ino, at.st_mtime_ns, at.st_size))
        except OSError as error:
            raise _unreadable(self._folder, error) from error
        return tuple(found)

    def _read(self) -> dict[str, bytes]:
        """Digests by name."""
        digests: dict[str, bytes] = {}
        for name, *_ in self._stamp():
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{self._folder} holds a file {name[:80]!r}: a client's name is made of "
                    "letters, digits, dots, - and _"
                )
            digest = _digest(_key_in(self._folder / name))
            twin = next((other for other, known in digests.items() if known == digest), None)
            if twin is not None:
                raise ConfigError(f"{self._folder}: {twin} and {name} have the same key")
            digests[name] = digest
        return digests

    def _log_names(self, what: str) -> None:
        log.info("%s %d clients: %s", what, len(self._digests), ", ".join(self._digests))


def _key_in(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path} is over {_MAX_FILE_BYTES} bytes: it should hold one key")
    key = data.decode("latin-1").strip("\r\n")
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"{path} must hold one key of {MIN_KEY_CHARS} to {MAX_KEY_CHARS} ASCII characters "
            "without spaces, such as `openssl rand -hex 32` prints"
        )
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot read API keys from {path}: {error.strerror or error}")
