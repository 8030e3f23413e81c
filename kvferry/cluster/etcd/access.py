"""Where etcd is, and how to be let in."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from kvferry.cluster.wire import channel_options
from kvferry.errors import ConfigError
from kvferry.settings import EtcdSettings

MAX_ENDPOINTS = 16
MAX_MESSAGE_BYTES = 8 << 20

_ENDPOINT = re.compile(r"(?:(https?)://)?([^\s/:,@]+|\[[0-9a-fA-F:.%]+\]):([0-9]{1,5})/?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One member of etcd: HOST:PORT, and whether it speaks TLS."""

    address: str
    tls: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdAccess:
    """All that is needed to connect.

    Attributes:
        ca: PEM that members' certificates are checked against; None: the system's.
        cert, key: PEM of our own, where etcd asks for one.
        user, password: where etcd's authentication is enabled.
    """

    endpoints: tuple[Endpoint, ...]
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    user: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def of(cls, settings: EtcdSettings) -> "EtcdAccess":
        """What the settings say; reads the files. Blocks. Raises: ConfigError."""
        path = settings.etcd_password_file
        password = (_content("etcd_password_file", path) or b"").decode(errors="replace").strip()
        return cls(
            endpoints=parse_endpoints(settings.etcd),
            ca=_content("etcd_ca_file", settings.etcd_ca_file),
            cert=_content("etcd_cert_file", settings.etcd_cert_file),
            key=_content("etcd_key_file", settings.etcd_key_file),
            user=settings.etcd_user,
            password=password,
        )


def parse_endpoints(text: str) -> tuple[Endpoint, ...]:
    """``http://h1:2379,https://h2:2379``; without a scheme it is http. Raises: ConfigError."""
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _ENDPOINT.fullmatch(part)
        if match is None or int(match[3]) > 65_535:
            raise ConfigError("etcd", part, "http://HOST:PORT or https://HOST:PORT, with commas")
        found.append(Endpoint(f"{match[2]}:{match[3]}", match[1] == "https"))
    if not 1 <= len(found) <= MAX_ENDPOINTS:
        raise ConfigError("etcd", text, f"1 to {MAX_ENDPOINTS} endpoints")
    return tuple(found)


def open_channels(access: EtcdAccess) -> Sequence[grpc.aio.Channel]:
    """A channel to each endpoint, for the running loop; they connect when first used."""
    options = [
        *channel_options(MAX_MESSAGE_BYTES),
        # Watches are silent for hours; etcd allows a ping every 5 s.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 3_000),
    ]
    credentials = None
    if any(endpoint.tls for endpoint in access.endpoints):
        credentials = grpc.ssl_channel_credentials(access.ca, access.key, access.cert)
    return [
        grpc.aio.secure_channel(endpoint.address, credentials, options=options)
        if endpoint.tls and credentials is not None
        else grpc.aio.insecure_channel(endpoint.address, options=options)
        for endpoint in access.endpoints
    ]


def _content(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(name, str(path), f"a file that can be read ({exc.strerror})") from exc
