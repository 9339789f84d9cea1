"""What a rendered chart wants of a cluster, read off its objects.

The rendered objects are read and not the values: they are what will be applied, whatever the values
are called, and a value that the chart ignores cannot mislead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import yaml

from dspark.cli.kube_doctor.objects import (
    Raw,
    dig,
    items,
    mapping,
    name_of,
    pod_requests,
    quantities,
    text,
)
from dspark.errors import ConfigError

INTERNAL_NAME = "dspark.internal"  # in every certificate that the services show each other


@dataclass(frozen=True, slots=True)
class Workload:
    """Pods of one template."""

    name: str
    least: int
    most: int
    spec: Raw  # of the pod

    @property
    def requests(self) -> dict[str, Decimal]:
        """Of one pod, by resource."""
        return pod_requests(self.spec)


@dataclass(frozen=True, slots=True)
class WantedSecret:
    """A secret that must be there before the install."""

    name: str
    keys: frozenset[str] = frozenset()
    certificate: bool = False
    dns_name: str = ""  # that the certificate must be for
    any_key: bool = False  # one at least, whatever it is called


@dataclass(frozen=True, slots=True)
class WantedClaim:
    """A volume that the chart claims."""

    name: str
    storage_class: str | None  # None: the default; "": a volume made by hand
    access_modes: tuple[str, ...]
    bytes: Decimal


@dataclass(frozen=True, slots=True)
class Wanted:
    """All of it."""

    kinds: frozenset[tuple[str, str]] = frozenset({("ray.io/v1", "RayService")})
    workloads: tuple[Workload, ...] = ()
    secrets: tuple[WantedSecret, ...] = ()
    claims: tuple[WantedClaim, ...] = ()
    existing_claims: tuple[str, ...] = ()
    redis_urls: tuple[str, ...] = ()
    host_paths: tuple[str, ...] = ()
    made_services: frozenset[str] = frozenset()


@dataclass
class _Needs:
    """Of one secret, as they are met."""

    keys: set[str] = field(default_factory=set)
    certificate: bool = False
    dns_name: str = ""
    any_key: bool = False


def read_manifests(documents: Iterable[Any]) -> Wanted:
    """From the documents of `helm template`; ConfigError if there is no RayService among them."""
    raws = [raw for raw in documents if isinstance(raw, Mapping) and not _is_test(raw)]
    by_kind: dict[str, list[Raw]] = {}
    for raw in raws:
        by_kind.setdefault(text(raw, "kind"), []).append(raw)
    if not by_kind.get("RayService"):
        raise ConfigError(
            f"there is no RayService among the {len(raws)} objects: give the output of "
            "`helm template` for the chart dspark"
        )
    workloads = tuple(w for raw in raws for w in _workloads(raw))
    made = {name_of(raw) for raw in by_kind.get("Secret", [])} | {
        text(raw, "spec", "secretName") for raw in by_kind.get("Certificate", [])
    }
    claims = tuple(_claim(raw) for raw in _claims(by_kind))
    volumes = [v for w in workloads for v in items(w.spec, "volumes")]
    named = {text(v, "persistentVolumeClaim", "claimName") for v in volumes} - {""}
    return Wanted(
        kinds=frozenset((text(raw, "apiVersion"), text(raw, "kind")) for raw in raws),
        workloads=workloads,
        secrets=tuple(_secrets(by_kind["RayService"], workloads, made)),
        claims=claims,
        existing_claims=tuple(sorted(named - {claim.name for claim in claims})),
        redis_urls=tuple(sorted(_redis_urls(by_kind["RayService"]))),
        host_paths=tuple(sorted({text(v, "hostPath", "path") for v in volumes} - {""})),
        made_services=frozenset(name_of(raw) for raw in by_kind.get("Service", [])),
    )


def serve_arguments(service: Raw) -> Iterator[Mapping[str, Any]]:
    """The settings that each Serve application of a RayService is given."""
    try:
        config = yaml.safe_load(text(service, "spec", "serveConfigV2") or "{}")
    except yaml.YAMLError as error:
        raise ConfigError(f"serveConfigV2 of {name_of(service)} is no YAML: {error}") from error
    for application in items(config, "applications"):
        yield mapping(application, "args")


def _is_test(raw: Raw) -> bool:
    hooks = text(raw, "metadata", "annotations", "helm.sh/hook")
    return "test" in hooks.split(",")


def _workloads(raw: Raw) -> Iterator[Workload]:
    kind, name = text(raw, "kind"), name_of(raw)
    if kind in ("Deployment", "StatefulSet", "Job"):
        count = dig(raw, "spec", "parallelism" if kind == "Job" else "replicas")
        count = 1 if count is None else int(count)
        yield Workload(name, count, count, mapping(raw, "spec", "template", "spec"))
    elif kind == "RayService":
        cluster = mapping(raw, "spec", "rayClusterConfig")
        yield Workload("head", 1, 1, mapping(cluster, "headGroupSpec", "template", "spec"))
        for group in items(cluster, "workerGroupSpecs"):
            count = int(dig(group, "replicas") or 0)
            least = int(count if (n := dig(group, "minReplicas")) is None else n)
            most = int(count if (n := dig(group, "maxReplicas")) is None else n)
            yield Workload(
                text(group, "groupName"),
                least,
                max(most, least),
                mapping(group, "template", "spec"),
            )


def _claims(by_kind: Mapping[str, list[Raw]]) -> Iterator[Raw]:
    yield from by_kind.get("PersistentVolumeClaim", [])
    for raw in by_kind.get("StatefulSet", []):
        yield from items(raw, "spec", "volumeClaimTemplates")


def _claim(raw: Raw) -> WantedClaim:
    asked = quantities(raw, "spec", "resources", "requests")
    named = dig(raw, "spec", "storageClassName")
    return WantedClaim(
        name=name_of(raw),
        storage_class=None if named is None else str(named),
        access_modes=tuple(items(raw, "spec", "accessModes")),
        bytes=asked.get("storage", Decimal(0)),
    )


def _secrets(
    services: list[Raw], workloads: tuple[Workload, ...], made: set[str]
) -> Iterator[WantedSecret]:
    needs: dict[str, _Needs] = {}
    for workload in workloads:
        for name, key in _references(workload.spec):
            needs.setdefault(name, _Needs()).keys.update({key} - {""})
    for service in services:
        for name, key in _references(mapping(service, "spec", "rayClusterConfig")):
            needs.setdefault(name, _Needs()).keys.update({key} - {""})
        for arguments in serve_arguments(service):
            _certificates(arguments, workloads, needs)
    for name, need in sorted(needs.items()):
        if name not in made:
            yield WantedSecret(
                name, frozenset(need.keys), need.certificate, need.dns_name, need.any_key
            )


def _references(raw: object) -> Iterator[tuple[str, str]]:
    """(secret, key) of all that is not optional; an empty key stands for the secret as a whole."""
    if isinstance(raw, Mapping):
        for reference in ("secretKeyRef", "secretRef", "secret"):
            found = raw.get(reference)
            if isinstance(found, Mapping) and found.get("optional") is not True:
                name = text(found, "secretName") or text(found, "name")
                keys = [text(i, "key") for i in items(found, "items")] or [text(found, "key")]
                yield from ((name, key) for key in keys if name)
        for pull in items(raw, "imagePullSecrets"):
            yield text(pull, "name"), ".dockerconfigjson"
        for inner in raw.values():
            yield from _references(inner)
    elif isinstance(raw, list):
        for inner in raw:
            yield from _references(inner)


def _certificates(
    arguments: Mapping[str, Any], workloads: tuple[Workload, ...], needs: dict[str, _Needs]
) -> None:
    """Which of the mounted secrets are read as certificates and API keys, and what they need."""
    for group, dns_name in (("network", INTERNAL_NAME), ("gateway", "")):
        for setting, path in mapping(arguments, group, "tls").items():
            for name, key in _mounted(str(path), workloads):
                need = needs.setdefault(name, _Needs())
                need.keys.add(key)
                if setting == "cert_file":
                    need.certificate, need.dns_name = True, dns_name
    folder = text(arguments, "gateway", "api_keys_folder")
    for name, _ in _mounted(f"{folder}/any" if folder else "", workloads):
        needs.setdefault(name, _Needs()).any_key = True


def _mounted(path: str, workloads: tuple[Workload, ...]) -> Iterator[tuple[str, str]]:
    """(secret, key) of a path in the containers."""
    folder, _, key = path.rpartition("/")
    for workload in workloads:
        secrets = {
            text(volume, "name"): secret
            for volume in items(workload.spec, "volumes")
            if (secret := text(volume, "secret", "secretName"))
        }
        for container in items(workload.spec, "containers"):
            for mount in items(container, "volumeMounts"):
                found = secrets.get(text(mount, "name"))
                if found and folder and text(mount, "mountPath").rstrip("/") == folder:
                    yield found, key


def _redis_urls(services: list[Raw]) -> set[str]:
    found = set()
    for service in services:
        address = text(
            service, "spec", "rayClusterConfig", "gcsFaultToleranceOptions", "redisAddress"
        )
        if address:
            first = address.split(",")[0]
            found.add(first if "://" in first else f"redis://{first}")
        for arguments in serve_arguments(service):
            if url := text(arguments, "scheduler", "store_url"):
                found.add(url)
    return found
