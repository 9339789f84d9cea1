"""Runs the checks and shows what they found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspark.cli.kube_doctor.access import open_api

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@dataclass(frozen=True, slots=True)
class Options:
    """As they come from the command line."""

    kubeconfig: str = ""
    context: str = ""
    namespace: str = ""  # empty: the context's
    release: str = ""  # empty: look at the cluster before an install
    values: list[Path] = field(default_factory=list)
    manifests: str = ""
    chart: Path | None = None
    store_url: str = ""
    from_zero: bool = False
    as_json: bool = False


def run(options: Options, console: Console) -> bool:
    """Whether nothing failed. ConfigError and UnavailableError where nothing could be looked at."""
    api, own_namespace = open_api(options.kubeconfig, options.context)
    # Only now: they need the package `kubernetes`.
    from dspark.cli.kube_doctor.after import check_after
    from dspark.cli.kube_doctor.before import check_before
    from dspark.cli.kube_doctor.chart import wanted_by
    from dspark.cli.kube_doctor.findings import Level
    from dspark.cli.kube_doctor.reader import Reader

    namespace = options.namespace or own_namespace
    reader, now = Reader(api), datetime.now(UTC)
    try:
        if options.release:
            found = list(check_after(reader, options.release, namespace, now))
        else:
            wanted = wanted_by(
                options.values, options.manifests, options.chart, "dspark", namespace
            )
            if options.store_url:
                wanted = replace(wanted, redis_urls=(options.store_url,))
            found = list(check_before(reader, wanted, namespace, now, from_zero=options.from_zero))
    finally:
        api.rest_client.pool_manager.clear()
    failures = sum(finding.level is Level.FAILED for finding in found)
    if options.as_json:
        report = {
            "namespace": namespace,
            "release": options.release,
            "failed": failures,
            "warnings": sum(finding.level is Level.WARNING for finding in found),
            "findings": [asdict(finding) for finding in found],
        }
        json.dump(report, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _show([(f.level.value, f.check, f.got, f.remedy) for f in found], console)
    return not failures


def _show(rows: Iterable[tuple[str, str, str, str]], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "got", "what to do"):
        table.add_column(heading, overflow="fold")
    for level, check, got, remedy in rows:
        table.add_row(Text(level, _STYLES[level]), Text(check), Text(got), Text(remedy, "dim"))
    console.print(table)
