"""`dspark eval`: how good drafters are, in the real loop."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import typer

from dspark.cli.console import err, out, progress_bar, reported_errors


def evaluate(
    context: typer.Context,
    prompts: list[Path] = typer.Option(
        ..., help='JSONL: {"prompt": "…"} or {"turns": ["…", …]} a line. Repeat for several files.'
    ),
    target: str = typer.Option("smollm2-135m", help="Built-in name, folder or Hugging Face id."),
    drafter: str = typer.Option("", help="As for serve; default: the one shipped for the target."),
    compare: list[str] = typer.Option(
        [], help="Another drafter, on the same prompts and seeds. Repeat for several."
    ),
    mode: list[str] = typer.Option(
        ["rejection"], help="rejection or coupled. Repeat to compare both."
    ),
    limit: int = typer.Option(0, min=0, help="Use the first N prompts of each file; 0: all."),
    tokens: int = typer.Option(128, min=2, help="New tokens a prompt, at most."),
    temperature: float = typer.Option(0.0, help="0 is greedy. Prompt i has the seed i."),
    block_size: int = typer.Option(0, min=0, help="Draft tokens a round; 0: the drafter's own."),
    concurrency: int = typer.Option(
        8, min=1, help="Prompts at a time; does not change the result."
    ),
    calibrate_on: Path | None = typer.Option(
        None, help="JSONL of prompts to calibrate on; default: cross-fitting, half by half."
    ),
    save_calibration: bool = typer.Option(
        False,
        "--save-calibration",
        help="Write what was fitted on --calibrate-on into the drafter's folder.",
    ),
    dtype: str = typer.Option("bfloat16", help="float32, bfloat16 or float16."),
    report: Path | None = typer.Option(
        None, help="Folder for the paper's figures as PNG and one HTML page with everything."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON with machine and versions."),
) -> None:
    """Accepted length τ, acceptance by position, and confidences against what came of them.

    Every drafted token is verified. τ counts tokens a verification step, the target's own included.
    Acceptance by position is conditional: of the tokens whose predecessors were all accepted, the
    share accepted. docs/evaluation.md says what each figure means and how intervals are made.
    """
    with reported_errors():
        from dspark.cli.evaluation_tables import tables
        from dspark.errors import ConfigError
        from dspark.evaluation.measuring import measure
        from dspark.evaluation.plots import require_matplotlib
        from dspark.evaluation.prompts import read_files, read_prompts
        from dspark.evaluation.provenance import provenance
        from dspark.evaluation.report import prepare_folder, write_report
        from dspark.evaluation.running import EvaluationPlan, run, save_fit
        from dspark.types import SamplingParams, VerifyMode

        if unknown := [name for name in mode if name not in tuple(VerifyMode)]:
            raise ConfigError(f"--mode must be one of {', '.join(VerifyMode)}; got {unknown[0]!r}")
        if save_calibration and calibrate_on is None:
            raise ConfigError(
                "--save-calibration needs --calibrate-on: what is saved must not be fitted on the "
                "prompts of an evaluation"
            )
        plan = EvaluationPlan(
            target=target,
            drafters=(drafter, *compare),
            modes=tuple(map(VerifyMode, mode)),
            files=read_files(prompts, limit),
            held_out=(str(calibrate_on), read_prompts(calibrate_on)) if calibrate_on else None,
            tokens=tokens,
            temperature=temperature,
            block_size=block_size,
            concurrency=concurrency,
            dtype=dtype,
        )
        if report is not None:
            require_matplotlib()
            prepare_folder(report)
        err.print("loading …")
        with progress_bar() as bar:
            task = bar.add_task("answers", total=plan.answers)
            arms = run(plan, lambda done: bar.update(task, completed=done))
        evaluation = measure(arms)
        about = {"command": _command(context), **provenance()}
        if as_json:
            typer.echo(json.dumps({**asdict(evaluation), **about}, indent=2, allow_nan=False))
        else:
            for table in tables(evaluation):
                out.print(table)
        if report is not None:
            page = write_report(evaluation, about, report)
            err.print(f"the report is {page}", highlight=False)
        if save_calibration:
            sampling = SamplingParams(temperature=temperature)
            err.print(
                f"the calibration is in {save_fit(arms[0], target, greedy=sampling.greedy)}",
                highlight=False,
            )


def _command(context: typer.Context) -> str:
    """As it was given, quoted for a shell."""
    words = ["dspark", str(context.info_name)]
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(option.name)]
        if value is True:
            words.append(option.opts[0])
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [option.opts[0], str(one)]
    return shlex.join(words)
