"""How long planning a step takes: survivals and prefix lengths, microseconds.

    python benchmarks/planner.py

512 requests of 15 draft tokens have to be planned in under 200 µs. The least of several repeats:
what else runs on the machine only adds.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

import numpy as np

from dspark.scheduling.planner import plan_lengths, reserve
from dspark.scheduling.step_table import StepTimeTable
from dspark.scheduling.survival import survival_table
from dspark.types import Scale, Scales

_CALLS, _REPEATS = 200, 9
TABLE = StepTimeTable(
    (1, 8, 64, 512),
    (1, 2, 8, 16),
    (256,),
    (((5, 6, 8, 9), (8, 10, 20, 30), (20, 30, 90, 160), (100, 180, 640, 1200)),),
)


def least_us(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=_CALLS, repeat=_REPEATS)) / _CALLS * 1e6


def main() -> None:
    rng = np.random.default_rng(0)
    times = TABLE.at(256)
    print("| requests × draft tokens | survivals | causal | global | ranked | weights and floors |")
    print("|---|---|---|---|---|---|")
    for requests, size in ((1, 7), (8, 7), (32, 7), (512, 15)):
        blocks = [rng.beta(4, 1, size).astype(np.float32) for _ in range(requests)]
        scale = Scale((1.1,) * size, (0.1,) * size)
        given = blocks, [i % 2 == 0 for i in range(requests)], Scales(scale, scale)
        table = survival_table(*given)
        weights = rng.choice([0.5, 1.0, 2.0], requests)
        floors = np.where(rng.random(requests) < 0.3, 1.5, 0.0)

        def rounds_ms(least: int, most: int, requests: int = requests) -> np.ndarray:
            return times.times_ms(requests, np.arange(least, most + 1.0))

        def weighted(
            table: np.ndarray = table, weights: np.ndarray = weights, floors: np.ndarray = floors
        ) -> object:
            held = reserve(table, floors, weights)
            return plan_lengths(table, rounds_ms, weights=weights, reserved=held)

        cells = [
            least_us(lambda g=given: survival_table(*g)),
            least_us(lambda t=table: plan_lengths(t, rounds_ms)),
            least_us(lambda t=table: plan_lengths(t, rounds_ms, search="global")),
            least_us(
                lambda t=table, n=3 * requests: plan_lengths(
                    t, rounds_ms, ceiling=n, search="ranked"
                )
            ),
            least_us(weighted),
        ]
        print(f"| {requests} × {size} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
