"""Explained steps as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspark.scheduling.explanation import Basis, RequestExplanation, StepExplanation

_WHY = {
    Basis.CAUSAL: "Algorithm 1: up to the first draft token that does not raise Θ",
    Basis.RANKED: "the likeliest, as many as blocks of earlier steps said",
    Basis.GLOBAL: "the largest Θ of all: every request is greedy or coupled",
    Basis.WHOLE: "whole blocks: the policy is fixed, or there are no step times",
    Basis.NO_BLOCKS: "nothing: blocks were asked for, and none came that could be used",
    Basis.NOT_ASKED: "nothing: the draft gate wanted no blocks, or none could be of use",
    Basis.NO_DRAFTER: "nothing: there was no drafter to ask",
    Basis.UNWANTED: "nothing: the requests asked for plain decoding",
    Basis.OFF: "nothing: the policy is off",
    Basis.PROMPTS: "nothing: the step held prompts only",
}


def throughput_line(verifier: str, status: Mapping[str, Any] | None) -> Text:
    """A verifier, and whether its steps bring what they were planned to."""
    line = Text(printable(verifier), "bold")
    if status is None:
        return line
    predicted, measured = status["predicted_tokens_per_s"], status["measured_tokens_per_s"]
    ratio = measured / predicted if predicted else 1.0
    line.append(
        f"  Θ measured is {ratio:.2f} of Θ predicted lately: {status['token_ratio']:.2f} of the "
        f"tokens in {status['time_ratio']:.2f} of the time",
        "not bold",
    )
    if status["alarm"]:
        line.append("  ALARM", "bold red")
    return line


def show_step(step: StepExplanation, console: Console) -> None:
    """One step: how it was planned, what it brought, and a row for each request."""
    source = ", of looked up blocks" if step.looked_up else ""
    epoch = f"plan {step.plan_epoch}" if step.plan_epoch else "own settings"
    console.print(
        f"\nstep {step.step}, {step.age_s:.1f} s ago, {epoch}, policy {step.policy}",
        highlight=False,
        soft_wrap=True,
    )
    ceiling = "" if step.ceiling is None else f"; at most {step.ceiling} draft tokens"
    console.print(f"verified  {_WHY[step.basis]}{source}{ceiling}", highlight=False, soft_wrap=True)
    console.print(f"Θ         {_throughput(step)}", highlight=False, soft_wrap=True)
    prompts = f", beside {step.prompt_tokens} prompt tokens" if step.prompt_tokens else ""
    waited = f", {step.draft_wait_ms:.1f} ms of waiting for blocks" if step.draft_wait_ms else ""
    console.print(
        f"step      {step.step_ms:.1f} ms{prompts}{waited}", highlight=False, soft_wrap=True
    )
    if not step.requests:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("request", overflow="fold")
    table.add_column("survivals")
    for heading in ("verified", "accepted", "committed"):
        table.add_column(heading, justify="right")
    for request in step.requests:
        table.add_row(
            Text(printable(request.request_id)),
            _survivals(request),
            str(request.verified),
            str(request.accepted),
            str(request.committed),
        )
    console.print(table)
    if step.decoding > len(step.requests):
        console.print(
            f"and {step.decoding - len(step.requests)} more requests",
            highlight=False,
            soft_wrap=True,
        )


def printable(text: str) -> str:
    """What others sent, unable to move the cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _throughput(step: StepExplanation) -> str:
    predicted, measured = "not predicted", "not measured, the engine rested before"
    if step.predicted_per_s is not None:
        predicted = (
            f"predicted {step.predicted_per_s:.1f} tokens/s ({step.predicted_tokens:.2f} in "
            f"{step.predicted_ms:.1f} ms)"
        )
    if step.measured_per_s is not None:
        measured = (
            f"measured {step.measured_per_s:.1f} tokens/s ({step.committed} in "
            f"{step.round_ms:.1f} ms)"
        )
    return f"{predicted}; {measured}"


def _survivals(request: RequestExplanation) -> Text:
    if not request.survivals:
        return Text("no block", "dim")
    line = Text()
    for k, survival in enumerate(request.survivals):
        if k == request.verified:
            line.append("| ", "bold")
        style = "dim" if k >= request.verified else "green" if k < request.accepted else "red"
        line.append(f"{survival:.2f} ", style)
    if request.verified == len(request.survivals):
        line.append("|", "bold")
    return line
