"""Children of this process are found with what they hold."""

from __future__ import annotations

import subprocess
import sys

from dspark.evaluation.memory import Process, by_group, children


def test_a_child_is_found_while_it_lives() -> None:
    script = "held = bytearray(b'x') * (64 << 20); print('up', flush=True); input()"
    command = [sys.executable, "-c", script, "marked"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (found,) = [process for process in children() if process.title.endswith("marked")]
        child.communicate(b"\n")
    assert found.resident_bytes > 64 << 20
    assert not any(process.title.endswith("marked") for process in children())


def test_groups_are_summed() -> None:
    processes = [Process("a:1", 3), Process("b:1", 5), Process("a:2", 4)]
    assert by_group(processes, lambda title: title[0]) == {"a": 7, "b": 5}
