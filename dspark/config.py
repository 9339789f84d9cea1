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

from dspark.errors import ConfigError, InvalidRequestError

T = TypeVar("T")

MAX_CLASS_CHARS = 64
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def cache_folder() -> Path:
    """For models and built operators: $DSPARK_CACHE, else $XDG_CACHE_HOME/dspark, else ~/.cache."""
    if explicit := os.environ.get("DSPARK_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark"


def cpu_operators() -> str:
    """$DSPARK_CPU_OPERATORS: auto (default), amx, avx512, avx2, or none for torch alone."""
    wanted = os.environ.get("DSPARK_CPU_OPERATORS", "auto")
    if wanted not in ("auto", "amx", "avx512", "avx2", "none"):
        raise ConfigError(
            f"DSPARK_CPU_OPERATORS must be auto, amx, avx512, avx2 or none; got {wanted!r}"
        )
    return wanted


def cpu_operators_folder() -> Path | None:
    """$DSPARK_CPU_OPERATORS_FOLDER: of operators built beforehand, as images bring them."""
    explicit = os.environ.get("DSPARK_CPU_OPERATORS_FOLDER")
    return Path(explicit) if explicit else None


def kernels_wanted() -> str:
    """$DSPARK_KERNELS: auto (default: by device), triton, or reference for torch alone."""
    wanted = os.environ.get("DSPARK_KERNELS", "auto")
    if wanted not in ("auto", "triton", "reference"):
        raise ConfigError(f"DSPARK_KERNELS must be auto, triton or reference; got {wanted!r}")
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
    # What a request says is the same to the bit whatever else is in a step. Always so on the CPU's
    # bfloat16 operators; on a GPU it takes kernels that are slower.
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16; got {self.dtype!r}")


DEFAULT_CLASS = "default"


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """What requests of one kind may expect (docs/service-classes.md)."""

    weight: float = 1.0  # of a token, beside those of other classes
    min_tokens_per_s: float = 0.0  # for each user, once its first token is there; 0: no floor
    max_first_token_s: float = 0.0  # from arrival to the first token; 0: no ceiling

    def __post_init__(self) -> None:
        _between(self, 1e-3, 1e3, "weight")
        _between(self, 0.0, 1e6, "min_tokens_per_s")
        _between(self, 0.0, 1e6, "max_first_token_s")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of a verifier engine."""

    max_requests: int = 32  # generated at the same time
    max_waiting: int = 256  # queued behind them; beyond, OverloadedError
    max_queue_s: float = 30.0  # a served request waits no longer to begin; 0: for ever
    cache_tokens: int = 32768  # positions of KV cache, over all requests
    prefill_chunk_tokens: int = 256  # prompt tokens in one step, at most
    prefill_stretch: float = 3.0  # such a step may take this many times one without prompts
    prefix_cache: bool = True  # prompts that begin alike share pages
    check_pages: bool = False  # audit page ownership after every step; an error ends the engine
    policy: str = "adaptive"  # adaptive | fixed | off
    # How sampled requests' draft tokens are admitted: by Algorithm 1 in each step (synchronous), or
    # as many as earlier steps say (asynchronous). auto: the latter where step times have dents.
    planner: str = "auto"
    block_size: int = 0  # draft tokens a round; 0: the drafter's own
    prompt_lookup: bool = True  # draft from requests' own text while no drafter can be asked
    # Adaptive: leave requests out whose own blocks would not pay. Off, until it is shown to gain.
    draft_by_request: bool = False
    # By name; requests that name none are of the class "default".
    classes: Mapping[str, ServiceClass] = field(
        default_factory=dict, metadata={"values": ServiceClass}
    )

    def __post_init__(self) -> None:
        _positive(self, "max_requests", "max_waiting", "cache_tokens", "prefill_chunk_tokens")
        if not 0.0 <= self.max_queue_s < math.inf:
            raise ConfigError(f"max_queue_s must be 0 (no limit) or more; got {self.max_queue_s}")
        if not self.prefill_stretch >= 1.0:
            raise ConfigError(f"prefill_stretch must be at least 1; got {self.prefill_stretch}")
        if self.policy not in ("adaptive", "fixed", "off"):
            raise ConfigError(f"policy must be adaptive, fixed or off; got {self.policy!r}")
        if self.planner not in ("auto", "synchronous", "asynchronous"):
            raise ConfigError(
                f"planner must be auto, synchronous or asynchronous; got {self.planner!r}"
            )
        for name in self.classes:
            if not isinstance(name, str) or not 0 < len(name) <= MAX_CLASS_CHARS:
                raise ConfigError(
                    f"a service class needs a name of 1 to {MAX_CLASS_CHARS} characters; got "
                    f"{name!r}"
                )

    def service_class(self, name: str) -> ServiceClass:
        """The class of a request that names it; InvalidRequestError if there is none."""
        found = self.classes.get(name or DEFAULT_CLASS)
        if found is not None:
            return found
        if name and name != DEFAULT_CLASS:
            known = ", ".join(sorted({DEFAULT_CLASS, *self.classes}))
            raise InvalidRequestError(
                f"there is no service class {name[:MAX_CLASS_CHARS]!r} here; there is {known}",
                param="service_class",
            )
        return ServiceClass()


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Bounds of a draft replica."""

    cache_tokens: int = 65536  # positions of context, over all sessions
    max_batch_works: int = 64  # works drafted for together; one verifier's batch is not split
    max_streams: int = 32  # verifiers served at once


@dataclass(frozen=True, slots=True)
class KubernetesConfig:
    """Which nodes and pods the scheduler follows (docs/kubernetes-load.md)."""

    enabled: str | bool = "auto"  # auto: in a pod with a service account | on | off
    kubeconfig: str = ""  # path; empty: the service account, else as kubectl finds it
    namespace: str = ""  # of the pods; empty: the scheduler's own; "*": all
    pod_selector: str = ""  # of labels, as in kubectl's --selector; empty: all pods
    pool_label: str = "dspark.io/pool"  # names a node's pool; without it, the clouds' own do

    def __post_init__(self) -> None:
        # YAML reads a bare on or off as a truth value.
        if self.enabled not in ("auto", "on", "off", True, False):
            raise ConfigError(f"kubernetes.enabled must be auto, on or off; got {self.enabled!r}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Leases, the store, and the election of one scheduler among several."""

    heartbeat_s: float = 1.0
    lease_s: float = 5.0  # a replica silent for this long is gone
    store_url: str = ""  # redis://… ; empty: in this process
    # A verifier whose measured throughput is this far from the predicted, as |log ratio|, is warned
    # of; 0: never.
    throughput_alarm: float = 0.25
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    leader_election: str = "store"  # store | kubernetes
    leader_lease_s: float = 3.0  # a leader silent for this long is replaced by a standby
    kubernetes_lease: str = "dspark-scheduler"  # name of the Lease
    kubernetes_namespace: str = ""  # empty: the pod's own

    def __post_init__(self) -> None:
        _between(self, 0.0, math.inf, "throughput_alarm")
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
class VerifierScaling:
    """When verifiers come and go (docs/autoscaling.md)."""

    policy: str = "pressure"  # pressure | forecast | module:Class, a policy of Ray Serve
    min_replicas: int = 1
    max_replicas: int = 4
    kv_pressure: float = 0.7  # share of its KV pages that a replica should have in use
    queue_age_s: float = 2.0  # no request should wait for longer
    floor_attainment: float = 0.95  # share of requests with a floor that should be above it
    up_after_s: float = 10.0  # more replicas are needed for so long before they come
    down_after_s: float = 300.0  # and fewer, before they go
    deadband: float = 0.1  # of their number; a need that is no further from it changes nothing
    lead_s: float = 900.0  # policy forecast: how far ahead it looks

    def __post_init__(self) -> None:
        _check_scaling(self, 1, "pressure", "forecast")
        _between(self, 0.01, 1.0, "kv_pressure")
        _between(self, 0.01, 0.99, "floor_attainment")  # all, and none could ever go
        _between(self, 0.01, math.inf, "queue_age_s")
        _between(self, 0.0, 43200.0, "lead_s")


@dataclass(frozen=True, slots=True)
class DraftScaling:
    """When draft replicas come and go (docs/autoscaling.md)."""

    policy: str = "demand"  # demand | module:Class, a policy of Ray Serve
    min_replicas: int = 0
    max_replicas: int = 4
    min_ratio: float = 0.25  # draft replicas to a verifier, while any are wanted
    max_ratio: float = 1.0
    busy: float = 0.6  # share of the time that a replica should be drafting
    missed: float = 0.05  # share of blocks that may miss their deadline
    wanted: float = 0.25  # a verifier that wants blocks in this share of its rounds wants drafts
    wake_after_s: float = 5.0  # drafts are wanted for so long before the first comes
    zero_after_s: float = 300.0  # and by nobody, before the last goes
    retry_after_s: float = 3600.0  # with traffic and no drafts for so long, look again; 0: never
    up_after_s: float = 10.0
    down_after_s: float = 300.0
    deadband: float = 0.1

    def __post_init__(self) -> None:
        _check_scaling(self, 0, "demand")
        _between(self, 0.01, 1.0, "busy", "missed", "wanted")
        _between(self, 0.0, math.inf, "min_ratio", "wake_after_s", "zero_after_s", "retry_after_s")
        _between(self, max(self.min_ratio, 0.01), math.inf, "max_ratio")


@dataclass(frozen=True, slots=True)
class AutoscalingConfig:
    """Replicas by load; off, there are as many as ServeConfig says."""

    enabled: bool = False
    interval_s: float = 5.0  # between reports; policies see means over the last four
    stale_after_s: float = 30.0  # an older report is none, and nothing shrinks without reports
    verifier: VerifierScaling = field(default_factory=VerifierScaling)
    draft: DraftScaling = field(default_factory=DraftScaling)

    def __post_init__(self) -> None:
        _between(self, 0.1, math.inf, "interval_s")
        _between(self, 2 * self.interval_s, math.inf, "stale_after_s")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """All four services."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)
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
        if not self.autoscaling.enabled:
            return
        for pool in ("verifier", "draft"):
            if (count := getattr(self, f"{pool}_replicas")) != 1:
                raise ConfigError(
                    f"{pool}_replicas is {count}, but autoscaling is enabled and decides: set "
                    f"autoscaling.{pool}.min_replicas and max_replicas instead"
                )

    @property
    def most_drafts(self) -> int:
        """Draft replicas that there may be at a time."""
        scaling = self.autoscaling
        return scaling.draft.max_replicas if scaling.enabled else self.draft_replicas


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
        is_group = isinstance(nested, type)
        if is_group and not isinstance(value, Mapping | nested):
            raise ConfigError(f"{key} must be a mapping of settings; got {value!r}")
        if (each := known[key].metadata.get("values")) is not None:
            made[key] = {name: _named(each, key, name, group) for name, group in value.items()}
        else:
            made[key] = build(nested, value) if isinstance(value, Mapping) else value
    return cls(**made)


def _named(cls: type[T], key: str, name: str, group: object) -> T:
    """One of the settings groups that `key` holds by name."""
    if isinstance(group, cls):
        return group
    if not isinstance(group, Mapping):
        raise ConfigError(f"{key}.{name} must be a mapping of settings; got {group!r}")
    return build(cls, group)


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


def _between(settings: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ConfigError(f"{name} must be a number {limits}; got {value!r}")


def _check_scaling(settings: VerifierScaling | DraftScaling, least: int, *policies: str) -> None:
    if settings.policy not in policies and ":" not in str(settings.policy):
        raise ConfigError(
            f"no autoscaling policy is called {settings.policy!r}: choose {' or '.join(policies)}, "
            "or name a class as module:Class"
        )
    _between(settings, least, math.inf, "min_replicas")
    _between(settings, max(least, settings.min_replicas), math.inf, "max_replicas")
    for name in ("min_replicas", "max_replicas"):
        if not isinstance(getattr(settings, name), int):
            raise ConfigError(f"{name} must be a whole number; got {getattr(settings, name)!r}")
    _between(settings, 0.0, math.inf, "up_after_s", "down_after_s")
    _between(settings, 0.0, 1.0, "deadband")
