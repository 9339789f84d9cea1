"""Objects against schemas, unknown fields refused: Kubernetes' own, and those of operators."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

SCHEMAS = Path(__file__).resolve().parents[1] / "chart" / "schemas"
VERSIONS = ("1.33", "1.35", "1.36")
# It reads megabytes of definitions anew for each object: read them once.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)


@cache
def operators() -> dict[str, jsonschema.Draft202012Validator]:
    """By apiVersion/Kind."""
    found = {}
    for path in SCHEMAS.glob("*.json"):
        for kind, schema in json.loads(path.read_text("utf-8"))["kinds"].items():
            found[kind] = jsonschema.Draft202012Validator(schema)
    return found


def faults(one: Mapping[str, Any]) -> list[str]:
    """What is wrong with an object in any version; a custom one is searched for pods."""
    kind = f"{one['apiVersion']}/{one['kind']}"
    if kind not in operators():
        return _kubernetes(json.dumps(one, sort_keys=True))
    wrong = [f"{e.json_path}: {e.message[:300]}" for e in operators()[kind].iter_errors(one)]
    for part in _wrapped(one):
        wrong += _kubernetes(json.dumps(part, sort_keys=True))
    return wrong


@cache
def _kubernetes(text: str) -> list[str]:
    wrong = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(json.loads(text), version, strict=True)
        except kubernetes_validate.ValidationError as error:
            wrong.append(f"Kubernetes {version}: {error.path}: {error.message[:300]}")
    return wrong


def _wrapped(one: Any) -> Iterator[dict[str, Any]]:
    """What a custom object holds of Kubernetes' own types, as whole objects."""
    if isinstance(one, Mapping):
        template = one.get("template")
        if isinstance(template, Mapping) and "spec" in template:
            meta = {"name": "x", **template.get("metadata", {})}
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
        if "autoscalerOptions" in one:
            fields = ("resources", "securityContext", "env", "envFrom", "volumeMounts")
            given = {k: v for k, v in one["autoscalerOptions"].items() if k in fields}
            spec = {"containers": [{"name": "autoscaler", **given}]}
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        for value in one.values():
            yield from _wrapped(value)
    elif isinstance(one, list):
        for value in one:
            yield from _wrapped(value)
