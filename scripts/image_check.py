"""Run the install steps of deploy/docker/Dockerfile's CPU image in a clean virtual environment.

    python scripts/image_check.py [--find-links FOLDER]

The pip commands are taken from the Dockerfile itself, with the paths of the image replaced. Then
every module of the services is imported, and `dspark --version`, `ray --version` and `pip check`
are run. Takes minutes and 3 GB. Needs dist/*.whl (`make wheel`).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_STAGE = re.compile(r"^FROM base AS packages-cpu$(.*?)^FROM ", re.MULTILINE | re.DOTALL)
_IMPORTS = """
import importlib, pathlib, dspark
root = pathlib.Path(dspark.__file__).parent
names = sorted(p.relative_to(root.parent) for p in (root / "services").rglob("*.py"))
for name in names:
    importlib.import_module(".".join(name.with_suffix("").parts))
print(f"{len(names)} modules of the services imported from {root}")
"""


def pip_commands(dockerfile: str) -> list[list[str]]:
    """The arguments of each `pip install` of the CPU stage, as the Dockerfile gives them."""
    found = _STAGE.search(dockerfile)
    if found is None:
        raise SystemExit("the Dockerfile has no stage packages-cpu")
    stage = found[1].replace("\\\n", " ")
    index = re.search(r"^ARG TORCH_CPU_INDEX=(\S+)$", stage, re.MULTILINE)
    assert index is not None
    runs = re.findall(r"^RUN (.*)$", stage.replace("${TORCH_CPU_INDEX}", index[1]), re.MULTILINE)
    commands = [shlex.split(c) for run in runs for c in run.split("&&")]
    return [command[1:] for command in commands if command[:2] == ["pip", "install"]]


def main() -> None:
    """Stops at the first step that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--find-links", default="", help="where torch's CPU wheel lies")
    arguments = parser.parse_args()
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"dist/ must hold one wheel, and holds {len(wheels)}: make wheel")
    commands = pip_commands((ROOT / "deploy/docker/Dockerfile").read_text(encoding="utf-8"))
    lock = ROOT / "deploy/docker/requirements-cpu.txt"
    paths = {"/build/requirements.txt": str(lock), "/build/*.whl": str(wheels[0])}
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder) / "dspark"
        run(sys.executable, "-m", "venv", str(venv), cwd=folder)
        python = str(venv / "bin" / "python")
        for command in commands:
            replaced = [paths.get(argument, argument) for argument in command]
            if arguments.find_links and "--extra-index-url" in replaced:
                at = replaced.index("--extra-index-url")
                replaced[at : at + 2] = ["--find-links", arguments.find_links]
            run(python, "-m", "pip", "--isolated", *replaced, cwd=folder)
        run(python, "-m", "pip", "check", cwd=folder)
        run(python, "-c", _IMPORTS, cwd=folder)
        for name in ("dspark", "ray"):
            run(str(venv / "bin" / name), "--version", cwd=folder)


def run(*command: str, cwd: str) -> None:
    """Outside of the checkout, so that only what was installed can be imported."""
    print("+", shlex.join(command), flush=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_F", "PYTHON"))}
    subprocess.run(command, check=True, cwd=cwd, env=environment)


if __name__ == "__main__":
    main()
