"""X.509 certificates of one cluster: the authority's own, and those of machines (RFC 5280).

`cryptography` makes them: it is the one library for X.509 that is kept by a security team,
has wheels for every machine that we run on, and does not need the `openssl` command (which
macOS and small Linux systems have in other versions, or not at all). Keys are of P-256, which
every TLS library takes.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

# Clocks of small clusters are not exact.
_SLACK = timedelta(minutes=5)


def make_authority(name: str, days: float) -> tuple[bytes, bytes]:
    """(key, certificate) of a new authority, PEM."""
    key = _new_key()
    return _key_pem(key), _cert_pem(_sign(key, key, None, name, (), days, datetime.now(UTC)))


def make_leaf(
    ca_key: bytes,
    ca: bytes,
    name: str,
    hosts: Sequence[str],
    days: float,
    now: datetime | None = None,
) -> tuple[bytes, bytes]:
    """(key, certificate) of a machine that serves and calls, PEM.

    Args:
        ca_key, ca: the authority's, PEM.
        hosts: names and addresses that the certificate is for.
        days: how long it holds from ``now``.
    Raises: ValueError, TypeError: the authority's files are damaged or of another kind.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    issuer_key = serialization.load_pem_private_key(ca_key, None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise TypeError("its key is of another kind")
    issuer = x509.load_pem_x509_certificate(ca)
    key = _new_key()
    cert = _sign(key, issuer_key, issuer, name, hosts, days, now or datetime.now(UTC))
    return _key_pem(key), _cert_pem(cert)


def is_ip(host: str) -> bool:
    """Whether it is an address, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _new_key() -> "ec.EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _sign(
    key: "ec.EllipticCurvePrivateKey",
    issuer_key: "ec.EllipticCurvePrivateKey",
    issuer: "x509.Certificate | None",
    name: str,
    hosts: Sequence[str],
    days: float,
    now: datetime,
) -> "x509.Certificate":
    """A certificate; without an issuer that of an authority, for itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    is_ca = issuer is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(is_ca, 0 if is_ca else None), critical=True)
        .add_extension(_usage(is_ca), critical=True)
        .add_extension(own, critical=False)
        .add_extension(authority, critical=False)
    )
    if not is_ca:
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        names = [_general_name(host) for host in hosts]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _usage(is_ca: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> "x509.GeneralName":
    from cryptography import x509

    if is_ip(host):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


def _key_pem(key: "ec.EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _cert_pem(cert: "x509.Certificate") -> bytes:
    from cryptography.hazmat.primitives import serialization

    return cert.public_bytes(serialization.Encoding.PEM)
