"""Entry point: gathers the commands."""

from __future__ import annotations

import typer

from dspark import __version__
from dspark.cli import bench, chat, doctor, evaluate, generate, models, plan, serve, train

app = typer.Typer(
    name="dspark",
    help="Lossless speculative decoding as a service: DSpark drafters on cheap GPUs, verifiers on "
    "large ones, one scheduler that decides how much of each block is worth verifying.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
app.add_typer(models.app, name="models")
app.add_typer(plan.app, name="plan")
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("bench")(bench.bench)
app.command("eval")(evaluate.evaluate)
app.command("train")(train.train)
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


if __name__ == "__main__":
    app()
