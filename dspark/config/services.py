"""The four services together, and what is set for scheduler and gateway alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from dspark.config.checks import between, positive
from dspark.config.engine import DraftConfig, EngineConfig, ModelConfig
from dspark.config.network import ClientTls, NetworkConfig
from dspark.config.scaling import AutoscalingConfig
from dspark.errors import ConfigError

_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


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

    application: str = "scheduler"  # name of its Serve application, by which replicas find it
    heartbeat_s: float = 1.0
    lease_s: float = 5.0  # a replica silent for this long is gone
    store_url: str = ""  # redis://… ; empty: in this process
    # A file with the store's password, read at each connection: a settings file that many may read
    # need not hold it, and it may change.
    store_password_file: str = ""
    # A verifier whose measured throughput is this far from the predicted, as |log ratio|, is warned
    # of; 0: never.
    throughput_alarm: float = 0.25
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    leader_election: str = "store"  # store | kubernetes
    leader_lease_s: float = 3.0  # a leader silent for this long is replaced by a standby
    kubernetes_lease: str = "dspark-scheduler"  # name of the Lease
    kubernetes_namespace: str = ""  # empty: the pod's own

    def __post_init__(self) -> None:
        if self.store_password_file and not self.store_url:
            raise ConfigError(
                f"store_password_file is {self.store_password_file!r}, but there is no store_url "
                "that it would open: set both, or neither"
            )
        between(self, 0.0, math.inf, "throughput_alarm")
        for name in ("heartbeat_s", "lease_s", "leader_lease_s"):
            if not 0 < getattr(self, name) < math.inf:  # also refuses NaN
                raise ConfigError(f"{name} must be above 0 seconds; got {getattr(self, name)}")
        if self.lease_s < 2 * self.heartbeat_s:
            raise ConfigError(
                "lease_s must be at least twice heartbeat_s, or replicas are given up that miss "
                f"one heartbeat; got {self.lease_s} and {self.heartbeat_s}"
            )
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
    tls: ClientTls = field(default_factory=ClientTls)
    # Each file in it holds a key, and its name is the client's. Empty: no keys are asked for.
    api_keys_folder: str = ""

    def __post_init__(self) -> None:
        positive(self, "max_in_flight")
        between(self, 0.0, math.inf, "resume_timeout_s")
        between(self, 0, 65535, "http_port", "grpc_port")  # gRPC takes what is left by 65536


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """All four services."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    verifier_replicas: int = 1
    draft_replicas: int = 1
    scheduler_replicas: int = 1  # one leads; a second one stands by
    gateway_replicas: int = 1  # each on a node of its own, where its gRPC port is free

    def __post_init__(self) -> None:
        positive(self, "verifier_replicas", "scheduler_replicas", "gateway_replicas")
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
