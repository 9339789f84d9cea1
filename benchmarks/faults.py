"""What faults cost: three verifiers, two drafters, scheduler and Redis, each failing under load.

On local Ray, with tiny random models in fp32 and a real Redis. Clients stream without a pause,
greedy and seeded; each answer must be the one that the same request had before any fault, and have
ended: what was refused, cut, repeated, lost or changed is counted as failed. Faults come one after
the other, each once the pool is whole again (the drill is in tests/helpers/fault_drill.py):

  verifier, drafter, scheduler killed: SIGKILL; Ray starts another.
  verifier, drafter hung: SIGSTOP, and SIGCONT after a while; for good: Ray has to replace it.
  cut off from the scheduler: nothing gets through between the two, and nothing says so.
  Redis paused: SIGSTOP, then SIGCONT. Restarted: stopped, and started with what it held, or empty.

Of each fault the table says, as median and worst of the rounds:

  lasted: until the drill ended it; nothing where Ray has to mend it.
  wait: the longest that any client waited for its next token, up to some seconds after recovery.
  slowest: the fewest tokens a second of all clients over 2 s, of those in the seconds before.
  back: from the fault until clients had 90 % of their tokens again, over 2 s, after the slowest
    2 s; of a verifier that is killed or hangs, 90 % of two thirds. 0: they never had less.
  drafts: from the fault until no verifier on the scheduler's list went without drafts any more.
  whole: from the fault, or its end where it has one, until the scheduler lists all replicas, none
    of them gone or silent, Redis holds as many, and all verifiers draft.

A fault that nobody noticed, or after which no draft is accepted, shows nothing and is called
inconclusive. Tiny models leave the machine to the processes themselves: on few cores, what slows
the clients is mostly that Ray starts a process beside them. Needs the extra `dev`.

    python benchmarks/faults.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.fault_drill import FAULTS, Outcome, running_drill

from dspark.evaluation.provenance import provenance

console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", default=",".join(FAULTS), help="default: all, %(default)s")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    options = parser.parse_args()
    names = options.faults.split(",")
    if unknown := set(names) - FAULTS.keys():
        parser.error(f"no faults {', '.join(sorted(unknown))}: choose of {', '.join(FAULTS)}")
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_drill(
            Path(folder),
            lambda line: console.print(line, highlight=False),
            clients=options.clients,
            max_tokens=options.tokens,
        ) as drill,
    ):
        for _ in range(options.rounds):
            for name in names:
                outcomes.append(FAULTS[name](drill))
    ended = drill.load.ended
    failures = [one.failure for one in ended if one.failure]
    Console().print(table(outcomes))
    print(f"{len(ended)} requests in all, {len(failures)} failed", *failures, sep="\n  ")
    if options.output:
        faults = [
            {key: None if value == math.inf else value for key, value in asdict(one).items()}
            for one in outcomes
        ]
        result = {"requests": len(ended), "failures": failures, "faults": faults, **provenance()}
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    if failures or not all(one.recovered and one.conclusive for one in outcomes):
        sys.exit(1)


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row a fault."""
    made = Table(title="seconds: median (worst)")
    for heading in ("fault", "lasted", "requests", "failed", "wait", "slowest", "back", "drafts",
                    "whole"):  # fmt: skip
        made.add_column(heading, justify="left" if heading == "fault" else "right")
    for fault in dict.fromkeys(one.fault for one in outcomes):
        rounds = [one for one in outcomes if one.fault == fault]
        shares = [one.slowest_rate / one.rate_before for one in rounds]
        lasted = statistics.median(one.lasted_s for one in rounds)
        made.add_row(
            fault if all(one.conclusive for one in rounds) else f"{fault} (INCONCLUSIVE)",
            f"{lasted:.0f}" if lasted else "",
            str(sum(one.requests for one in rounds)),
            str(sum(one.failed for one in rounds)),
            seconds([one.longest_wait_s for one in rounds], digits=2),
            f"{statistics.median(shares):.0%} ({min(shares):.0%})",
            seconds([one.back_s for one in rounds]),
            seconds([one.drafting_s for one in rounds]),
            seconds([one.whole_s for one in rounds]),
        )
    return made


def seconds(values: Sequence[float], digits: int = 1) -> str:
    """Median and worst."""
    return f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})"


if __name__ == "__main__":
    main()
