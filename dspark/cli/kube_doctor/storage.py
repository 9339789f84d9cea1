"""Whether the volumes that are claimed can be had."""

from __future__ import annotations

from collections.abc import Iterator

from dspark.cli.kube_doctor.findings import Finding, failed, listed, ok, unseen, warning
from dspark.cli.kube_doctor.manifests import WantedClaim
from dspark.cli.kube_doctor.objects import (
    Denied,
    Listing,
    Raw,
    items,
    mapping,
    name_of,
    named,
    text,
)

_DEFAULT = "storageclass.kubernetes.io/is-default-class"
# Provisioners of disks that one node mounts at a time.
_ONE_NODE = (
    "ebs.csi.aws.com",
    "kubernetes.io/aws-ebs",
    "pd.csi.storage.gke.io",
    "kubernetes.io/gce-pd",
    "disk.csi.azure.com",
    "kubernetes.io/azure-disk",
    "cinder.csi.openstack.org",
    "rancher.io/local-path",
    "openebs.io/local",
)


def check_claims(
    claims: tuple[WantedClaim, ...], existing: tuple[str, ...], classes: Listing, there: Listing
) -> Iterator[Finding]:
    """Claims that the chart makes, and those that it is told of."""
    for claim in claims:
        yield _class(claim, classes)
    for name in existing:
        yield _existing(name, there)


def check_default_class(classes: Listing) -> Iterator[Finding]:
    """Where nothing is known of what will be claimed."""
    if isinstance(classes, Denied):
        yield unseen("storage classes", classes)
    elif not _defaults(classes):
        yield warning(
            "storage classes",
            f"no default one; there is {listed([name_of(c) for c in classes]) or 'none'}",
            "name one in the values, or use the model cache without a claim",
        )
    else:
        yield ok("storage classes", f"default: {name_of(_defaults(classes)[0])}")


def _class(claim: WantedClaim, classes: Listing) -> Finding:
    check = f"claim {claim.name}"
    if claim.storage_class == "":
        return ok(check, "of a volume made by hand")
    if isinstance(classes, Denied):
        return unseen(check, classes)
    names = listed([name_of(c) for c in classes]) or "none"
    if claim.storage_class is None:
        defaults = _defaults(classes)
        if not defaults:
            return failed(
                check,
                f"no storage class is named and none is the default; there is {names}",
                "name one in the values, or mark one as the default",
            )
        found = defaults[0]
    elif (given := named(classes).get(claim.storage_class)) is None:
        return failed(
            check,
            f"there is no storage class {claim.storage_class}; there is {names}",
            "name one of these in the values",
        )
    else:
        found = given
    provisioner = text(found, "provisioner")
    said = f"storage class {name_of(found)} ({provisioner})"
    if provisioner in _ONE_NODE and "ReadWriteMany" in claim.access_modes:
        return failed(
            check,
            f"{said} makes disks for one node at a time; ReadWriteMany is asked for",
            "name a class of shared file systems (NFS, EFS, Filestore, CephFS), or use hostPath or "
            "an image volume as the model cache",
        )
    return ok(check, f"{said}, {', '.join(claim.access_modes)}")


def _existing(name: str, there: Listing) -> Finding:
    check = f"claim {name}"
    if isinstance(there, Denied):
        return unseen(check, there)
    claim = named(there).get(name)
    if claim is None:
        return failed(check, "it does not exist", "make it, or leave the claim to the chart")
    phase = text(claim, "status", "phase")
    if phase == "Bound":
        return ok(check, f"bound, {', '.join(map(str, items(claim, 'status', 'accessModes')))}")
    return warning(
        check,
        f"{phase or 'not bound'}",
        "right where its class binds at first use; see kubectl describe pvc otherwise",
    )


def _defaults(classes: tuple[Raw, ...]) -> list[Raw]:
    return [c for c in classes if mapping(c, "metadata", "annotations").get(_DEFAULT) == "true"]
