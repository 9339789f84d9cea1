"""The wheel holds what an installation needs and nothing of the workshop."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "dspark/models/weights/smollm2-135m"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """The file names in a wheel built from a copy, so that no build/ is used or left here."""
    source = tmp_path_factory.mktemp("checkout") / "dspark-serve"
    leftovers = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leftovers)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(path) as archive:
        return frozenset(archive.namelist())


def files(folder: str, pattern: str) -> set[str]:
    """What the checkout holds below dspark/<folder>, as the wheel should name it."""
    found = (ROOT / "dspark" / folder).rglob(pattern)
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.mark.parametrize("folder", ["services", "kernels"])
def test_the_links_stand(folder: str) -> None:
    link = ROOT / "dspark" / folder
    assert link.is_symlink(), f"dspark/{folder} is no link: clone with core.symlinks=true"
    assert link.readlink() == Path("..") / folder


@pytest.mark.parametrize("folder", ["services", "kernels", "scheduling", "engine"])
def test_the_wheel_holds_the_code(wheel: frozenset[str], folder: str) -> None:
    modules = files(folder, "*.py")
    assert modules, f"dspark/{folder} is empty"
    assert modules <= wheel


def test_the_wheel_holds_what_kernels_are_made_of(wheel: frozenset[str]) -> None:
    for pattern in ("*.cpp", "*.h", "*.json"):
        assert files("kernels", pattern)
        assert files("kernels", pattern) <= wheel


def test_the_wheel_holds_the_types(wheel: frozenset[str]) -> None:
    assert files("pb", "*.pyi") | {"dspark/py.typed"} <= wheel


def test_the_wheel_holds_the_reports_page(wheel: frozenset[str]) -> None:
    assert files("evaluation", "*.jinja")
    assert files("evaluation", "*.jinja") <= wheel


def test_the_wheel_holds_the_shipped_weights(wheel: frozenset[str]) -> None:
    if not (ROOT / WEIGHTS).is_dir():
        pytest.skip(f"{WEIGHTS} is not in this checkout")
    names = ("config.json", "model.safetensors", "README.md")
    assert {f"{WEIGHTS}/{name}" for name in names} <= wheel


def test_the_wheel_holds_nothing_else(wheel: frozenset[str]) -> None:
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {
        "dspark",
        "dspark_serve",
    }
    assert not {name for name in wheel if "__pycache__" in name or "/tests/" in name}
