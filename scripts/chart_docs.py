"""Writes docs/helm.md from values.yaml; with --check, fails if the committed page is stale.

A comment that begins with `# -- ` describes the key below it. A plain comment right above a group
heads its table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
VALUES = ROOT / "deploy" / "helm" / "dspark" / "values.yaml"
PAGE = ROOT / "docs" / "helm.md"
KEY = re.compile(r"^( *)([A-Za-z]\w*):")

HEAD = """\
# The Helm chart

`deploy/helm/dspark` installs the service on a Kubernetes cluster that has KubeRay 1.7 or newer.

```bash
kubectl create namespace dspark
kubectl label namespace dspark pod-security.kubernetes.io/enforce=restricted
helm install dspark deploy/helm/dspark -n dspark -f deploy/helm/dspark/values-trial.yaml
kubectl -n dspark wait rayservice/dspark --for=condition=Ready --timeout=15m
helm test dspark -n dspark
```

`values-trial.yaml` needs no GPU. `values-l4-h100.yaml` has drafts on L4s and verifiers on H100s.
`values-production.yaml`, given after a profile of hardware, switches on what users should be
behind. An unknown key, or a combination that cannot work, is refused before anything is installed,
and the message names the key and the remedy.

Keys from `model` to `network` and the four replica counts are tuned in place. What else changes
pods makes a second Ray cluster beside the first until it answers.

`make chart-check` lints the chart and checks what it renders. This page is written by
`make chart-docs` from the comments of `values.yaml`.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key that a user may set."""

    path: tuple[str, ...]
    value: Any
    meaning: str


def entries(text: str) -> tuple[list[Entry], dict[str, str]]:
    """The described keys of values.yaml in its order, and what heads each group.

    ValueError if a key has no description, or a description no key.
    """
    values = yaml.safe_load(text)
    found: list[Entry] = []
    heads: dict[str, str] = {}
    path: tuple[str, ...] = ()
    comment: list[str] = []
    covered: tuple[str, ...] | None = None  # a described mapping: its own keys need no description
    for line in text.splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip()[1:].strip())
            continue
        match = KEY.match(line)
        if match:
            path = (*path[: len(match[1]) // 2], match[2])
            inside = covered is not None and path[: len(covered)] == covered and path != covered
            if comment and comment[-1].startswith("-- "):
                covered = path
                found.append(Entry(path, at(values, path), comment[-1][3:]))
            elif not inside and not isinstance(at(values, path), dict):
                raise ValueError(f"{'.'.join(path)} has no description: write `# -- …` above it")
            elif comment and not inside:
                heads[".".join(path)] = " ".join(comment)
        comment = []
    return found, heads


def at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list"}
    return names.get(type(value), "mapping")


def page(text: str) -> str:
    """The whole page."""
    found, heads = entries(text)
    tables: dict[str, list[Entry]] = {}
    for entry in found:
        group = "Top level" if len(entry.path) == 1 else f"`{entry.path[0]}`"
        if entry.path[0] == "pools":
            group = f"`{'.'.join(entry.path[:2])}`"
        tables.setdefault(group, []).append(entry)
    lines = [HEAD.rstrip()]
    for group, rows in tables.items():
        lines += ["", f"## {group}", ""]
        if head := heads.get(group.strip("`")):
            lines += [head, ""]
        lines += ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
        for entry in rows:
            shown = json.dumps(entry.value, ensure_ascii=False)
            cells = (f"`{'.'.join(entry.path)}`", kind(entry.value), f"`{shown}`", entry.meaning)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    check = parser.parse_args().check
    try:
        fresh = page(VALUES.read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"chart_docs: {error}", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")
        print(f"chart_docs: wrote {PAGE.relative_to(ROOT)}")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != fresh:
        print(
            "chart_docs: docs/helm.md is stale; run `make chart-docs` and commit", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
