"""Compile every kernel variant for every GPU that is named, where there is none.

    python scripts/compile_kernels.py [--capability 80 --capability 90] [--write]

Fails on a variant that spills more than its budget or takes more shared memory than the GPU has.
--write puts the table of registers, spills and shared memory into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

from dspark.kernels.triton.variants import CAPABILITIES, all_variants  # isort: skip

import triton  # after ours, which settles how it rounds

_DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
_BEGIN, _END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
# Bytes that a block may have (CUDA C++ programming guide, table of compute capabilities).
_SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one variant takes."""

    name: str
    capability: int
    registers: int  # of a thread
    spilled: int  # bytes of local memory, of a thread
    shared: int  # bytes, of a block
    budget: int  # bytes that may be spilled

    @property
    def faults(self) -> list[str]:
        """Why it cannot stay so."""
        found = []
        if self.spilled > self.budget:
            found.append(f"spills {self.spilled} bytes, {self.budget} at most")
        if self.shared > _SHARED[self.capability]:
            found.append(
                f"{self.shared} bytes of shared memory, {_SHARED[self.capability]} at most"
            )
        return [f"{self.name} for sm_{self.capability}: {fault}" for fault in found]


def compile_one(job: tuple[int, int]) -> Compiled:
    """The n-th variant of one GPU."""
    capability, index = job
    variant = list(all_variants(capability))[index]
    result = variant.compiled(capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        variant.name,
        capability,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        result.metadata.shared,
        variant.spills,
    )


def table(results: list[Compiled]) -> str:
    """Markdown: a row a variant, a column a GPU."""
    capabilities = sorted({result.capability for result in results})
    names = list(dict.fromkeys(result.name for result in results))
    found = {(result.name, result.capability): result for result in results}
    lines = [
        "| variant | " + " | ".join(f"sm_{capability}" for capability in capabilities) + " |",
        "|---|" + "---|" * len(capabilities),
    ]
    for name in names:
        cells = []
        for capability in capabilities:
            one = found.get((name, capability))
            cells.append(
                "–" if one is None else f"{one.registers} / {one.spilled} / {one.shared / 1024:.0f}"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    wanted = options.capability or CAPABILITIES
    jobs = [(c, i) for c in wanted for i in range(len(list(all_variants(c))))]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_one, jobs))
    print(table(results))
    if options.write:
        text = _DOCS.read_text(encoding="utf-8")
        before, after = text.split(_BEGIN)[0], text.split(_END)[1]
        _DOCS.write_text(f"{before}{_BEGIN}\n{table(results)}\n{_END}{after}", encoding="utf-8")
    faults = [fault for result in results for fault in result.faults]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
