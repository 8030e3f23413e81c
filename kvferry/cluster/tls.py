"""A machine's certificate, its key, and the authority that it trusts: three PEM files.

Every TCP listener asks for a certificate of the same authority, so both sides know that the
other one is of this cluster. Files are checked when they are read: what would otherwise end
in a handshake that says nothing ends in an error that says what to do.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kvferry.errors import ConfigError

CA_FILE, CERT_FILE, KEY_FILE = "ca.pem", "cert.pem", "key.pem"
MAX_PEM_BYTES = 256 * 1024
# A certificate is close to its end within this time, or within a third of its life.
SOON = timedelta(days=21)
_RENEW = "run `kvferry certs issue NAME` where the authority is, and copy its folder here"


@dataclass(frozen=True, slots=True)
class Expiry:
    """From when to when a certificate holds, UTC."""

    subject: str
    hosts: tuple[str, ...]
    begins: datetime
    ends: datetime

    @property
    def days_left(self) -> float:
        """Negative: so many days over."""
        return (self.ends - datetime.now(UTC)) / timedelta(days=1)

    @property
    def soon(self) -> bool:
        """Whether it should be renewed now."""
        return self.ends - datetime.now(UTC) < min(SOON, (self.ends - self.begins) / 3)


@dataclass(frozen=True, slots=True)
class Pem:
    """The three files' contents."""

    ca: bytes
    cert: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the three files are."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def of_folder(cls, folder: Path) -> "TlsFiles":
        """As `kvferry certs issue` lays them out."""
        return cls(folder / CA_FILE, folder / CERT_FILE, folder / KEY_FILE)

    def read(self) -> Pem:
        """The files as they are now. Raises: ConfigError: missing, or not for us to read."""
        return Pem(_bytes(self.ca), _bytes(self.cert), _bytes(self.key))

    def check(self) -> Expiry:
        """Whether they fit together and hold today.

        Raises: ConfigError: a file that is missing or no PEM, a key that others can read or
            of another certificate, a certificate of another authority, not valid yet, or over.
        """
        pem = self.read()
        if self.key.stat().st_mode & 0o007:
            raise ConfigError(
                "tls_dir", str(self.key), f"readable by its owner only (chmod 600 {self.key})"
            )
        _check_pair(self, pem)
        for path, data in ((self.ca, pem.ca), (self.cert, pem.cert)):
            expiry = expiry_of(data, path)
            if expiry.ends <= datetime.now(UTC):
                allowed = f"a certificate that holds; it ended on {expiry.ends:%Y-%m-%d}: {_RENEW}"
                raise ConfigError("tls_dir", str(path), allowed)
            if expiry.begins > datetime.now(UTC):
                allowed = (
                    f"a certificate that holds; it begins on {expiry.begins:%Y-%m-%d %H:%M} UTC: "
                    "set the clocks"
                )
                raise ConfigError("tls_dir", str(path), allowed)
        return expiry_of(pem.cert, self.cert)


def expiry_of(pem: bytes, path: Path) -> Expiry:
    """What the first certificate of ``pem`` says. Raises: ConfigError: it is none."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(pem)
    except ValueError as exc:
        raise ConfigError("tls_dir", str(path), f"a PEM certificate ({exc})") from exc
    hosts: list[str] = []
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = [str(name.value) for name in names]
    except x509.ExtensionNotFound:
        pass
    subject = found.subject.rfc4514_string()
    return Expiry(subject, tuple(hosts), found.not_valid_before_utc, found.not_valid_after_utc)


def _check_pair(files: TlsFiles, pem: Pem) -> None:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    expiry_of(pem.ca, files.ca)
    expiry_of(pem.cert, files.cert)
    own = x509.load_pem_x509_certificate(pem.cert)
    try:
        own.verify_directly_issued_by(x509.load_pem_x509_certificate(pem.ca))
    except (ValueError, TypeError, InvalidSignature) as exc:
        allowed = f"a certificate of the authority in {files.ca}: {_RENEW}"
        raise ConfigError("tls_dir", str(files.cert), allowed) from exc
    try:
        key = serialization.load_pem_private_key(pem.key, None)
    except (ValueError, TypeError) as exc:
        raise ConfigError("tls_dir", str(files.key), "a PEM key without a password") from exc
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    der = serialization.Encoding.DER
    if key.public_key().public_bytes(der, form) != own.public_key().public_bytes(der, form):
        allowed = f"the key of {files.cert}: {_RENEW}"
        raise ConfigError("tls_dir", str(files.key), allowed)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as exc:
        allowed = f"a file that can be read ({exc.strerror}): {_RENEW}"
        raise ConfigError("tls_dir", str(path), allowed) from exc
    if len(data) > MAX_PEM_BYTES:
        raise ConfigError("tls_dir", str(path), f"a PEM file of at most {MAX_PEM_BYTES:,} bytes")
    return data
