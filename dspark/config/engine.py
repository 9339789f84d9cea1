"""Models, and the bounds of the engines that run them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dspark.config.checks import between, positive
from dspark.errors import ConfigError, InvalidRequestError

MAX_CLASS_CHARS = 64
MAX_BLOCK_SIZE = 64  # draft tokens
DEFAULT_CLASS = "default"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which models, in which precision, where."""

    target: str = "smollm2-135m"
    # Folder or id, of DSpark's or of a causal LM; "prompt-lookup" or "none". Empty: as shipped.
    drafter: str = ""
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int = 0  # torch threads of a replica; 0: torch's choice on a CPU, one beside a GPU
    # What a request says is the same to the bit whatever else is in a step. Always so on the CPU's
    # bfloat16 operators; on a GPU it takes kernels that are slower.
    batch_invariant: bool = False
    # Processes, a GPU of one node each, that a verifier splits its target over. A drafter is light
    # and stays whole: draft replicas, which read of a target its ends alone, have no use for it.
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16; got {self.dtype!r}")
        between(self, 0, math.inf, "threads")
        positive(self, "tensor_parallel")
        if self.tensor_parallel == 1:
            return
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel} and device is {self.device!r}, but it "
                "takes the first GPUs that are seen: set device to cuda (or to cpu, to try it out)"
            )
        if self.batch_invariant:
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel} and batch_invariant is true, but in "
                "which order parts are added up depends on how many rows there are: leave one out"
            )


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """What requests of one kind may expect (docs/service-classes.md)."""

    weight: float = 1.0  # of a token, beside those of other classes
    min_tokens_per_s: float = 0.0  # for each user, once its first token is there; 0: no floor
    max_first_token_s: float = 0.0  # from arrival to the first token; 0: no ceiling

    def __post_init__(self) -> None:
        between(self, 1e-3, 1e3, "weight")
        between(self, 0.0, 1e6, "min_tokens_per_s")
        between(self, 0.0, 1e6, "max_first_token_s")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of a verifier engine."""

    max_requests: int = 32  # generated at the same time
    max_waiting: int = 256  # queued behind them; beyond, OverloadedError
    max_queue_s: float = 30.0  # a served request waits no longer to begin; 0: for ever
    cache_tokens: int = 32768  # positions of KV cache, over all requests
    prefill_chunk_tokens: int = 256  # prompt tokens in one step, at most
    prefill_stretch: float = 3.0  # such a step may take this many times one without prompts
    # In a step for longer, an engine hangs, and its replica is replaced; 0: for ever. A step has
    # prefill_chunk_tokens of prompts at most, so that none takes nearly as long, its first use of
    # kernels included; and clients do not wait for much more than that.
    max_step_s: float = 300.0
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
        positive(self, "max_requests", "max_waiting", "cache_tokens", "prefill_chunk_tokens")
        if not 0.0 <= self.max_queue_s < math.inf:
            raise ConfigError(f"max_queue_s must be 0 (no limit) or more; got {self.max_queue_s}")
        between(self, 0.0, 1e6, "max_step_s")
        if not self.prefill_stretch >= 1.0:
            raise ConfigError(f"prefill_stretch must be at least 1; got {self.prefill_stretch}")
        if self.policy not in ("adaptive", "fixed", "off"):
            raise ConfigError(f"policy must be adaptive, fixed or off; got {self.policy!r}")
        if not 0 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ConfigError(
                f"block_size must be between 0 (the drafter's own) and {MAX_BLOCK_SIZE}; got "
                f"{self.block_size}"
            )
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

    def class_or_default(self, name: str) -> ServiceClass:
        """The class of a request that named it while there was one, else "default"."""
        return self.classes.get(name) or self.service_class(DEFAULT_CLASS)

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
    max_run_s: float = 300.0  # in a run for longer, a replica hangs and is replaced; 0: for ever

    def __post_init__(self) -> None:
        between(self, 0.0, 1e6, "max_run_s")
        positive(self, "cache_tokens", "max_batch_works", "max_streams")
