"""`dspark models`: what is on this machine, and fetching it."""

from __future__ import annotations

import typer

from dspark.cli.console import err, out, reported_errors
from dspark.config import cache_folder
from dspark.errors import ConfigError
from dspark.models.builtin import BUILTIN, pull

app = typer.Typer(help="Fetch the built-in target and see what is on this machine.")


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
