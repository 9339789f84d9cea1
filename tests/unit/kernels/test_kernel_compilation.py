"""Every kernel compiles for every GPU that is named, within its budgets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
_ROOT = Path(__file__).parents[3]
_KERNELS = _ROOT / "kernels" / "triton"


def test_every_variant_fits_every_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(_ROOT / "scripts" / "compile_kernels.py")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {line.split()[1] for line in done.stdout.splitlines()[2:]}
    launched = {
        name
        for path in _KERNELS.glob("*.py")
        for name in re.findall(r"launch\(\s*(\w+),", path.read_text(encoding="utf-8"))
    }
    assert launched
    assert compiled == launched, "every kernel that is launched has variants"
    assert len(done.stdout.splitlines()[0].split("|")) == 2 + 1 + 5
