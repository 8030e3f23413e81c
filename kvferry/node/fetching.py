"""Blobs from elsewhere: callers for one key share one transfer, and all share the lanes."""

import asyncio
from collections import Counter

from kvferry.errors import FerryError
from kvferry.node.byte_gate import ByteGate
from kvferry.node.lanes import Lanes
from kvferry.node.race import UNKNOWN_SIZE, Race
from kvferry.node.tiers import Data, Tiers
from kvferry.proto.keys import BlobKey


class Fetching:
    """Belongs to the event loop.

    Args:
        inflight_bytes: under way from elsewhere, at most.
    """

    def __init__(
        self, tiers: Tiers, lanes: Lanes, counters: Counter[str], inflight_bytes: int
    ) -> None:
        self._tiers, self._lanes, self._counters = tiers, lanes, counters
        self._gate = ByteGate(inflight_bytes)
        self._under_way: dict[BlobKey, asyncio.Task[tuple[Data, str]]] = {}
        self._keeping: set[asyncio.Task[None]] = set()

    async def fetch(self, key: BlobKey, missing: FerryError) -> tuple[Data, str]:
        """(verified bytes, where from). Raises: ``missing``, or what else went wrong."""
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._fetch(key, missing))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._over(key, done))
        return await asyncio.shield(task)

    def _over(self, key: BlobKey, done: "asyncio.Task[tuple[Data, str]]") -> None:
        self._under_way.pop(key, None)
        if not done.cancelled():
            done.exception()  # its callers may all have gone

    async def _fetch(self, key: BlobKey, missing: FerryError) -> tuple[Data, str]:
        lanes = self._lanes
        async with self._gate.hold(lanes.directory.size_of(key) or UNKNOWN_SIZE):
            try:
                data, remote = await Race(lanes, key).run(missing)
            except FerryError:
                self._counters["misses"] += 1
                raise
            await self._tiers.remember(key, data)
        # The caller need not wait for the disk.
        writing = asyncio.create_task(self._tiers.store_on_disk(key, data))
        self._keeping.add(writing)
        writing.add_done_callback(self._keeping.discard)
        return data, "store" if remote is lanes.store else f"peer:{remote.name}"

    async def settle(self) -> None:
        """Wait for copies that are being written to disk."""
        await asyncio.gather(*self._keeping, return_exceptions=True)
