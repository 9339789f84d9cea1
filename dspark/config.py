"""Settings of each part, with every default written once. Unknown keys are errors (`build`)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dspark.errors import ConfigError

T = TypeVar("T")

_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def cache_folder() -> Path:
    """For models and built operators: $DSPARK_CACHE, else $XDG_CACHE_HOME/dspark, else ~/.cache."""
    if explicit := os.environ.get("DSPARK_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark"


def cpu_operators() -> str:
    """$DSPARK_CPU_OPERATORS: auto (default), avx512, avx2, or none for torch alone."""
    wanted = os.environ.get("DSPARK_CPU_OPERATORS", "auto")
    if wanted not in ("auto", "avx512", "avx2", "none"):
        raise ConfigError(
            f"DSPARK_CPU_OPERATORS must be auto, avx512, avx2 or none; got {wanted!r}"
        )
    return wanted


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which models, in which precision, where."""

    target: str = "smollm2-135m"
    # Folder or id, of DSpark's or of a causal LM; "prompt-lookup" or "none". Empty: as shipped.
    drafter: str = ""
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int = 0  # torch threads of a replica; 0: torch's own choice

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16; got {self.dtype!r}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of a verifier engine."""

    max_requests: int = 32  # generated at the same time
    max_waiting: int = 256  # queued behind them; beyond, OverloadedError
    cache_tokens: int = 32768  # positions of KV cache, over all requests
    prefill_chunk_tokens: int = 256  # prompt tokens in one step, at most
    prefill_stretch: float = 3.0  # such a step may take this many times one without prompts
    prefix_cache: bool = True  # prompts that begin alike share pages
    check_pages: bool = False  # audit page ownership after every step; an error ends the engine
    policy: str = "adaptive"  # adaptive | fixed | off
    block_size: int = 0  # draft tokens a round; 0: the drafter's own
    prompt_lookup: bool = True  # draft from requests' own text while no drafter can be asked

    def __post_init__(self) -> None:
        _positive(self, "max_requests", "max_waiting", "cache_tokens", "prefill_chunk_tokens")
        if not self.prefill_stretch >= 1.0:
            raise ConfigError(f"prefill_stretch must be at least 1; got {self.prefill_stretch}")
        if self.policy not in ("adaptive", "fixed", "off"):
            raise ConfigError(f"policy must be adaptive, fixed or off; got {self.policy!r}")


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Bounds of a draft replica."""

    cache_tokens: int = 65536  # positions of context, over all sessions
    max_batch_works: int = 64  # works drafted for together
    max_streams: int = 32  # verifiers served at once


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Leases, the store, and the election of one scheduler among several."""

    heartbeat_s: float = 1.0
    lease_s: float = 5.0  # a replica silent for this long is gone
    store_url: str = ""  # redis://… ; empty: in this process
    leader_election: str = "store"  # store | kubernetes
    leader_lease_s: float = 3.0  # a leader silent for this long is replaced by a standby
    kubernetes_lease: str = "dspark-scheduler"  # name of the Lease
    kubernetes_namespace: str = ""  # empty: the pod's own

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "lease_s", "leader_lease_s"):
            if not 0 < getattr(self, name) < math.inf:  # also refuses NaN
                raise ConfigError(f"{name} must be above 0 seconds; got {getattr(self, name)}")
        if self.leader_election not in ("store", "kubernetes"):
            raise ConfigError(
                f"leader_election must be store or kubernetes; got {self.leader_election!r}"
            )
        for name, least in (("kubernetes_lease", 1), ("kubernetes_namespace", 0)):
            value = getattr(self, name)
            if (value or least) and not _KUBERNETES_NAME.fullmatch(value):
                raise ConfigError(
                    f"{name} must be a name as Kubernetes has them (at most 63 of a-z, 0-9 and -, "
                    f"with neither end a -); got {value!r}"
                )


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The public side."""

    http_host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_host: str = "127.0.0.1"
    grpc_port: int = 50051
    max_in_flight: int = 256  # requests at once; beyond, OverloadedError
    resume_timeout_s: float = 120.0  # how long a stream looks for a verifier that can go on with it


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """All four services."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    verifier_replicas: int = 1
    draft_replicas: int = 1
    scheduler_replicas: int = 1  # one leads; a second one stands by

    def __post_init__(self) -> None:
        _positive(self, "verifier_replicas", "scheduler_replicas")
        scheduler = self.scheduler
        if self.scheduler_replicas > 1 and not (
            scheduler.store_url or scheduler.leader_election == "kubernetes"
        ):
            raise ConfigError(
                f"{self.scheduler_replicas} schedulers need where to elect one: set "
                "scheduler.store_url to a Redis that they share, or scheduler.leader_election to "
                "kubernetes"
            )
        if self.draft_replicas < 0:
            raise ConfigError(f"draft_replicas must not be negative; got {self.draft_replicas}")


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """A settings object from plain data, nested; ConfigError names a key that does not exist."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ConfigError(
            f"{cls.__name__} has no setting {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(sorted(known))}"
        )
    made: dict[str, Any] = {}
    for key, value in values.items():
        nested: Any = known[key].default_factory
        is_group = isinstance(nested, type) and isinstance(value, Mapping)
        made[key] = build(nested, value) if is_group else value
    return cls(**made)


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a YAML or JSON file; ConfigError if it cannot be read as a mapping."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of settings; got {type(raw).__name__}")
    return raw


def _positive(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1; got {getattr(settings, name)}")
