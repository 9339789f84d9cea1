"""Write deploy/docker/requirements-*.txt: what an image installs, each file with its hash.

    python scripts/lock_images.py [--find-links FOLDER] [cpu gpu]

Versions are those of constraints.txt, without what only development needs. torch comes from
PyTorch's CPU index for `cpu`, and from PyPI, with CUDA, for `gpu`; there Triton is the one that
this torch was built for, whatever constraints.txt says. Hashes are of wheels for CPython 3.11 on
Linux x86-64, so this runs there. --find-links is for machines that do not reach the CPU index.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "docker"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_TORCH = re.compile(r"^torch==(\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Lock:
    """One file."""

    name: str
    extras: str
    torch_suffix: str  # of its version
    free: frozenset[str]  # packages whose version follows from torch's
    index: str  # beside PyPI

    @property
    def path(self) -> Path:
        return FOLDER / f"requirements-{self.name}.txt"


LOCKS = (
    Lock("cpu", "kube", "+cpu", frozenset({"torch"}), CPU_INDEX),
    Lock("gpu", "gpu,kube", "", frozenset({"torch", "triton"}), ""),
)


def main() -> None:
    """Each that is named, else all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cpu, gpu; default: both")
    parser.add_argument("--find-links", default="")
    arguments = parser.parse_args()
    for lock in LOCKS:
        if not arguments.names or lock.name in arguments.names:
            lines = resolve(lock, arguments.find_links)
            lock.path.write_text(header(lock) + "".join(lines), encoding="utf-8")
            print(f"{lock.path.relative_to(ROOT)}: {len(lines)} packages")


def resolve(lock: Lock, find_links: str) -> list[str]:
    """`name==version --hash=…` of all that the image installs, sorted by name."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = _TORCH.search(pins)
    if found is None:
        raise SystemExit("constraints.txt does not pin torch")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        kept = [line for line in pins.splitlines() if line.partition("==")[0] not in lock.free]
        torch = f"torch=={found[1]}{lock.torch_suffix}"
        constraints.write_text("\n".join([*kept, torch, ""]), encoding="utf-8")
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--only-binary", ":all:", "--report", str(report)]
        command += ["--constraint", str(constraints), "--progress-bar", "off"]
        if lock.index:
            where = (
                ["--find-links", find_links] if find_links else ["--extra-index-url", lock.index]
            )
            command += where
        subprocess.run([*command, f"{ROOT}[{lock.extras}]"], check=True)
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    return sorted(line(item) for item in installs if not item["is_direct"])


def line(item: dict[str, object]) -> str:
    """Of one package in pip's report."""
    metadata, info = item["metadata"], item["download_info"]
    assert isinstance(metadata, dict)
    assert isinstance(info, dict)
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    digest = info["archive_info"]["hashes"]["sha256"]
    return f"{name}=={metadata['version']} --hash=sha256:{digest}\n"


def header(lock: Lock) -> str:
    """What the file says of itself."""
    return (
        f"# What the image installs beside dspark-serve itself, with the extras {lock.extras}.\n"
        "# CPython 3.11, Linux x86-64. `make image-locks` writes this file from constraints.txt.\n"
    )


if __name__ == "__main__":
    main()
