"""The rules that deploy/docker/Dockerfile and its locks keep. No image is built here."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

from dspark.kernels.cpu.library import instruction_set

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
ROLES = ("gateway", "draft", "verifier")
NAMES = ("cpu", "gpu")
_SECRET = re.compile(r"password|passwd|secret|token|api_?key|credential", re.IGNORECASE)


@pytest.fixture(scope="module")
def stages() -> dict[str, list[dict[str, Any]]]:
    """Instructions by stage; what stands before the first is under ``."""
    parser = DockerfileParser(fileobj=io.BytesIO(DOCKERFILE.read_bytes()))
    found: dict[str, list[dict[str, Any]]] = {"": []}
    name = ""
    for instruction in parser.structure:
        if instruction["instruction"] == "FROM":
            name = instruction["value"].split(" AS ")[1]
            found[name] = []
        if instruction["instruction"] != "COMMENT":
            found[name].append(instruction)
    return found


def values(stage: list[dict[str, Any]], instruction: str) -> list[str]:
    return [i["value"] for i in stage if i["instruction"] == instruction]


def lock(name: str) -> dict[str, Requirement]:
    text = (DOCKERFILE.parent / f"requirements-{name}.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line), line
    found = [Requirement(line.partition(" ")[0]) for line in lines]
    return {requirement.name: requirement for requirement in found}


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_role_is_a_target_and_the_last_stages(stages: dict[str, Any]) -> None:
    assert tuple(stages)[-3:] == ROLES


def test_the_only_image_from_outside_is_pinned_by_digest(stages: dict[str, Any]) -> None:
    (image,) = values(stages[""], "ARG")
    assert re.fullmatch(r"PYTHON_IMAGE=\S+:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", image)
    origins = {s: values(found, "FROM")[0].split()[0] for s, found in stages.items() if s}
    assert {o for o in origins.values() if o not in stages} == {"${PYTHON_IMAGE}"}
    copied = [v for found in stages.values() for v in values(found, "COPY")]
    for source in re.findall(r"--from=(\S+)", " ".join(copied)):
        assert source in stages


@pytest.mark.parametrize("role", ROLES)
def test_a_role_runs_as_user_1000_and_says_what_it_is(stages: dict[str, Any], role: str) -> None:
    stage = stages[role]
    assert stage[-1]["instruction"] == "USER"
    assert stage[-1]["value"] == "1000:1000"
    (labels,) = values(stage, "LABEL")
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels


def test_nobody_is_root_at_the_end_and_nothing_is_added_from_urls(stages: dict[str, Any]) -> None:
    for found in stages.values():
        assert not values(found, "ADD")
        assert not values(found, "ENTRYPOINT")  # KubeRay's to give
        assert set(values(found, "USER")) <= {"1000:1000"}
        for run in values(found, "RUN"):
            assert not re.search(r"curl|wget\s+(-|http)|sudo|chmod\s+-?R?\s*777", run)


def test_no_secret_has_a_name_in_the_build(stages: dict[str, Any]) -> None:
    for found in stages.values():
        for value in (*values(found, "ARG"), *values(found, "ENV")):
            assert not _SECRET.search(value)


def test_caches_are_not_left_behind(stages: dict[str, Any]) -> None:
    for found in stages.values():
        for run in values(found, "RUN"):
            assert "apt-get install" not in run or "rm -rf /var/lib/apt/lists/*" in run
            for command in run.split("&&"):
                assert "pip install" not in command or "--no-cache-dir" in command


def test_packages_come_from_a_lock_with_hashes_alone(stages: dict[str, Any]) -> None:
    for name in NAMES:
        stage = stages[f"packages-{name}"]
        assert f"deploy/docker/requirements-{name}.txt" in values(stage, "COPY")[0]
        installs = [c for run in values(stage, "RUN") for c in run.split("&&") if "pip inst" in c]
        assert len(installs) == 2
        assert "--require-hashes" in installs[0]
        assert "--no-index" in installs[1]  # the wheel brings nothing along


def test_a_login_shell_finds_ray(stages: dict[str, Any], tmp_path: Path) -> None:
    # Debian's /etc/profile sets PATH anew and then reads profile.d.
    (run,) = values(stages["base"], "RUN")
    (line,) = re.findall(r"printf '(.*?)\\n' > /etc/profile\.d/dspark\.sh", run)
    command = f'PATH=/usr/local/bin:/usr/bin:/bin; {line}; echo "$PATH"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("/opt/dspark/bin:/usr/local/bin:")
    assert " wget " in run  # of KubeRay's probes


def test_compilers_are_only_where_something_is_compiled(stages: dict[str, Any]) -> None:
    with_compilers = {
        name
        for name, found in stages.items()
        if any(re.search(r"\b(gcc|g\+\+)( |$)", run) for run in values(found, "RUN"))
    }
    assert with_compilers == {"operators", "gpu"}


def test_the_builder_is_sent_the_wheel_and_the_locks_alone() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "*",
        "!dist/*.whl",
        "!deploy/docker/requirements-*.txt",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_holds_what_constraints_say(name: str) -> None:
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    wanted = dict(line.split("==") for line in pins if line and not line.startswith("#"))
    locked = lock(name)
    free = {"torch"} if name == "cpu" else {"torch", "triton"}
    for package, requirement in locked.items():
        if package in free or package.startswith(("nvidia-", "cuda-")):
            continue
        assert str(requirement.specifier) == f"=={wanted[package]}", "run make image-locks"
    suffix = "+cpu" if name == "cpu" else ""
    assert str(locked["torch"].specifier) == f"=={wanted['torch']}{suffix}"


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_holds_what_the_package_asks_for_and_no_tools(name: str) -> None:
    locked = lock(name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = ("kube", "gpu") if name == "gpu" else ("kube",)
    asked = [*project["dependencies"]]
    for extra in extras:
        asked += project["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        (version,) = locked[requirement.name].specifier
        assert requirement.specifier.contains(version.version), "run make image-locks"
    assert not {"pytest", "mypy", "ruff", "hypothesis", "grpcio-tools"} & locked.keys()
    assert ("triton" in locked) == (name == "gpu")
    assert any(package.startswith("nvidia-") for package in locked) == (name == "gpu")


@pytest.mark.skipif(
    shutil.which("g++") is None or instruction_set() is None, reason="needs g++ and AVX2"
)
def test_operators_built_beforehand_are_used_without_a_compiler(tmp_path: Path) -> None:
    folder, own = tmp_path / "operators", instruction_set()
    assert own is not None
    build = [sys.executable, "-m", "dspark.kernels.cpu.prebuild", str(folder), own]
    subprocess.run(build, check=True, cwd=ROOT)  # the image builds all, in a minute
    assert len(list(folder.glob("*.so"))) == 1
    load = "from dspark.kernels.cpu.library import load; print(load()._name)"
    done = subprocess.run(
        [sys.executable, "-c", load],
        cwd=ROOT,
        env={
            "PATH": "/nowhere",
            "DSPARK_CPU_OPERATORS_FOLDER": str(folder),
            "DSPARK_CACHE": "/proc/none",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(folder))
