"""Settings of each part, with every default written once. Unknown keys are errors (`build`)."""

from dspark.config.engine import (
    DEFAULT_CLASS,
    MAX_BLOCK_SIZE,
    MAX_CLASS_CHARS,
    DraftConfig,
    EngineConfig,
    ModelConfig,
    ServiceClass,
)
from dspark.config.environment import (
    cache_folder,
    cpu_operators,
    cpu_operators_folder,
    kernels_wanted,
)
from dspark.config.network import ClientTls, NetworkConfig, ServiceTls
from dspark.config.reading import build, read_settings
from dspark.config.scaling import AutoscalingConfig, DraftScaling, VerifierScaling
from dspark.config.services import (
    GatewayConfig,
    KubernetesConfig,
    SchedulerConfig,
    ServeConfig,
)

__all__ = [
    "DEFAULT_CLASS",
    "MAX_BLOCK_SIZE",
    "MAX_CLASS_CHARS",
    "AutoscalingConfig",
    "ClientTls",
    "DraftConfig",
    "DraftScaling",
    "EngineConfig",
    "GatewayConfig",
    "KubernetesConfig",
    "ModelConfig",
    "NetworkConfig",
    "SchedulerConfig",
    "ServeConfig",
    "ServiceClass",
    "ServiceTls",
    "VerifierScaling",
    "build",
    "cache_folder",
    "cpu_operators",
    "cpu_operators_folder",
    "kernels_wanted",
    "read_settings",
]
