"""Start and stop a grpc.aio server: addresses, health checking, reflection, who may call."""

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.guard import Guard
from kvferry.cluster.wire import MAX_REQUEST_BYTES, channel_options
from kvferry.errors import ConfigError
from kvferry.settings import is_loopback


@dataclass(frozen=True, slots=True)
class Service:
    """A gRPC service to be served: its full name, and what adds its handlers."""

    name: str
    add: Callable[[grpc.aio.Server], None]


@dataclass(slots=True)
class GrpcServer:
    """A running server.

    Attributes:
        addresses: as bound, in the order asked: HOST:PORT with the real port, or unix:PATH.
    """

    addresses: list[str]
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer
    _services: Sequence[Service]
    _sockets: list[Path] = field(default_factory=list)
    _following: "asyncio.Task[None] | None" = None

    async def set_serving(self, serving: bool, service: str = "") -> None:
        """What health checking says; ``service`` "" is the whole server."""
        await self._health.set(service, _status(serving))

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new calls, let running ones end for ``grace_s`` seconds, then cut them."""
        for name in ("", *(s.name for s in self._services)):
            await self.set_serving(False, name)
        await self._server.stop(grace_s)
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        for path in self._sockets:
            path.unlink(missing_ok=True)


def _status(serving: bool) -> int:
    response = health_pb2.HealthCheckResponse
    return response.SERVING if serving else response.NOT_SERVING


async def start_server(
    services: Sequence[Service],
    addresses: Sequence[str],
    *,
    credentials: Credentials = PLAINTEXT,
    allow_remote_plaintext: bool = False,
    on_refused: Callable[[str], None] = lambda reason: None,
) -> GrpcServer:
    """Serve ``services``, with health checking and reflection, on all ``addresses``.

    Args:
        addresses: HOST:PORT (port 0 takes a free one) or unix:PATH. A Unix socket is made
            for its owner only, in a folder that is made for its owner only.
        credentials: TLS and tokens for the TCP addresses; a server of Unix sockets only
            asks for neither.
        allow_remote_plaintext: without it, and without TLS and tokens, only loopback
            addresses are taken.
        on_refused: gets the reason of every call that is refused for its token.
    Raises:
        ConfigError: an address beyond loopback, in use, or that cannot be bound.
    """
    options = [*channel_options(MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)]
    guard = None
    if credentials.book is not None and any(not a.startswith("unix:") for a in addresses):
        guard = Guard(credentials.book, on_refused)
    server = grpc.aio.server(options=options, interceptors=[guard] if guard else [])
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for service in services:
        service.add(server)
    names = [service.name for service in services]
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    bound: list[str] = []
    sockets: list[Path] = []
    for address in addresses:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            _bind_unix(server, path)
            sockets.append(path)
            bound.append(address)
        else:
            bound.append(_bind_tcp(server, address, credentials, allow_remote_plaintext))
    await server.start()
    running = GrpcServer(bound, server, checker, services, sockets)
    if guard is not None:
        guard.where = ", ".join(bound)
        running._following = asyncio.create_task(guard.follow())
    for name in ("", *names):
        await running.set_serving(True, name)
    return running


def _bind_tcp(
    server: grpc.aio.Server, address: str, credentials: Credentials, allow_remote: bool
) -> str:
    missing = credentials.missing()
    if missing and not allow_remote and not is_loopback(address):
        allowed = f"a loopback address, as there is {' and '.join(missing)}"
        raise ConfigError("listen", address, allowed)
    secure = credentials.server()
    try:
        if secure is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, secure)
    except RuntimeError as exc:
        raise ConfigError("listen", address, "an address that is free on this machine") from exc
    if not port:
        raise ConfigError("listen", address, "an address that is free on this machine")
    return f"{address.rpartition(':')[0]}:{port}"


def _bind_unix(server: grpc.aio.Server, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _answers(path):
        raise ConfigError("socket", str(path), "a socket that no other process serves")
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        path.chmod(0o600)
    except (RuntimeError, OSError) as exc:
        raise ConfigError(
            "socket", str(path), "a path for a Unix socket: short, in a folder one may write to"
        ) from exc
    finally:
        os.umask(before)


def _answers(path: Path) -> bool:
    if not path.exists():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
