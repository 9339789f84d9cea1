"""The command line: help for everything, one-line errors, and what doctor finds."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from click.testing import Result
from helpers.tiny import save_models
from safetensors.torch import load_file
from typer.testing import CliRunner

from dspark import __version__
from dspark.cli.main import app
from dspark.models.checkpoint import WEIGHTS_FILE, fingerprint, load_drafter, save_drafter
from dspark.models.target_ends import StoredEnds

runner = CliRunner()
COMMANDS = ("serve", "chat", "generate", "bench", "eval", "train", "doctor", "models", "plan")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 300


def test_the_version_is_printed() -> None:
    assert runner.invoke(app, ["--version"]).output.strip() == __version__


def test_errors_are_one_line_and_status_one(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    for arguments in (
        ["eval", "--prompts", missing],
        ["generate", "--prompts", missing, "--out", str(tmp_path / "out.jsonl")],
        ["bench", "--concurrency", "1,two"],
        ["models", "pull", "gpt-5"],
        ["serve", "--config", missing],
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1, arguments
        assert "error:" in result.stderr
        assert "Traceback" not in result.output + result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_drafter_is_the_same_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    target, drafter = save_models(tmp_path)
    ends = StoredEnds(target, dtype=torch.float32, device="cpu")
    save_drafter(load_drafter(drafter, ends), drafter, dtype)

    def export(source: Path, out: Path) -> Result:
        names = ["--drafter", str(source), "--target", str(target), "--out", str(out)]
        return runner.invoke(app, ["models", "export", *names])

    assert export(drafter, tmp_path / "whole").exit_code == 0
    own, whole = (load_file(f / WEIGHTS_FILE) for f in (drafter, tmp_path / "whole"))
    assert whole.keys() - own.keys() == {"embed_tokens.weight", "lm_head.weight"}
    assert all(tensor.dtype == dtype for tensor in whole.values())
    assert all(torch.equal(whole[name], tensor) for name, tensor in own.items())
    assert torch.equal(whole["embed_tokens.weight"], ends.embed_weight.to(dtype))
    assert torch.equal(whole["lm_head.weight"], ends.lm_head_weight.to(dtype))
    assert export(tmp_path / "whole", tmp_path / "again").exit_code == 0
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "whole")
    refused = export(drafter, tmp_path / "whole")
    assert refused.exit_code == 1
    assert "not an empty folder" in refused.stderr


def test_training_goes_on_from_a_drafter_in_its_own_shape(tmp_path: Path) -> None:
    target, drafter = save_models(tmp_path)
    command = ["train", "--target", str(target), "--out", str(tmp_path / "out"), "--dry-run"]
    begun = runner.invoke(app, [*command, "--start-from", str(drafter)])
    assert begun.exit_code == 0, begun.stderr
    for options, said in (
        (["--start-from", str(drafter), "--layers", "2"], "leave --layers out"),
        (["--start-from", str(target)], "is no DSpark drafter"),
        (["--start-from", "shipped"], "is no DSpark drafter"),  # none comes for this target
    ):
        refused = runner.invoke(app, [*command, *options])
        assert refused.exit_code == 1, options
        assert said in refused.stderr.replace("\n", " ")


def test_plans_are_explained_without_a_cluster(tmp_path: Path) -> None:
    target, drafter = save_models(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n', encoding="utf-8")
    names = ["--prompts", str(prompts), "--target", str(target), "--drafter", str(drafter)]
    greedy = ["--temperature", "0", "--max-tokens", "20"]
    result = runner.invoke(app, ["plan", "explain", *names, *greedy, "--steps", "64", "--json"])
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.stdout)
    assert told["verifier"] == "in process"
    committed = sum(r["committed"] for step in told["steps"] for r in step["requests"])
    assert committed == 2 * 19  # and each one's first token, which its prompt's step decides
    requests = [request for step in told["steps"] for request in step["requests"]]
    assert all(r["accepted"] <= r["verified"] <= len(r["survivals"]) for r in requests)
    assert any(r["survivals"] for r in requests), "INCONCLUSIVE: nothing was drafted"


def test_errors_are_shown_as_they_are(tmp_path: Path) -> None:
    result = runner.invoke(app, ["eval", "--prompts", str(tmp_path / "[bold]x[/].jsonl")])
    assert "[bold]x[/].jsonl" in result.stderr.replace("\n", "")


def test_chat_without_a_service_says_so() -> None:
    with socket.socket() as held:  # bound but not listening: nothing answers there
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        result = runner.invoke(app, ["chat", "hello", "--address", address])
    assert result.exit_code == 1
    assert "error:" in result.stderr


def test_doctor_finds_a_busy_port_and_says_what_to_do() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        result = runner.invoke(app, ["doctor", "--http-port", str(port)])
    assert result.exit_code == 1
    assert f"port {port}" in result.output
    assert "--http-port" in result.output


def test_doctor_names_a_redis_that_does_not_answer() -> None:
    result = runner.invoke(app, ["doctor", "--store-url", "redis://:secret@127.0.0.1:9/0"])
    assert result.exit_code == 1
    assert "does not answer" in result.output
    assert "secret" not in result.output
