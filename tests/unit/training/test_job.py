"""Runs as users start them: killed at any point they end the same, and so do many workers."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from helpers.training import CONFIG, job
from tensorboardX.proto.event_pb2 import Event

from dspark.training.job import CHECKPOINT, TrainJob, run_job
from dspark.training.trainer import STATE_FILE, Measures
from dspark.training.workers import run_on_workers


def nothing(step: int, loss: float, measures: Measures | None) -> None:
    pass


def weights(of: TrainJob) -> dict[str, torch.Tensor]:
    state = torch.load(of.out / STATE_FILE, weights_only=True)
    assert state["step"] == of.config.steps
    drafter: dict[str, torch.Tensor] = state["drafter"]
    return drafter


def process(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """The run of a folder, in a process of its own: sums hang on how many threads there are."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "helpers.training", str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        text=True,
    )


def test_killed_at_any_step_it_ends_where_an_uninterrupted_run_does(tmp_path: Path) -> None:
    whole, cut = job(tmp_path / "whole"), job(tmp_path / "cut")
    rng = random.Random(5)
    for _ in range(3):
        step = rng.randrange(1, CONFIG.steps)
        with process(tmp_path / "cut") as running:
            assert running.stdout is not None
            for line in running.stdout:
                if int(line) >= step:
                    running.send_signal(signal.SIGKILL)
                    break
    for folder in ("whole", "cut"):
        with process(tmp_path / folder) as running:
            running.communicate()
    got = weights(cut)
    for name, tensor in weights(whole).items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes to come have the same kernels and, as on AVX2, products in float32.

    bf16 rounds by more than the order of sums does.
    """
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def two_cores(alike: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster of this process's own, its workers no less urgent than other tests."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("two_cores")
def test_two_workers_train_what_one_does(tmp_path: Path) -> None:
    """All anchors take part in each update, so that only the order of sums differs."""
    one, two = job(tmp_path / "one"), job(tmp_path / "two")
    with process(tmp_path / "one") as running:
        running.communicate()
    run_on_workers(two, 2)
    assert_alike(one, two)


@pytest.mark.usefixtures("alike")
def test_two_that_torchrun_starts_train_what_one_does(tmp_path: Path) -> None:
    one, two = job(tmp_path / "one"), job(tmp_path / "two")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for folder, launcher in (("one", ()), ("two", torchrun)):
        with process(tmp_path / folder, *launcher) as running:
            running.communicate()
    assert_alike(one, two)


def assert_alike(one: TrainJob, two: TrainJob) -> None:
    got = weights(two)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(got[name], tensor, atol=2e-3, rtol=1e-2)
    assert (two.out / CHECKPOINT / "config.json").exists()


def test_logs_show_what_each_step_brought(tmp_path: Path) -> None:
    of = job(tmp_path, logs=True)
    losses = {}
    run_job(of, lambda step, loss, measures: losses.update({step: loss}))
    (file,) = (of.out / "logs").iterdir()
    logged = {
        (value.tag, event.step): value.simple_value
        for event in events(file)
        for value in event.summary.value
    }
    assert {step for tag, step in logged if tag == "train/loss"} == set(losses)
    assert logged["train/loss", 3] == pytest.approx(losses[3])
    assert 0.0 < logged["held_out/acceptance_1", 12] <= 1.0
    assert logged["held_out/greedy_length", 12] >= 1.0


def events(file: Path) -> list[Event]:
    """Of an event file: records of length, checksum, data, checksum."""
    data, out = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        out.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return out
