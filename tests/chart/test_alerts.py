"""Alerts and dashboards: each expression is PromQL, over metrics and labels that Ray exports."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from helpers.chart import CHART, cases, render

# What the PodMonitor's podTargetLabels and a histogram add.
ADDED = {"app_kubernetes_io_instance", "app_kubernetes_io_component", "le"}
# What Serve gives to the metrics of its processes, beside their own tag_keys.
OF_SERVE = {"application", "deployment", "replica"}
ENDINGS = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
# Serve's metrics, and those of nodes.
SOURCES = ("serve/_private/*.py", "dashboard/modules/reporter/reporter_agent.py")


@cache
def exported() -> dict[str, set[str]]:
    """Labels of the metrics that the installed Ray exports, by a pattern of their names."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, set[str]] = {}
    for source in SOURCES:
        for path in Path(spec.origin).parent.glob(source):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    found |= metric(node)
    return found


def metric(call: ast.Call) -> dict[str, set[str]]:
    """What a call makes, if it makes a metric."""
    kind = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = {word.arg: word.value for word in call.keywords}
    name = given.get("name", call.args[0] if call.args else None)
    if kind not in ENDINGS or not isinstance(name, ast.Constant | ast.JoinedStr):
        return {}
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    said = "".join(str(p.value) if isinstance(p, ast.Constant) else "[a-z]+" for p in parts)
    keys = ast.walk(given.get("tag_keys", ast.Tuple(elts=[])))
    labels = {str(key.value) for key in keys if isinstance(key, ast.Constant)} | OF_SERVE
    return {f"ray_{said.removesuffix('_total')}{ending}": labels for ending in ENDINGS[kind]}


def selectors(expression: Any) -> Iterator[Any]:
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(expression, visit)
    yield from found


def wrong(text: str) -> list[str]:
    """What is amiss with an expression."""
    try:
        expression = promql_parser.parse(text)
    except ValueError as error:
        return [f"{text}: {error}"]
    faults = []
    for selector in selectors(expression):
        labels = next(
            (of for name, of in exported().items() if re.fullmatch(name, selector.name)), None
        )
        if labels is None:
            faults.append(f"{text}: Ray exports no {selector.name}")
            continue
        asked = {one.name for one in selector.matchers.matchers}
        if unknown := asked - labels - ADDED:
            faults.append(f"{text}: {selector.name} has no label {', '.join(sorted(unknown))}")
        if "app_kubernetes_io_instance" not in asked:
            faults.append(f"{text}: {selector.name} is not of this release alone")
    return faults


@pytest.mark.parametrize("case", ["production", "grid-1"])
def test_alerts_are_of_metrics_that_there_are(case: str) -> None:
    values = {**cases()[case], "monitoring": {"prometheusRule": {"enabled": True}}}
    (rule,) = render(values).of("PrometheusRule")
    rules = [one for group in rule["spec"]["groups"] for one in group["rules"]]
    assert len(rules) >= 6
    assert [fault for one in rules for fault in wrong(one["expr"])] == []
    for one in rules:  # {{ $labels.x }} of a label that the expression has thrown away is empty
        said = " ".join(one["annotations"].values())
        for label in re.findall(r"\$labels\.(\w+)", said):
            assert f"by ({label})" in one["expr"], one["alert"]


def test_dashboards_are_of_metrics_that_there_are() -> None:
    expressions = [
        target["expr"]
        for path in CHART.glob("dashboards/*.json")
        for panel in json.loads(path.read_text("utf-8"))["panels"]
        for target in panel.get("targets", [])
    ]
    assert len(expressions) > 10
    rates = [one.replace("$__rate_interval", "5m") for one in expressions]
    assert [fault for one in rates for fault in wrong(one)] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("sum(rate(ray_serve_num_http_requests_total[5m])", "unclosed left parenthesis"),
        ("rate(ray_serve_num_http_requests_total)", "expected type matrix"),
        ("ray_serve_application_state", "Ray exports no ray_serve_application_state"),
        ('ray_serve_application_status{app="x"}', "ray_serve_application_status has no label app"),
        ("ray_serve_application_status", "not of this release alone"),
    ],
)
def test_a_slip_would_be_found(text: str, fault: str) -> None:
    assert fault in " ".join(wrong(text))
