"""The Serve applications of a cluster: what each is given, and what it may be given anew.

Each application has one deployment of its own name. Its `args` are settings of ServeConfig that the
role reads; they are fixed for a replica's life. Its deployment's `user_config` holds some of them
that a running replica takes over (docs/deployment.md has the table).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dspark.config import ServeConfig, build
from dspark.errors import ConfigError

# What every replica reads: how to beat, and how to find the scheduler.
_ALL = ("scheduler",)


@dataclass(frozen=True, slots=True)
class Application:
    """One role's."""

    name: str  # of the application and of its deployment
    reads: tuple[str, ...]  # of ServeConfig
    changes: Mapping[str, tuple[str, ...]]  # by group, what may change while it serves

    def configured(self, args: object) -> ServeConfig:
        """Settings by `args`; ConfigError names what this role does not read or cannot have."""
        given = self._mapping("args", args)
        unread = sorted(map(repr, given.keys() - set(self.reads)))
        if unread:
            raise ConfigError(
                f"args of the application {self.name!r} hold {', '.join(unread)}, which it does "
                f"not read; it reads {', '.join(sorted(self.reads))}"
            )
        try:
            return build(ServeConfig, given)
        except ConfigError as error:
            raise ConfigError(f"args of the application {self.name!r}: {error}") from error

    def changed(self, config: ServeConfig, user_config: object) -> ServeConfig:
        """`config`, as it was at the start, with what `user_config` changes.

        What it leaves out is as it was at the start. ConfigError names what may not change.
        """
        groups: dict[str, Any] = {}
        for name, values in self._mapping("user_config", user_config).items():
            allowed = self.changes.get(name, ())
            given = self._mapping(f"user_config, {name},", values)
            fixed = sorted(f"{name}.{key}" for key in given.keys() - set(allowed))
            if fixed or not allowed:
                raise ConfigError(
                    f"user_config of the deployment {self.name!r} holds "
                    f"{', '.join(fixed) or name}, which does not change while it serves: set it in "
                    f"the application's args. What may change is {', '.join(self._changeable())}"
                )
            group = getattr(config, name)
            try:
                made = build(type(group), given)
            except ConfigError as error:
                raise ConfigError(
                    f"user_config of the deployment {self.name!r}: {name}: {error}"
                ) from error
            groups[name] = replace(group, **{key: getattr(made, key) for key in given})
        return replace(config, **groups)

    def _changeable(self) -> list[str]:
        return [f"{group}.{key}" for group, keys in self.changes.items() for key in keys]

    def _mapping(self, what: str, values: object) -> Mapping[str, Any]:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigError(
                f"{what} of {self.name!r} must be a mapping of settings; got {values!r}"
            )
        return values


# The scheduler's word on these three holds wherever it is heard; a verifier's own, while it is not.
_PLANNED = ("policy", "block_size", "draft_by_request")

SCHEDULER = Application(
    "scheduler",
    reads=(*_ALL, "engine", "scheduler_replicas"),
    changes={"engine": _PLANNED},
)
DRAFT = Application(
    "draft",
    reads=(*_ALL, "model", "draft", "draft_replicas", "autoscaling"),
    changes={"draft": ("max_batch_works", "max_streams")},
)
VERIFIER = Application(
    "verifier",
    reads=(*_ALL, "model", "engine", "verifier_replicas", "autoscaling"),
    changes={
        "engine": (*_PLANNED, "classes", "max_waiting", "max_queue_s", "prefill_stretch"),
    },
)
GATEWAY = Application(
    "gateway",
    reads=(*_ALL, "model", "engine", "gateway", "gateway_replicas"),
    changes={"gateway": ("max_in_flight", "resume_timeout_s"), "engine": ("classes",)},
)
APPLICATIONS = (SCHEDULER, DRAFT, VERIFIER, GATEWAY)  # in the order in which they had best start
