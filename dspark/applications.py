"""The Serve applications of a cluster: what each is given, and what it may be given anew.

Each application has one deployment of its own name. Its `args` are settings of ServeConfig that the
role reads; they are fixed for a replica's life. Its deployment's `user_config` holds some of them
that a running replica takes over (docs/deployment.md has the table).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dspark.config import ServeConfig, build
from dspark.errors import ConfigError

log = logging.getLogger(__name__)

# What every replica reads: how to beat, how to find the scheduler, and how to speak with others.
_ALL = ("scheduler", "network")


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

    def deployed(self, args: object) -> ServeConfig:
        """The same for Serve's task that builds an application.

        RayServeException instead: Serve takes that as final, and makes four attempts, a new process
        each, after any other.
        """
        from ray.serve.exceptions import RayServeException  # a check of settings needs no Ray

        try:
            return self.configured(args)
        except ConfigError as error:
            raise RayServeException(str(error)) from error

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
                groups[name] = replace(group, **{key: getattr(made, key) for key in given})
            except ConfigError as error:
                raise ConfigError(
                    f"user_config of the deployment {self.name!r}: {name}: {error}"
                ) from error
        return replace(config, **groups)

    def _changeable(self) -> list[str]:
        return [f"{group}.{key}" for group, keys in self.changes.items() for key in keys]

    def _mapping(self, what: str, values: object) -> Mapping[str, Any]:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigError(
                f"{what} of {self.name!r} must be a mapping of settings; got {values!r}"
            )
        return values


class Reconfiguring:
    """One replica's, which takes over a user_config at its start and whenever it changes.

    Serve stops a replica that refuses one, and then every other that starts in its place. A replica
    that serves is not to be lost for a slip of the pen: it goes on as it was.
    """

    def __init__(self) -> None:
        self._began = False

    @contextmanager
    def taking(self) -> Iterator[None]:
        """A ConfigError inside ends a start, and is logged and left at that later on."""
        try:
            yield
        except ConfigError as error:
            if not self._began:
                raise
            log.error("this replica goes on as it was: %s", error)
        self._began = True


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


def keep_loaded() -> None:
    """Spare all that this process has loaded from garbage collection, for as long as it lives.

    A full collection would walk libraries and model: some 0.3 s, in which no token comes.
    """
    gc.collect()
    gc.freeze()


def check_serve_config(config: Mapping[str, Any]) -> None:
    """ConfigError if a Serve config gives one of these applications what it would refuse.

    Looks at args and at user_config; what is Serve's own, Serve checks. Other applications pass.
    """
    known = {f"dspark.services.{one.name}.app:build": one for one in APPLICATIONS}
    for given in config.get("applications", []):
        application = known.get(given.get("import_path"))
        if application is None:
            continue
        settings = application.configured(given.get("args", {}))
        for deployment in given.get("deployments", []):
            if deployment.get("name") != application.name:
                raise ConfigError(
                    f"the application {given.get('name')!r} has one deployment, "
                    f"{application.name!r}, but options are given for {deployment.get('name')!r}"
                )
            application.changed(settings, deployment.get("user_config") or {})
