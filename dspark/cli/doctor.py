"""`dspark doctor`: is this machine ready, and if not, what to do."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from dspark.cli.console import out, reported_errors
from dspark.cli.kube_doctor.command import Options, run
from dspark.errors import DSparkError

_PACKAGES = ("ray", "torch", "transformers", "grpcio", "protobuf", "redis")
_MEMORY_GB = 4.0
_DISK_GB = 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found and, unless all is well, what to do."""

    well: bool
    what: str
    remedy: str = ""


def doctor(
    target: str = typer.Option("smollm2-135m", help="The target that will be served."),
    drafter: str = typer.Option("", help="Its drafter; default: the one shipped."),
    http_port: int = typer.Option(8000, help="Port to be used for HTTP."),
    grpc_port: int = typer.Option(50051, help="Port to be used for gRPC."),
    store_url: str = typer.Option("", help="Redis to be used, if any."),
    kube: bool = typer.Option(False, "--kube", help="Check a Kubernetes cluster instead."),
    values: list[Path] = typer.Option([], help="--kube: values of the chart; helm renders them."),
    manifests: str = typer.Option("", help="--kube: output of `helm template`; -: from stdin."),
    chart: Path | None = typer.Option(None, help="--kube: the chart, if it is not beside."),
    release: str = typer.Option("", help="--kube: look at this release, after its install."),
    namespace: str = typer.Option("", "--namespace", "-n", help="--kube: default: the context's."),
    kubeconfig: str = typer.Option("", help="--kube: default: as kubectl finds it."),
    context: str = typer.Option("", help="--kube: default: the kubeconfig's current one."),
    nodes_from_zero: bool = typer.Option(
        False, "--nodes-from-zero", help="--kube: nodes come when pods wait for them."
    ),
    as_json: bool = typer.Option(False, "--json", help="--kube: as JSON."),
) -> None:
    """Check versions, processor, memory, disk, ports, models and Redis. Status 1 if any fails.

    With --kube: is a cluster ready for the chart, or, with --release, what of it is not healthy.
    """
    cluster = Options(
        values=values,
        manifests=manifests,
        chart=chart,
        release=release,
        namespace=namespace,
        kubeconfig=kubeconfig,
        context=context,
        from_zero=nodes_from_zero,
        as_json=as_json,
    )
    if kube:
        with reported_errors():
            if not run(replace(cluster, store_url=store_url), out):
                raise typer.Exit(1)
        return
    if cluster != Options():
        raise typer.BadParameter("an option that was given is for --kube: add it")
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        _machine,
        lambda: _port(http_port, "--http-port"),
        lambda: _port(grpc_port, "--grpc-port"),
        lambda: _models(target, drafter),
        lambda: _store(store_url),
    ]
    bad = 0
    for check in checks:
        for finding in check():
            mark = "[green]ok  [/]" if finding.well else "[red]fail[/]"
            out.print(f"{mark} {finding.what}", highlight=False)
            if not finding.well:
                bad += 1
                out.print(f"     → {finding.remedy}", highlight=False)
    if bad:
        raise typer.Exit(1)


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding(sys.version_info >= (3, 11), f"Python {python}", "use Python 3.11 or newer")
    for name in _PACKAGES:
        try:
            yield Finding(True, f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(False, f"{name} is not installed", "pip install dspark-serve")


def _machine() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield Finding(True, f"GPU {i}: {torch.cuda.get_device_name(i)}")
    else:
        from dspark.kernels.cpu import library

        yield Finding(True, f"no GPU; {os.cpu_count()} CPU cores")
        if library.load() is not None:
            yield Finding(True, f"bf16 layers run on C++ operators ({library.instruction_set()})")
        else:
            yield Finding(
                bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
                "bf16 layers run on torch alone",
                "this CPU has no bf16 instructions, and torch is a hundred times slower without: "
                "install a C++ compiler (g++) if it has AVX2, or choose float32",
            )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding(
        memory >= _MEMORY_GB, f"{memory:.1f} GB of memory", f"{_MEMORY_GB:.0f} GB are needed"
    )
    from dspark.config import cache_folder

    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    yield Finding(
        free >= _DISK_GB,
        f"{free:.1f} GB free under {folder}",
        f"{_DISK_GB:.0f} GB are needed: make room or set DSPARK_CACHE",
    )


def _port(port: int, option: str) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            yield Finding(
                False, f"port {port}: {error.strerror}", f"stop what holds it or use {option}"
            )
        else:
            yield Finding(True, f"port {port} is free")


def _models(target: str, drafter: str) -> Iterator[Finding]:
    from transformers import AutoConfig

    from dspark.config import ModelConfig
    from dspark.models.builtin import resolve_target
    from dspark.models.causal_drafter import check_vocabulary, is_causal_lm
    from dspark.models.checkpoint import read_config
    from dspark.models.drafter_folder import drafter_folder

    try:
        config = AutoConfig.from_pretrained(resolve_target(target)).get_text_config()
        yield Finding(True, f"target {target}: {config.model_type}, {config.hidden_size} wide")
        folder = drafter_folder(ModelConfig(target=target, drafter=drafter))
        if folder is None:
            yield Finding(
                False,
                f"no drafter for {target}: it would be drafted for by prompt lookup alone",
                "train one with `dspark train`, or name a causal LM of the same vocabulary",
            )
            return
        if is_causal_lm(folder):
            check_vocabulary(folder, target, config.vocab_size)
            yield Finding(True, f"drafter {folder.name}: a causal LM of the target's vocabulary")
            return
        made_for = read_config(folder)
        fits = (made_for.vocab_size, made_for.target_hidden_size) == (
            config.vocab_size,
            config.hidden_size,
        )
        yield Finding(
            fits,
            f"drafter {drafter or folder.name}: γ {made_for.block_size}, draft vocabulary "
            f"{made_for.draft_vocab_size}",
            f"it was made for a target of width {made_for.target_hidden_size} and vocabulary "
            f"{made_for.vocab_size}",
        )
    except (DSparkError, OSError, ValueError) as error:
        yield Finding(False, f"target {target}", str(error))


def _store(url: str) -> Iterator[Finding]:
    if not url:
        yield Finding(True, "store: in process (no --store-url)")
        return
    import asyncio

    from dspark.store import open_store

    async def ask() -> None:
        store = open_store(url)
        try:
            await store.list("dspark-doctor/")
        finally:
            await store.close()

    try:
        asyncio.run(ask())
    except DSparkError as error:
        yield Finding(False, "store", str(error))
    else:
        yield Finding(True, "store: Redis answers")
