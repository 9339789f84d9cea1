"""The import rules of dspark, checked by reading the import statements.

A layer imports the layers below it. Imports for type checking and imports inside functions count:
a cycle that starts late is still a cycle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from dspark.applications import APPLICATIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dspark"

# Low to high. Those that share a layer may import each other, but for STRANGERS.
LAYERS = (
    ("types", "errors", "config", "applications", "telemetry", "store"),
    ("decoding", "scheduling"),
    ("kernels",),
    ("models",),
    ("engine",),
    ("training", "evaluation", "simulation"),
    ("pb", "wire", "rpc"),
    ("services",),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
STRANGERS = frozenset({"decoding", "scheduling"})

# Folders of the checkout: importable from its root, absent from an installation.
OUTSIDE = frozenset({"benchmarks", "examples", "kernels", "scripts", "services", "tests"})
SCHEDULING_MAY_USE = frozenset({"dspark", "numpy", *sys.stdlib_module_names})
TORCH_FREE = frozenset(
    {"errors", "types", "wire.explanation", "wire.plans", "wire.requests", "wire.step_times"}
)


def violations(module: str, source: str) -> list[str]:
    """Every import in `source`, the text of `module` (dotted), that breaks a rule."""
    return [
        f"{module}:{line}: imports {name}: {why}"
        for name, line, at_runtime in imports(ast.parse(source))
        if (why := broken_rule(module, name, at_runtime))
    ]


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether it happens at runtime); `from a import b` gives a.b."""
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    typing_only = {
        node
        for guard in guards
        if ast.unparse(guard.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in guard.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = ""
            if isinstance(node, ast.ImportFrom):
                origin = "." * node.level + (node.module or "") + "."
            for alias in node.names:
                yield origin + alias.name, node.lineno, node not in typing_only


def broken_rule(module: str, name: str, at_runtime: bool) -> str | None:
    root, *path = name.split(".")
    here = module.split(".")[1:]
    if not root:
        return "relative imports hide the layer"
    if root in OUTSIDE:
        return f"{root}/ is not part of the package (dspark.{root}, if there is one)"
    if here[0] == "scheduling" and root not in SCHEDULING_MAY_USE:
        return "scheduling takes the standard library and numpy only"
    if ".".join(here) in TORCH_FREE and root == "torch" and at_runtime:
        return "what needs no model loads this without torch: move it under TYPE_CHECKING"
    if root != "dspark" or path == ["__version__"]:
        return None
    if not path or path[0] not in RANK:
        return "import the defining module, by a name that LAYERS knows"
    if RANK[path[0]] > RANK.get(here[0], len(LAYERS)):  # no layer: another test says so
        return f"{path[0]} is a layer above {here[0]}"
    if {here[0], path[0]} == STRANGERS:
        return "decoding and scheduling stay apart"
    if here[0] == path[0] == "services" and here[1:2] != path[1:2]:
        return "services meet in protos/, never in Python"
    return None


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module but dspark/__init__.py, which is the façade."""
    for entry in sorted(PACKAGE.iterdir()):  # rglob does not follow the two links by itself
        for path in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
            if path.suffix == ".py" and path != PACKAGE / "__init__.py":
                dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                yield dotted.removesuffix(".__init__"), path


def test_the_package_keeps_to_its_layers() -> None:
    found = [line for name, path in modules() for line in violations(name, path.read_text("utf-8"))]
    assert not found, "\n" + "\n".join(found)


def test_every_module_has_a_layer() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    unknown = entries - RANK.keys() - {"__init__", "__pycache__"}
    assert not unknown, f"give {sorted(unknown)} a place in LAYERS"


def loaded_with(names: Iterable[str], of: set[str]) -> str:
    """Which of the packages `of` are loaded with modules, also by what these import."""
    script = f"import sys, {', '.join(names)}; print(*({of!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_scheduling_loads_neither_torch_nor_ray() -> None:
    names = [name for name, _ in modules() if name.startswith("dspark.scheduling")]
    assert loaded_with(names, {"torch", "ray"}) == ""


def test_what_deploys_the_services_loads_no_torch() -> None:
    """It takes seconds, for each application that Serve builds and for `dspark serve` itself."""
    names = [f"dspark.services.{role.name}.app" for role in APPLICATIONS]
    assert loaded_with([*names, "dspark.cli.local_cluster"], {"torch", "transformers"}) == ""


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("dspark.engine.llm", "from dspark.rpc import channel", "rpc is a layer above engine"),
        ("dspark.engine.llm", "import dspark.services.draft.app", "a layer above"),
        ("dspark.models.target", "from dspark import engine", "engine is a layer above models"),
        ("dspark.config", "def f():\n    import dspark.cli", "cli is a layer above config"),
        ("dspark.wire", "if TYPE_CHECKING:\n    import dspark.cli", "cli is a layer above wire"),
        ("dspark.engine.llm", "from dspark import LLM", "import the defining module"),
        ("dspark.engine.llm", "import dspark", "import the defining module"),
        ("dspark.engine.llm", "from . import pages", "relative"),
        ("dspark.decoding.law", "import dspark.scheduling.planner", "stay apart"),
        ("dspark.scheduling.planner", "from dspark.decoding import law", "stay apart"),
        ("dspark.scheduling.planner", "import torch", "standard library and numpy"),
        ("dspark.scheduling.planner", "if TYPE_CHECKING:\n    import ray", "standard library"),
        ("dspark.services.draft.app", "from dspark.services import gateway", "services meet"),
        ("dspark.services.draft.app", "from dspark.services.gateway.app import f", "services meet"),
        ("dspark.types", "from torch import Tensor", "without torch"),
        ("dspark.wire.requests", "import torch", "without torch"),
        ("dspark.types", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "without torch"),
        ("dspark.engine.llm", "from kernels.dispatch import attend", "not part of the package"),
        ("dspark.cli", "import examples.demo", "not part of the package"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, why: str) -> None:
    (line,) = violations(module, source)
    assert why in line


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dspark.engine.llm", "import torch\nfrom dspark.models.target import Target"),
        ("dspark.config", "from dspark.errors import ConfigError"),
        ("dspark.rpc.channel", "from dspark.pb import common_pb2\nfrom dspark.wire import plans"),
        ("dspark.evaluation.run", "from dspark.simulation import clock"),
        ("dspark.scheduling.planner", "import math\nimport numpy as np\nfrom dspark import types"),
        ("dspark.services.draft.app", "import ray\nfrom dspark.services.draft import batching"),
        ("dspark.types", "if TYPE_CHECKING:\n    import torch"),
        ("dspark.cli", "from dspark import __version__\nimport dspark.services.gateway.app"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
