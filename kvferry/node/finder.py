"""Points this node at the store and the coordinator that announce themselves."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvferry.cluster.discovery import Seen, browse
from kvferry.node.interfaces import link_kind
from kvferry.node.link_kind import ETHERNET, LOOPBACK, THUNDERBOLT, WIFI

log = logging.getLogger(__name__)

LOOK_S = 3.0
MAX_KNOWN = 64
_BEST_FIRST = (LOOPBACK, THUNDERBOLT, ETHERNET, WIFI)


@dataclass(frozen=True, slots=True)
class Sought:
    """Something that has no address in the configuration.

    Attributes:
        point_at: makes this node use an address.
        answers: whether the one in use does.
    """

    point_at: Callable[[str], Awaitable[None]]
    answers: Callable[[], bool]


class Finder:
    """Belongs to the event loop.

    Args:
        listen: HOST:PORT of this node; it looks on that interface.
        sought: by role.
        kind_of: the kind of the way to HOST:PORT; blocks.
    """

    def __init__(
        self,
        cluster: str,
        listen: str,
        sought: Mapping[str, Sought],
        kind_of: Callable[[str], str] = link_kind,
    ) -> None:
        self._cluster, self._listen, self._sought = cluster, listen, sought
        self._kind_of = kind_of
        self._known: dict[str, dict[str, str]] = {role: {} for role in sought}
        self._used: dict[str, str] = {}

    async def run(self) -> None:
        """Look for ever. Raises: ConfigError: this machine cannot."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._change_over())
            async with aclosing(browse(self._cluster, self._listen)) as found:
                async for seen in found:
                    await self.take(seen)

    async def take(self, seen: Seen) -> None:
        """A service was announced, or is not any more.

        The first of a role is used; it may move; another takes over where it is silent.
        """
        if not seen.addresses:
            await self._forget(seen.instance)
            return
        known = self._known.get(seen.role, {})
        full = seen.instance not in known and len(known) >= MAX_KNOWN
        if seen.role not in self._sought or full:
            return
        known[seen.instance] = await asyncio.to_thread(self._nearest, seen.addresses)
        if self._used.setdefault(seen.role, seen.instance) == seen.instance:
            await self._use(seen.role, seen.instance)

    async def _forget(self, instance: str) -> None:
        for role, known in self._known.items():
            known.pop(instance, None)
            if self._used.get(role) == instance:
                del self._used[role]
                if known:
                    await self._use(role, next(iter(known)))

    async def _use(self, role: str, instance: str) -> None:
        address = self._known[role][instance]
        self._used[role] = instance
        log.info("found the %s at %s", role, address)
        await self._sought[role].point_at(address)

    async def _change_over(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for role, sought in self._sought.items():
                names = list(self._known[role])
                if len(names) > 1 and not sought.answers():
                    used = names.index(self._used[role])
                    await self._use(role, names[(used + 1) % len(names)])

    def _nearest(self, addresses: Sequence[str]) -> str:
        def place(address: str) -> int:
            kind = self._kind_of(address)
            return _BEST_FIRST.index(kind) if kind in _BEST_FIRST else len(_BEST_FIRST)

        return min(addresses, key=place)
