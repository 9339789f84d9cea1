"""Builds operators.cpp with the machine's own compiler, once, and loads it.

The interface is C and the file knows nothing of Python or torch, so a build takes some seconds and
outlives updates of both. OpenMP is torch's own: its libgomp is already in the process when ours
asks for one by the same name, so both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP must be loaded before ours)

from dspark.config import cache_folder

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("operators.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp")
_TIMEOUT_S = 300


@cache
def load() -> ctypes.CDLL | None:
    """The library, built if need be; None, with the reason logged, where it cannot be had."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("no CPU operators, the slower torch path is used: %s", str(detail)[-500:])
        return None
    if not library.dspark_supported():
        log.info("no CPU operators: this CPU has no AVX-512 BF16")
        return None
    return library


def _built() -> Path:
    """Path of the library for this source, these flags and this compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise OSError("there is no C++ compiler (install g++, or name one in CXX)")
    version = _run([compiler, "--version"])
    facts = repr((_SOURCE.read_bytes(), _FLAGS, version)).encode()
    folder = cache_folder() / "operators"
    path = folder / f"{hashlib.sha256(facts).hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the others wait; a death lets go
        if not path.exists():
            log.warning("building the CPU operators, once: some seconds …")
            partial = path.with_suffix(".partial")
            _run([compiler, *_FLAGS, str(_SOURCE), "-o", str(partial)])
            partial.replace(path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return done.stdout
