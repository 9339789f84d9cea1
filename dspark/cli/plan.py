"""`dspark plan explain`: why the last steps verified what they did, and what came of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dspark.cli.connection import TLS_CA, TLS_CERT, TLS_KEY, service_transport
from dspark.cli.console import err, out, reported_errors

if TYPE_CHECKING:
    from dspark.rpc.transport import Transport
    from dspark.scheduling.explanation import StepExplanation

app = typer.Typer(help="See what verifiers plan from step to step, and what comes of it.")


@dataclass(frozen=True, slots=True)
class _Explained:
    """One verifier's steps."""

    verifier: str
    steps: list[StepExplanation]
    throughput: dict[str, Any] | None = None  # None: no step has been planned by a search yet


@app.callback()
def _group() -> None:
    """Or typer would make the one command the whole of `dspark plan`."""


@app.command("explain")
def explain(
    scheduler: str = typer.Option(
        "", help="host:port of the cluster's scheduler; `dspark serve` prints it."
    ),
    verifier: str = typer.Option("", help="Incarnation of one verifier; default: all."),
    prompts: Path | None = typer.Option(
        None, help="Without a cluster: answer the prompts of this JSONL here, as for generate."
    ),
    target: str = typer.Option("smollm2-135m", help="Model to load, with --prompts."),
    drafter: str = typer.Option("", help="As for serve, with --prompts."),
    temperature: float = typer.Option(1.0, help="0 is greedy; with --prompts."),
    max_tokens: int = typer.Option(64, min=1, help="Tokens an answer; with --prompts."),
    steps: int = typer.Option(1, min=1, max=64, help="Steps of each verifier, the latest last."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    tls_ca: str = TLS_CA,
    tls_cert: str = TLS_CERT,
    tls_key: str = TLS_KEY,
) -> None:
    """Show each request's survivals, what was verified and accepted, and Θ predicted and measured.

    Draft tokens left of the bar were verified; request ids are shown, never text.
    """
    with reported_errors():
        from dspark.cli.plan_tables import show_step, throughput_line
        from dspark.errors import ConfigError

        if bool(scheduler) == (prompts is not None):
            raise ConfigError("give either --scheduler HOST:PORT or --prompts FILE")
        failed = False
        if prompts is None:
            explained, failed = _of_cluster(
                scheduler, verifier, steps, service_transport(tls_ca, tls_cert, tls_key)
            )
        else:
            explained = [_in_process(prompts, target, drafter, temperature, max_tokens, steps)]
        if as_json:
            typer.echo(json.dumps([_as_json(one) for one in explained], indent=2))
        else:
            for one in explained:
                out.print(throughput_line(one.verifier, one.throughput), soft_wrap=True)
                if not one.steps:
                    out.print("no step yet")
                for step in one.steps:
                    show_step(step, out)
        if failed:
            raise typer.Exit(1)


def _of_cluster(
    scheduler: str, name: str, count: int, transport: Transport
) -> tuple[list[_Explained], bool]:
    """Each verifier that answers, and whether one did not."""
    from google.protobuf.json_format import MessageToDict

    from dspark.cli.plan_tables import printable
    from dspark.errors import DSparkError
    from dspark.rpc.explaining import describe, explain_steps, verifiers_of

    cluster = describe(scheduler, transport)
    throughputs = {
        status.incarnation: MessageToDict(
            status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for status in cluster.throughputs
    }
    explained, failed = [], False
    for replica in verifiers_of(cluster, name):
        try:
            steps = explain_steps(replica.address, count, transport)
        except DSparkError as error:
            failed = True
            told = printable(f"{replica.incarnation}: {error}")
            err.print(told, markup=False, highlight=False, soft_wrap=True)
            continue
        throughput = throughputs.get(replica.incarnation)
        explained.append(_Explained(replica.incarnation, steps, throughput))
    return explained, failed


def _in_process(
    prompts: Path, target: str, drafter: str, temperature: float, max_tokens: int, count: int
) -> _Explained:
    from dspark.engine.llm import LLM
    from dspark.evaluation.prompts import read_prompts
    from dspark.types import SamplingParams

    texts = read_prompts(prompts)
    err.print("loading and profiling …")
    llm = LLM(target, drafter)
    llm.generate(texts, SamplingParams(temperature=temperature, max_tokens=max_tokens))
    return _Explained("in process", llm.verifier.explain(count))


def _as_json(one: _Explained) -> dict[str, Any]:
    return {
        "verifier": one.verifier,
        "throughput": one.throughput,
        "steps": [
            {
                **asdict(step),
                "predicted_tokens_per_s": step.predicted_per_s,
                "measured_tokens_per_s": step.measured_per_s,
            }
            for step in one.steps
        ],
    }
