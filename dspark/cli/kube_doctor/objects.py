"""Objects of the Kubernetes API, as the JSON that they come in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from kubernetes.utils.quantity import parse_quantity

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Denied:
    """What the API would not show, and why."""

    what: str
    reason: str


Listing = tuple[Raw, ...] | Denied
Single = Raw | Denied | None  # None: there is none


def dig(raw: object, *path: str) -> Any:
    """What lies at a path of keys; None where one is missing."""
    for key in path:
        if not isinstance(raw, Mapping):
            return None
        raw = raw.get(key)
    return raw


def items(raw: object, *path: str) -> list[Any]:
    """The list at a path; empty where there is none."""
    found = dig(raw, *path)
    return list(found) if isinstance(found, list | tuple) else []


def mapping(raw: object, *path: str) -> Mapping[str, Any]:
    """The mapping at a path; empty where there is none."""
    found = dig(raw, *path)
    return found if isinstance(found, Mapping) else {}


def text(raw: object, *path: str) -> str:
    """The text at a path; empty where there is none."""
    found = dig(raw, *path)
    return "" if found is None else str(found)


def name_of(raw: Raw) -> str:
    """Of its metadata."""
    return text(raw, "metadata", "name")


def labels_of(raw: Raw) -> Mapping[str, Any]:
    """Of its metadata."""
    return mapping(raw, "metadata", "labels")


def condition(raw: Raw, kind: str) -> Raw:
    """One of its status conditions; empty without."""
    found = (c for c in items(raw, "status", "conditions") if dig(c, "type") == kind)
    return next(found, {})


def quantities(raw: object, *path: str) -> dict[str, Decimal]:
    """A mapping of resources to amounts; what cannot be read counts as absent."""
    amounts = {}
    for name, amount in mapping(raw, *path).items():
        try:
            amounts[str(name)] = Decimal(parse_quantity(amount))
        except (ValueError, TypeError, InvalidOperation):
            continue
    return amounts


def add(amounts: dict[str, Decimal], more: Mapping[str, Decimal], times: int = 1) -> None:
    """Into `amounts`."""
    for name, amount in more.items():
        amounts[name] = amounts.get(name, Decimal(0)) + times * amount


def amount_text(resource: str, amount: Decimal) -> str:
    """8, 7.5 or 12.0 GiB."""
    if resource.endswith(("memory", "storage")) and abs(amount) >= 1 << 20:
        return f"{amount / (1 << 30):.1f} GiB"
    return f"{amount.normalize():f}"


def pod_requests(spec: object) -> dict[str, Decimal]:
    """What a pod asks of a node: its containers' sum, or the largest of the init containers."""
    total: dict[str, Decimal] = {}
    for container in items(spec, "containers"):
        add(total, _asked(container))
    first: dict[str, Decimal] = {}
    for container in items(spec, "initContainers"):
        if dig(container, "restartPolicy") == "Always":  # a sidecar: it stays
            add(total, _asked(container))
        for name, amount in _asked(container).items():
            first[name] = max(first.get(name, Decimal(0)), amount)
    return {
        name: max(total.get(name, Decimal(0)), first.get(name, Decimal(0)))
        for name in {**total, **first}
    }


def _asked(container: object) -> dict[str, Decimal]:
    """Requests; a limit without one is one."""
    limits = quantities(container, "resources", "limits")
    return {**limits, **quantities(container, "resources", "requests")}


def selects(selector: object, labels: Mapping[str, Any]) -> bool:
    """Whether a LabelSelector takes these labels; an empty one takes all."""
    wanted = mapping(selector, "matchLabels")
    return all(labels.get(name) == value for name, value in wanted.items()) and all(
        expression_holds(expression, labels) for expression in items(selector, "matchExpressions")
    )


def expression_holds(expression: object, labels: Mapping[str, Any]) -> bool:
    """One requirement of a selector of labels, or of nodes."""
    key, operator = text(expression, "key"), text(expression, "operator")
    values, has = items(expression, "values"), labels.get(key)
    match operator:
        case "In":
            return has in values
        case "NotIn":
            return has not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case "Gt" | "Lt":
            try:
                return (float(has) > float(values[0])) == (operator == "Gt") if has else False
            except (ValueError, IndexError):
                return False
    return False


def time_of(raw: object, *path: str) -> datetime | None:
    """An RFC 3339 time; None where there is none that can be read."""
    try:
        found = datetime.fromisoformat(text(raw, *path))
    except ValueError:
        return None
    return found if found.tzinfo else None


def printable(words: str, most: int = 300) -> str:
    """A message of others on one line, unable to move the cursor."""
    line = " ".join(words.split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= most else line[: most - 1] + "…"


def named(raws: Iterable[Raw]) -> dict[str, Raw]:
    """By name."""
    return {name_of(raw): raw for raw in raws}
