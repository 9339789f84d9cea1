"""TLS secrets with real certificates, as Kubernetes keeps them."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def secret(name: str, **values: bytes) -> dict[str, Any]:
    """An opaque one; `_` in a key's name stands for a dot."""
    data = {k.replace("_", "."): base64.b64encode(v).decode() for k, v in values.items()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": "serving"},
        "data": data,
    }


def tls_secret(
    name: str, dns_name: str, *, days: float = 90, stranger: bool = False
) -> dict[str, Any]:
    """Certificate, key and CA; `days` until it ends; `stranger`: the CA is another's."""
    authority, other, leaf = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    now = datetime.now(UTC)
    root = _sign("root", authority, "root", authority, now + timedelta(days=3650), "")
    end = now + timedelta(days=days)
    certificate = _sign("peer", leaf, "root", other if stranger else authority, end, dns_name)
    key = leaf.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return secret(name, tls_crt=certificate, tls_key=key, ca_crt=root)


def _sign(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    end: datetime,
    dns_name: str,
) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - timedelta(days=4000))
        .not_valid_after(end)
    )
    if dns_name:
        names = x509.SubjectAlternativeName([x509.DNSName(dns_name)])
        builder = builder.add_extension(names, critical=False)
    signed = builder.sign(signer, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)
