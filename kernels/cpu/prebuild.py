"""`python -m dspark.kernels.cpu.prebuild FOLDER [SET …]`: for machines without a compiler."""

from __future__ import annotations

import sys
from pathlib import Path

from dspark.kernels.cpu.library import prebuild

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m dspark.kernels.cpu.prebuild FOLDER [amx | avx512 | avx2 …]")
    for path in prebuild(Path(sys.argv[1]), *sys.argv[2:]):
        print(path)
