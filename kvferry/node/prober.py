"""Measures links that no blob has crossed lately: seldom, small, and never in the way."""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable

from kvferry.cluster.link_probe import PROBE_BYTES, probe
from kvferry.errors import FerryError, StoreTimeoutError, StoreUnavailableError
from kvferry.node.link_table import LinkTable
from kvferry.node.remotes import Remote

log = logging.getLogger(__name__)

HOUR_S = 3600.0
FIRST_S = 2.0
ROUND_S = 15.0
# A measurement is good for so long; links that are used measure themselves.
RECENT_S = 900.0
# Who does not have the service, or is busy, is left alone for so long.
REFUSED_S = 900.0
TIMEOUT_S = 10.0


class Ration:
    """So many bytes in any hour."""

    def __init__(self, bytes_per_hour: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = bytes_per_hour, clock
        self._taken: deque[tuple[float, int]] = deque()

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes may be spent now; then they are."""
        now = self._clock()
        while self._taken and self._taken[0][0] <= now - HOUR_S:
            self._taken.popleft()
        if sum(spent for _, spent in self._taken) + size > self._limit:
            return False
        self._taken.append((now, size))
        return True

    def give_back(self) -> None:
        """What was taken last was not spent."""
        if self._taken:
            self._taken.pop()


class Prober:
    """One probe at a time, of the link that has been known worst for longest."""

    def __init__(
        self,
        links: LinkTable,
        ration: Ration,
        counters: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._links, self._ration, self._counters = links, ration, counters
        self._clock = clock
        self._refused: dict[str, float] = {}

    async def run(self) -> None:
        """Look after the links for ever."""
        await asyncio.sleep(FIRST_S)
        while True:
            await self._links.look()
            await self.round()
            await asyncio.sleep(ROUND_S)

    async def round(self) -> str:
        """Probe one link, if one needs it and nothing is in its way; its name, or empty."""
        remotes = self._links.remotes()
        if any(remote.under_way for _, remote in remotes):
            return ""
        wanting = [found for found in remotes if self._wants(*found)]
        wanting.sort(key=lambda found: found[1].measured_s)
        for name, remote in wanting:
            if self._ration.take(PROBE_BYTES):
                await self._probe(name, remote)
                return name
        return ""

    def _wants(self, name: str, remote: Remote) -> bool:
        now = self._clock()
        if not remote.address or remote.breaker.wait_s() or self._refused.get(name, 0.0) > now:
            return False
        return not remote.measured_s or now - remote.measured_s > RECENT_S

    async def _probe(self, name: str, remote: Remote) -> None:
        try:
            async with remote.asking(short=False):
                found = await probe(remote.client.channel, remote.name, TIMEOUT_S)
        except FerryError as exc:
            log.debug("probe of %s: %s", name, exc)
            if isinstance(exc, StoreUnavailableError) and not isinstance(exc, StoreTimeoutError):
                self._ration.give_back()
                return
            self._counters["probes_failed"] += 1
            self._refused = {n: t for n, t in self._refused.items() if t > self._clock()}
            self._refused[name] = self._clock() + REFUSED_S
            return
        remote.measured(PROBE_BYTES, PROBE_BYTES / found.bytes_per_s, probed=True)
        remote.latency_s = found.latency_s
        self._counters["probes"] += 1
