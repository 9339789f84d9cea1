"""docs/helm.md and values.yaml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.chart import ROOT, defaults, leaves

PAGE = ROOT / "docs" / "helm.md"


def test_the_reference_is_in_step() -> None:
    script = ROOT / "scripts" / "chart_docs.py"
    ran = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_every_key_is_in_the_reference() -> None:
    text = Path(PAGE).read_text("utf-8")
    missing = [path for path, _ in leaves(defaults()) if f"| `{path}` |" not in text]
    assert not missing
