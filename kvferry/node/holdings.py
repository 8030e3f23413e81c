"""What this node holds, in the few kilobytes that its peers are told.

Only ever a hint: what is let go of stays in the filter until it is made anew, and what came
a moment ago reaches the others a moment later.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from kvferry.errors import FerryError
from kvferry.node.bloom import Bloom, item_of, page_item
from kvferry.node.tiers import Tiers
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import peer_pb2

log = logging.getLogger(__name__)

REBUILD_S = 300.0
LOOK_S = 1.0
_ITEMS_A_BLOB = 2


class Holdings:
    """A filter over keys of blobs and of pages. Belongs to the event loop."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._filter = Bloom.for_count(0)
        self._items = 0
        self._meanwhile: list[BlobKey] | None = None
        # Larger than that of any earlier start, so that nobody takes this for what it has.
        self._version = time.time_ns()
        self._changed = True

    @property
    def version(self) -> int:
        """Grows whenever something was added."""
        return self._version

    def add(self, key: BlobKey) -> None:
        """A blob is here now."""
        _add(self._filter, [key])
        self._items += _ITEMS_A_BLOB
        self._version += 1
        self._changed = True
        if self._meanwhile is not None:
            self._meanwhile.append(key)

    def reply(self, known: int) -> peer_pb2.HoldingsReply:
        """To who has version ``known`` (0: none)."""
        if known == self._version:
            return peer_pb2.HoldingsReply(version=known)
        bits = bytes(self._filter.bits)
        return peer_pb2.HoldingsReply(version=self._version, bits=bits, hashes=self._filter.hashes)

    async def rebuild(self) -> None:
        """Make the filter anew from what is here. Raises: FerryError."""
        self._changed, self._meanwhile = False, []
        try:
            made = Bloom.for_count(_ITEMS_A_BLOB * await self._tiers.count())
            items = 0
            async for keys in self._tiers.keys():
                await asyncio.to_thread(_add, made, keys)
                items += _ITEMS_A_BLOB * len(keys)
            _add(made, self._meanwhile)
            self._filter, self._items = made, items + _ITEMS_A_BLOB * len(self._meanwhile)
            self._version += 1
        finally:
            self._meanwhile = None

    async def run(self) -> None:
        """Keep the filter near to the truth, for ever; an idle node does nothing for it."""
        due = 0.0
        while True:
            full = self._filter.may_grow and self._items > self._filter.capacity
            if self._changed and (time.monotonic() >= due or full):
                try:
                    await self.rebuild()
                except FerryError as exc:
                    log.warning("what this node holds cannot be listed: %s", exc)
                due = time.monotonic() + REBUILD_S
            await asyncio.sleep(LOOK_S)


def _add(filter_: Bloom, keys: Sequence[BlobKey]) -> None:
    for key in keys:
        filter_.add(item_of(key))
        filter_.add(page_item(key.page_key))
