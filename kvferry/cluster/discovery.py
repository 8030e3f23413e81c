"""Finding each other on the local network by multicast DNS (RFC 6762, 6763), over zeroconf.

Store and coordinator announce themselves as ``_kvferry._tcp`` with their role and the name
of their cluster; nodes browse. All of it stays on the interfaces that a service listens on:
one that is bound to loopback is found on its own machine only. Whoever is on the network
can announce anything: what is found is trusted no more than an address typed in.
"""

import asyncio
import importlib.util
import ipaddress
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psutil
from blake3 import blake3

from kvferry import __version__
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncZeroconf

log = logging.getLogger(__name__)

TYPE = "_kvferry._tcp.local."
RESOLVE_MS = 3000
QUEUE_LENGTH = 256
MAX_ADDRESSES = 16

Role = Literal["store", "coordinator"]
ROLES: tuple[Role, ...] = ("store", "coordinator")


@dataclass(frozen=True, slots=True)
class Seen:
    """A service that was announced, or (no addresses) is not any more.

    Attributes:
        instance: its name on the network, the same for as long as it runs where it runs.
        addresses: HOST:PORT, all of one service.
    """

    instance: str
    role: str
    addresses: Sequence[str]


def check_discovery(cluster: str) -> None:
    """Whether discovery can be had, if it is wanted. Raises: ConfigError: zeroconf is missing."""
    if cluster and importlib.util.find_spec("zeroconf") is None:
        allowed = "left out, or zeroconf installed: pip install 'kvferry[discovery]'"
        raise ConfigError("discovery", cluster, allowed)


@asynccontextmanager
async def announced(cluster: str, role: Role, listen: str) -> AsyncIterator[None]:
    """Announce a service that is bound to ``listen`` (HOST:PORT) for as long as this runs.

    ``cluster`` empty: nothing is announced. Raises: ConfigError: zeroconf is missing, or
        the interface of ``listen`` carries no multicast.
    """
    if not cluster:
        yield
        return
    check_discovery(cluster)
    host, port = _split(listen)
    addresses = await asyncio.to_thread(_own_addresses, host)
    identity = blake3("\n".join([role, cluster, str(port), *addresses]).encode()).hexdigest()[:12]
    async with _zeroconf(addresses) as network:
        from zeroconf.asyncio import AsyncServiceInfo

        info = AsyncServiceInfo(
            TYPE,
            f"{role}-{identity}.{TYPE}",
            port=port,
            parsed_addresses=addresses,
            server=f"kvferry-{identity}.local.",
            properties={"role": role, "cluster": cluster, "version": __version__},
        )
        await (await network.async_register_service(info, allow_name_change=True))
        log.info("announced as the %s of cluster %r on %s", role, cluster, ", ".join(addresses))
        yield


async def browse(cluster: str, listen: str) -> AsyncGenerator[Seen, None]:
    """What is announced for ``cluster`` on the interfaces of ``listen``, for ever.

    Raises: ConfigError as `announced`.
    """
    host, _ = _split(listen)
    addresses = await asyncio.to_thread(_own_addresses, host)
    names: asyncio.Queue[tuple[str, bool]] = asyncio.Queue(QUEUE_LENGTH)
    async with _zeroconf(addresses) as network:
        from zeroconf import ServiceStateChange
        from zeroconf.asyncio import AsyncServiceBrowser

        def heard(*, name: str, state_change: ServiceStateChange, **_: Any) -> None:
            if not names.full():  # a flood is somebody's mischief
                names.put_nowait((name, state_change is not ServiceStateChange.Removed))

        async with AsyncServiceBrowser(network.zeroconf, TYPE, handlers=[heard]):
            while True:
                name, there = await names.get()
                seen = await _resolve(network, name, cluster) if there else Seen(name, "", ())
                if seen is not None:
                    yield seen


async def _resolve(network: "AsyncZeroconf", name: str, cluster: str) -> Seen | None:
    """What is behind an instance; None: another cluster's, or it does not say."""
    info = await network.async_get_service_info(TYPE, name, RESOLVE_MS)
    if info is None or not info.port:
        return None
    about: Mapping[str, str | None] = info.decoded_properties
    role = about.get("role")
    if about.get("cluster") != cluster or role not in ROLES:
        return None
    hosts = info.parsed_scoped_addresses()[:MAX_ADDRESSES]
    return Seen(name, role, [_join(host, info.port) for host in hosts])


@asynccontextmanager
async def _zeroconf(interfaces: Sequence[str]) -> AsyncIterator["AsyncZeroconf"]:
    from zeroconf.asyncio import AsyncZeroconf

    try:
        network = AsyncZeroconf(interfaces=list(interfaces))
    except (OSError, RuntimeError) as exc:
        allowed = f"left out where {', '.join(interfaces)} has no multicast ({exc})"
        raise ConfigError("discovery", "on", allowed) from exc
    try:
        yield network
    finally:
        await network.async_close()


def _split(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own_addresses(host: str) -> list[str]:
    """The addresses behind a ``listen``: its own, or all of this machine's for 0.0.0.0. Blocks.

    Raises: ConfigError for a name that has none.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise ConfigError("listen", host, f"an address of this machine ({exc})") from exc
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not any(address.is_unspecified for address in addresses):
        return list(dict.fromkeys(str(address) for address in addresses))
    try:
        every = [a for own in psutil.net_if_addrs().values() for a in own]
    except OSError as exc:  # a service without AF_NETLINK may not ask
        raise ConfigError("listen", host, f"one address, to be announced ({exc})") from exc
    own = (a.address for a in every if a.family == socket.AF_INET)
    others = [a for a in own if not ipaddress.ip_address(a).is_loopback]
    return others[:MAX_ADDRESSES] or ["127.0.0.1"]
