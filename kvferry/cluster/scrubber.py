"""A scrub without end, so slow that nobody notices: damage is found before it is asked for."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from kvferry.cluster.mend import Replica, scrub_and_mend
from kvferry.cluster.repository import BlobRepository
from kvferry.errors import FerryError

log = logging.getLogger(__name__)

# Between two passes at least, also where there is little to check.
REST_S = 60.0
RETRY_S = 30.0


class Scrubber:
    """Reads everything again, sets damaged blobs aside and mends what a replica has whole.

    A pass begins with what was used least recently.
    """

    def __init__(
        self,
        repository: BlobRepository,
        bytes_per_s: float,
        replicas: Sequence[Replica],
        registry: CollectorRegistry,
        rest_s: float = REST_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``bytes_per_s`` above 0."""
        self._repository, self._rate, self._replicas = repository, bytes_per_s, replicas
        self._rest_s, self._clock = rest_s, clock
        prefix = "kvferry_store_scrub"
        self._bytes = Counter(f"{prefix}_bytes", "Bytes read again and compared", registry=registry)
        self._found = Counter(
            f"{prefix}_damaged_blobs", "Damaged blobs found", ["reason"], registry=registry
        )
        self._mended = Counter(
            f"{prefix}_mended_blobs", "Damaged blobs replaced by whole ones", registry=registry
        )
        self._passes = Counter(f"{prefix}_passes", "Times that all was checked", registry=registry)
        self._last = Gauge(
            f"{prefix}_last_pass_unix_s", "When the last pass ended", registry=registry
        )

    async def run(self) -> None:
        """Until cancelled. A store that fails is tried again."""
        while True:
            try:
                await self._pass()
            except FerryError as exc:
                log.warning("the scrub goes on later: %s", exc)
                await asyncio.sleep(RETRY_S)
                continue
            self._passes.inc()
            self._last.set(self._clock())
            await asyncio.sleep(self._rest_s)

    async def _pass(self) -> None:
        async for report in scrub_and_mend(self._repository, True, self._replicas):
            self._bytes.inc(report.bytes)
            for _, reason in report.findings:
                self._found.labels(reason).inc()
            self._mended.inc(len(report.mended))
            await asyncio.sleep(report.bytes / self._rate)
