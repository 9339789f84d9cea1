"""`dspark models`: what is on this machine, fetching it, and writing it for other engines."""

from __future__ import annotations

from pathlib import Path

import typer

from dspark.cli.console import err, out, reported_errors
from dspark.config import cache_folder
from dspark.errors import ConfigError
from dspark.models.builtin import BUILTIN, pull

app = typer.Typer(help="Fetch the built-in target, see what is on this machine, export drafters.")


@app.command("pull")
def pull_model(
    name: str = typer.Argument(BUILTIN, help="The built-in target."),
    force: bool = typer.Option(False, help="Fetch it again even if it is there."),
) -> None:
    """Fetch a built-in target, check its SHA-256, and convert it to a bf16 checkpoint.

    Any other target is a local folder or a Hugging Face id, and needs no pull.
    """
    with reported_errors():
        if name != BUILTIN:
            raise ConfigError(
                f"there is no built-in model {name!r}; the only one is {BUILTIN!r}. Give other "
                "models as a folder or a Hugging Face id where a target is asked for"
            )
        pull(lambda line: err.print(line, highlight=False), force=force)


@app.command("list")
def list_models() -> None:
    """Built-in targets, and whether they are here."""
    here = (cache_folder() / "models" / BUILTIN).exists()
    out.print(f"{BUILTIN}\t{'pulled' if here else 'not pulled'}\t{cache_folder()}", highlight=False)


@app.command("export")
def export_drafter(
    out: Path = typer.Option(..., help="Folder to write; must be empty or not there."),
    target: str = typer.Option(BUILTIN, help="Built-in name, folder or Hugging Face id."),
    drafter: str = typer.Option(
        "", help="Drafter folder or Hugging Face id; default: the one shipped."
    ),
) -> None:
    """Write a drafter as DeepSpec publishes them, for vLLM, SGLang and others to load.

    That is with the target's embedding and LM head, whole in one file, and in the type that its own
    weights have. Checkpoints of speculators are turned into that layout.
    """
    with reported_errors():
        import torch

        from dspark.config import ModelConfig
        from dspark.models.builtin import resolve_target
        from dspark.models.checkpoint import load_drafter, save_drafter, stored_dtype
        from dspark.models.drafter_folder import drafter_folder
        from dspark.models.target_ends import StoredEnds

        folder = drafter_folder(ModelConfig(target=target, drafter=drafter))
        if folder is None:
            raise ConfigError(f"no drafter is known for {target!r}: give one with --drafter")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} is not an empty folder: name a new one with --out")
        ends = StoredEnds(resolve_target(target), dtype=torch.float32, device="cpu")
        loaded = load_drafter(folder, ends)
        save_drafter(loaded, out, stored_dtype(folder), whole=True)
        shape = loaded.config
        own = {
            "context_window": shape.context_window,
            "block without sample_from_anchor": not shape.sample_from_anchor,
        }
        for name in (name for name, used in own.items() if used):
            err.print(
                f"DeepSpec has no {name}: an engine that does not know it drafts from other rows, "
                "and less is accepted",
                highlight=False,
            )
        err.print(f"the drafter is at {out}", highlight=False)
