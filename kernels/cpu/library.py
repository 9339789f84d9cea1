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

from dspark.config import cache_folder, cpu_operators, cpu_operators_folder
from dspark.errors import ConfigError

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "operators.cpp"
# No contraction: what is written as two roundings is two, in every instance of a template.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fopenmp")
_TIMEOUT_S = 300
# Instruction sets that the operators are written for, best first: flags in /proc/cpuinfo, and the
# compiler's.
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"})
_SETS = {
    "amx": (_AVX512 | {"amx_tile", "amx_bf16"}, ("-DDSPARK_AVX512", "-DDSPARK_AMX")),
    "avx512": (_AVX512, ("-DDSPARK_AVX512",)),
    "avx2": (frozenset({"avx2", "fma"}), ()),
}


@cache
def load() -> ctypes.CDLL | None:
    """The library, built if need be; None, with the reason logged, where it cannot be had."""
    instructions = instruction_set()
    if instructions is None:
        log.info("no CPU operators: they need Linux on x86-64 with AVX2")
        return None
    try:
        library = ctypes.CDLL(str(_built(instructions)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("no CPU operators, the slower torch path is used: %s", str(detail)[-500:])
        return None
    if not library.dspark_supported():
        log.warning("no CPU operators: this CPU lacks what /proc/cpuinfo says it has")
        return None
    return library


def instruction_set() -> str | None:
    """The best of the sets that this machine and the settings allow: amx, avx512, avx2 or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None
    wanted = cpu_operators()
    if wanted == "none":
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    has = frozenset(next((line for line in lines if line.startswith("flags")), "").split())
    names = _SETS if wanted == "auto" else [wanted]
    return next((name for name in names if _SETS[name][0] <= has), None)


def cpu_name() -> str:
    """What the maker calls this machine's CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def prebuild(folder: Path, *sets: str) -> list[Path]:
    """Build for these instruction sets (default: all), on whatever machine.

    $DSPARK_CPU_OPERATORS_FOLDER then names the folder, and no compiler is needed. OSError and
    SubprocessError as they come.
    """
    if unknown := set(sets) - set(_SETS):
        raise ConfigError(f"no operators for {', '.join(unknown)}: there are {', '.join(_SETS)}")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for instructions in sets or _SETS:
        path = folder / _name(instructions)
        _run([_compiler(), *_flags(instructions), str(_SOURCE), "-o", str(path)])
        made.append(path)
    return made


def _name(instructions: str, compiler_version: str = "") -> str:
    """Of the library for these sources, these flags and this compiler."""
    sources = [path.read_bytes() for path in sorted((*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")))]
    facts = repr((sources, _flags(instructions), compiler_version)).encode()
    return f"{hashlib.sha256(facts).hexdigest()[:16]}.so"


def _flags(instructions: str) -> tuple[str, ...]:
    return (*_FLAGS, *_SETS[instructions][1])


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise OSError("there is no C++ compiler (install g++, or name one in CXX)")
    return compiler


def _built(instructions: str) -> Path:
    if (prebuilt := cpu_operators_folder()) is not None:
        if (path := prebuilt / _name(instructions)).exists():
            return path
        log.warning("%s holds no operators of this version: building them", prebuilt)
    compiler = _compiler()
    folder = cache_folder() / "operators"
    path = folder / _name(instructions, _run([compiler, "--version"]))
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the others wait; a death lets go
        if not path.exists():
            log.warning("building the CPU operators, once: some seconds …")
            partial = path.with_suffix(".partial")
            _run([compiler, *_flags(instructions), str(_SOURCE), "-o", str(partial)])
            partial.replace(path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return done.stdout
