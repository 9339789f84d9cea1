"""`dspark serve`: the four services on this machine."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import typer

from dspark.cli.console import err, out, reported_errors


def serve(
    config_file: Path | None = typer.Option(
        None, "--config", help="YAML or JSON with any setting of ServeConfig; options go over it."
    ),
    target: str | None = typer.Option(None, help="Built-in name, folder or Hugging Face id."),
    drafter: str | None = typer.Option(
        None,
        help="Folder or id of a DSpark drafter or a small causal LM of the same vocabulary, "
        "'prompt-lookup', or 'none' for plain decoding; default: the one shipped.",
    ),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16."),
    tensor_parallel: int | None = typer.Option(None, help="GPUs that share one verifier's target."),
    policy: str | None = typer.Option(None, help="adaptive, fixed or off."),
    http_port: int | None = typer.Option(None, help="Port of the OpenAI-compatible endpoints."),
    grpc_port: int | None = typer.Option(None, help="Port of dspark.v1.Inference."),
    host: str | None = typer.Option(None, help="Address to listen on; 0.0.0.0 for all."),
    verifiers: int | None = typer.Option(None, help="Verifier replicas."),
    drafts: int | None = typer.Option(None, help="Draft replicas; 0: none."),
    store_url: str | None = typer.Option(None, help="redis://… ; default: in process."),
) -> None:
    """Run gateway, scheduler, verifier and draft on local Ray until Ctrl-C, then drain."""
    with reported_errors():
        from dspark.cli.local_cluster import LocalCluster
        from dspark.config import ServeConfig, build, read_settings

        settings = read_settings(config_file) if config_file else {}
        _override(
            settings,
            "model",
            target=target,
            drafter=drafter,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
        )
        _override(settings, "engine", policy=policy)
        _override(settings, "scheduler", store_url=store_url)
        _override(
            settings,
            "gateway",
            http_port=http_port,
            grpc_port=grpc_port,
            http_host=host,
            grpc_host=host,
        )
        for key, value in (("verifier_replicas", verifiers), ("draft_replicas", drafts)):
            if value is not None:
                settings[key] = value
        config = build(ServeConfig, settings)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        with LocalCluster(config, lambda line: err.print(line, highlight=False)) as cluster:
            out.print(f"[bold]model[/]  {config.model.target}", highlight=False)
            out.print(f"[bold]HTTP[/]   {cluster.http_url}/v1", highlight=False)
            out.print(
                f"[bold]gRPC[/]   {cluster.grpc_address} (dspark.v1.Inference)", highlight=False
            )
            out.print(
                f"[bold]steps[/]  dspark plan explain --scheduler {cluster.scheduler_address}",
                highlight=False,
            )
            out.print("Ctrl-C drains and stops.")
            stop.wait()
            err.print("draining …")


def _override(settings: dict[str, Any], group: str, **options: object) -> None:
    """Put the options that were given over what the file says."""
    given = {key: value for key, value in options.items() if value is not None}
    if given:
        settings[group] = {**settings.get(group, {}), **given}
