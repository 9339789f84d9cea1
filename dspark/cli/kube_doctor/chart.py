"""What the chart would make of some values: rendered by helm, or given as rendered already."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from dspark.cli.kube_doctor.manifests import Wanted, read_manifests
from dspark.errors import ConfigError

_TIMEOUT_S = 60
_MOST_CHARS = 16 << 20


def wanted_by(
    values: list[Path], manifests: str, chart: Path | None, release: str, namespace: str
) -> Wanted:
    """Of rendered `manifests` (a path, or - for stdin), else of `values`; little without either."""
    if manifests:
        if values:
            raise ConfigError("--manifests are rendered already: leave --values out")
        return _parsed(_read(manifests), manifests)
    if not (values or chart):
        return Wanted()
    return _parsed(_rendered(values, chart or _beside(), release, namespace), "helm template")


def _beside() -> Path:
    """The chart of the checkout that this runs from, or of the one that it is run in."""
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        folder = root / "deploy" / "helm" / "dspark"
        if (folder / "Chart.yaml").is_file():
            return folder
    raise ConfigError("--values need the chart beside them: name its folder or archive in --chart")


def _rendered(values: list[Path], chart: Path, release: str, namespace: str) -> str:
    helm = shutil.which("helm")
    if helm is None:
        raise ConfigError(
            "--values are rendered by helm, which is not on the PATH: install it, or render "
            "elsewhere and give the output to --manifests"
        )
    files = [argument for path in values for argument in ("--values", str(path))]
    command = [helm, "template", release, str(chart), "--namespace", namespace, *files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"helm template took longer than {_TIMEOUT_S} s; try it alone") from error
    if done.returncode:
        raise ConfigError(f"helm refuses the values: {done.stderr.strip()}")
    return done.stdout


def _read(manifests: str) -> str:
    try:
        if manifests == "-":
            return sys.stdin.read(_MOST_CHARS)
        return Path(manifests).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read manifests: {error}") from error


def _parsed(manifests: str, where: str) -> Wanted:
    try:
        return read_manifests(yaml.safe_load_all(manifests))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: no YAML: {error}") from error
