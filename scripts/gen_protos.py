"""Generates dspark/pb from protos/; with --check, fails if the committed stubs are stale.

Each contract is compiled under the virtual path dspark/pb/, so one imports another as
"dspark/pb/common.proto" and the Python comes out with `from dspark.pb import common_pb2`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "dspark" / "pb"


def generate() -> dict[str, str]:
    """Compiles every contract; returns the text of each stub by file name."""
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("protos/*.proto"))
    if not protos:
        raise SystemExit("gen_protos: protos/ holds no *.proto file")
    with tempfile.TemporaryDirectory() as out:
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        protoc = [sys.executable, "-m", "grpc_tools.protoc", "-Idspark/pb=protos"]
        if subprocess.run([*protoc, *outputs, *protos], cwd=ROOT).returncode != 0:
            raise SystemExit("gen_protos: protoc failed; no grpc_tools means `make venv`")
        return read_stubs(Path(out) / "dspark" / "pb")


def read_stubs(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*_pb2*.py*")}


def differences(committed: dict[str, str], fresh: dict[str, str]) -> dict[str, str]:
    """What is wrong with each stub that is not as the contracts have it."""
    wrong = dict.fromkeys(fresh.keys() - committed.keys(), "missing")
    wrong |= dict.fromkeys(committed.keys() - fresh.keys(), "no contract generates it")
    shared = committed.keys() & fresh.keys()
    wrong |= dict.fromkeys((n for n in shared if committed[n] != fresh[n]), "differs")
    return dict(sorted(wrong.items()))


def check(wrong: dict[str, str]) -> int:
    for name, what in wrong.items():
        print(f"dspark/pb/{name}: {what}", file=sys.stderr)
    if wrong:
        print("gen_protos: the stubs are stale; run `make protos` and commit", file=sys.stderr)
    return 1 if wrong else 0


def write(wrong: dict[str, str], fresh: dict[str, str]) -> int:
    STUBS.mkdir(exist_ok=True)
    for name in wrong:
        if name in fresh:
            (STUBS / name).write_text(fresh[name], encoding="utf-8")
        else:
            (STUBS / name).unlink()
    print(f"gen_protos: {len(fresh)} stubs in dspark/pb, {len(wrong)} changed")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate dspark/pb from protos/.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    arguments = parser.parse_args()

    fresh = generate()
    wrong = differences(read_stubs(STUBS), fresh)
    return check(wrong) if arguments.check else write(wrong, fresh)


if __name__ == "__main__":
    sys.exit(main())
