"""`dspark train`: a drafter from nothing but its target."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from dspark.cli.console import err, progress_bar, reported_errors
from dspark.cli.console import out as out_console
from dspark.errors import ConfigError

SHIPPED = "shipped"  # for --start-from

if TYPE_CHECKING:
    from dspark.training.job import TrainJob
    from dspark.training.memory import Memory
    from dspark.training.text import TextConfig
    from dspark.training.trainer import Measures


class Head(StrEnum):
    """As the checkpoints call them."""

    VANILLA = "vanilla"
    GATED = "gated"
    RNN = "rnn"
    NONE = "none"


def train(
    context: typer.Context,
    out: Path = typer.Option(..., help="Folder for text, training state and the checkpoint."),
    target: str = typer.Option("smollm2-135m", help="Built-in name, folder or Hugging Face id."),
    start_from: str = typer.Option(
        "",
        help="Folder or id of a drafter whose shape and weights to go on from; 'shipped': the one "
        "that comes for the target.",
    ),
    tokens: int = typer.Option(1_000_000, min=1, help="Answer tokens that the target writes."),
    steps: int = typer.Option(2000, min=1, help="Training steps."),
    block_size: int = typer.Option(7, min=1, max=64, help="γ: draft tokens a block."),
    layers: int = typer.Option(2, min=1, help="Drafter layers."),
    intermediate: int = typer.Option(0, help="Width of their MLP; 0: the target's."),
    kv_heads: int = typer.Option(0, help="KV heads of the drafter; 0: as many as query heads."),
    head: Head = typer.Option(Head.VANILLA, help="Sequential head; none: a DFlash drafter."),
    markov_rank: int = typer.Option(128, min=1, help="Rank of the sequential head."),
    fill_in: bool = typer.Option(
        False, "--fill-in", help="γ masks after the anchor, whose own row predicts nothing."
    ),
    draft_vocab: int = typer.Option(8192, min=1, help="Most frequent tokens that can be drafted."),
    context_window: int = typer.Option(512, min=0, help="Context rows a block sees; 0: all."),
    target_layers: str = typer.Option("", help="Layers to tap, such as 8,18,28; default: spread."),
    mask_token: str = typer.Option("", help="Token that stands for a position to draft."),
    learning_rate: float = typer.Option(6e-4, help="Peak, after a warm-up; cosine to zero."),
    markov_lr_factor: float = typer.Option(1.5, help="Of the Markov head over the rest."),
    ce_weight: float = typer.Option(0.1, help="Weight of cross-entropy (the paper: 0.1)."),
    tv_weight: float = typer.Option(0.9, help="Weight of total variation (the paper: 0.9)."),
    temperatures: str = typer.Option("0,0.7,1", help="Of the answers written; drawn evenly."),
    updates: int = typer.Option(6, min=1, help="Drafter updates a step."),
    max_tokens: int = typer.Option(512, min=32, help="What is longer of a conversation is cut."),
    conversations: int = typer.Option(4, min=1, help="Conversations a step."),
    anchors: int = typer.Option(160, min=1, help="Blocks an update."),
    average_decay: float = typer.Option(
        0.998,
        min=0.0,
        max=0.99999,
        help="Of the weights' average, which is what is saved; 0: none.",
    ),
    workers: int = typer.Option(
        1, min=1, help="Data-parallel workers, through Ray Train; or start it under torchrun."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Say how much memory it takes, and stop."
    ),
    concurrency: int = typer.Option(64, min=1, help="Conversations written at a time."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, …"),
    seed: int = typer.Option(0, min=0),
) -> None:
    """Train a drafter on text that its target writes; run it again to go on after a cut.

    The target first writes conversations (OUT/text.jsonl), then the drafter trains on them
    (state in OUT/trainer.pt) while the target's hidden states are captured as they are needed.
    The checkpoint is OUT/checkpoint: give it to other commands as --drafter.
    """
    with reported_errors():
        from dspark.models.builtin import resolve_target
        from dspark.models.checkpoint import read_config
        from dspark.models.tokenizer import load_tokenizer
        from dspark.training.job import CHECKPOINT, TrainJob
        from dspark.training.memory import training_memory
        from dspark.training.peers import under_torchrun
        from dspark.training.shape import drafter_config
        from dspark.training.text import TextConfig
        from dspark.training.trainer import TrainConfig
        from dspark.training.workers import run_on_workers

        begin = _drafter_to_start_from(start_from, target) if start_from else None
        if begin is not None:
            _refuse_shape(context)
            shape = replace(read_config(begin), context_window=context_window)
        else:
            shape = drafter_config(
                resolve_target(target),
                load_tokenizer(target),
                block_size=block_size,
                layers=layers,
                intermediate=intermediate,
                kv_heads=kv_heads,
                head="vanilla" if head is Head.NONE else head.value,
                markov_rank=0 if head is Head.NONE else markov_rank,
                sample_from_anchor=not fill_in,
                draft_vocab=draft_vocab,
                context_window=context_window,
                target_layers=target_layers,
                mask_token=mask_token,
            )
        config = TrainConfig(
            steps=steps,
            updates_per_step=updates,
            conversations_per_step=conversations,
            anchors_per_update=anchors,
            max_tokens=max_tokens,
            learning_rate=learning_rate,
            markov_lr_factor=markov_lr_factor,
            ce_weight=ce_weight,
            tv_weight=tv_weight,
            average_decay=average_decay,
            seed=seed,
        )
        if dry_run:
            memory = training_memory(resolve_target(target), shape, config, workers)
            out_console.print(_memory_table(memory))
            return
        text = TextConfig(tokens=tokens, temperatures=_numbers(temperatures), seed=seed)
        if under_torchrun():
            _check_torchrun(workers, device, text, out)
        out.mkdir(parents=True, exist_ok=True)
        _write(target, text, out, concurrency, device)
        logs = find_spec("tensorboardX") is not None
        if not logs:
            err.print("no TensorBoard logs: they need `pip install 'dspark-serve\\[train]'`")
        job = TrainJob(resolve_target(target), shape, config, out, device, logs, begin)
        if workers > 1:
            run_on_workers(job, workers)
        else:
            _run_here(job)
        err.print(f"the drafter is at {out / CHECKPOINT}", highlight=False)


# What a checkpoint says of a drafter. Its context window is no part of its weights.
_SHAPE_OPTIONS = {
    "block_size", "layers", "intermediate", "kv_heads", "head", "markov_rank", "fill_in",
    "draft_vocab", "target_layers", "mask_token",
}  # fmt: skip


def _refuse_shape(context: typer.Context) -> None:
    sources = {name: context.get_parameter_source(name) for name in sorted(_SHAPE_OPTIONS)}
    given = [
        "--" + name.replace("_", "-")
        for name, source in sources.items()
        if source is not None and source.name != "DEFAULT"
    ]
    if given:
        raise ConfigError(
            f"with --start-from the shape is that of its checkpoint: leave {', '.join(given)} out"
        )


def _drafter_to_start_from(name: str, target: str) -> Path:
    from dspark.config import ModelConfig
    from dspark.models.causal_drafter import is_causal_lm
    from dspark.models.drafter_folder import drafter_folder

    folder = drafter_folder(ModelConfig(target, "" if name == SHIPPED else name))
    if folder is None or is_causal_lm(folder):
        raise ConfigError(
            f"--start-from {name} is no DSpark drafter for {target!r}: name the folder or id of one"
        )
    return folder


def _run_here(job: TrainJob) -> None:
    """In this process, one of several if torchrun says so; the first shows how it goes."""
    from dspark.training.job import run_job
    from dspark.training.peers import Peers, joined

    with joined(job.device) as device, progress_bar(shown=Peers().first) as bar:
        task = bar.add_task("training (steps)", total=job.config.steps)

        def show(step: int, loss: float, measures: Measures | None) -> None:
            bar.update(task, completed=step, description=f"training, loss {loss:.3f}")
            if measures is not None and Peers().first:
                bar.console.print(measures.summary(step), highlight=False)

        run_job(replace(job, device=device), show)


def _check_torchrun(workers: int, device: str, text: TextConfig, out: Path) -> None:
    from dspark.training.job import TEXT
    from dspark.training.text import tokens_written

    if workers > 1:
        raise ConfigError("torchrun has started the workers already: leave --workers out")
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"--device {device} would put all of torchrun's workers on one GPU: give --device cuda"
        )
    if (written := tokens_written(out / TEXT)) < text.tokens:
        raise ConfigError(
            f"{out / TEXT} holds {written} of {text.tokens} tokens, and torchrun's workers would "
            "all write the rest: run the command once without torchrun, or lower --tokens"
        )


def _write(target: str, text: TextConfig, out: Path, concurrency: int, device: str) -> None:
    """The text, where it is not there in full already."""
    from dspark.config import EngineConfig
    from dspark.engine.assembly import eos_token_ids
    from dspark.engine.verifier import VerifierEngine
    from dspark.models.builtin import resolve_target
    from dspark.models.target import TargetModel
    from dspark.models.tokenizer import load_tokenizer
    from dspark.training.job import TEXT
    from dspark.training.text import tokens_written, write_text

    if tokens_written(out / TEXT) >= text.tokens:
        return
    err.print("loading the target …")
    model = TargetModel.load(resolve_target(target), device=device)
    writer = VerifierEngine(
        model,
        EngineConfig(
            max_requests=concurrency,
            max_waiting=2 * concurrency,
            cache_tokens=concurrency * (text.max_instruction * 2 + text.max_answer),
        ),
        eos_token_ids=eos_token_ids(model),
    )
    with progress_bar() as bar:
        task = bar.add_task("text (tokens)", total=text.tokens)
        write_text(
            writer,
            load_tokenizer(target),
            text,
            out / TEXT,
            on_progress=lambda done, total: bar.update(task, completed=done),
        )


def _memory_table(memory: Memory) -> Table:
    table = Table(title="memory of one worker", show_footer=True)
    table.add_column("what", footer="in all")
    table.add_column("GB", justify="right", footer=f"{memory.total_bytes / 1e9:.2f}")
    for what, size in memory.parts.items():
        table.add_row(what, f"{size / 1e9:.2f}")
    return table


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--temperatures wants numbers, such as 0,0.7,1; got {text!r}") from error
