"""Copies of what is read often, on other nodes: made when nobody asks for anything."""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from kvferry.errors import FerryError
from kvferry.node.byte_budget import ByteBudget
from kvferry.node.directory import Directory
from kvferry.node.remotes import Peers, Remote
from kvferry.node.take_over import HOUR_S, told_of
from kvferry.node.tiers import Tiers
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import peer_pb2

log = logging.getLogger(__name__)

REMEMBERED = 4096
# Read so often lately, a blob is hot.
HOT_READS = 3
HALVED_S = 600.0
QUIET_S = 2.0
LOOK_S = 0.5
# What was asked for in vain is not asked for again for so long.
AGAIN_S = 60.0
COPY_S = 30.0


class HotReads:
    """How often each blob was read lately; half as often counts what is older.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reads: OrderedDict[BlobKey, int] = OrderedDict()
        self._halve_at = clock() + HALVED_S

    def note(self, key: BlobKey) -> None:
        """It was read. What ends by itself, as tails do, is not worth a copy."""
        if key.kind not in ("page", "calibration"):
            return
        self._fade()
        self._reads[key] = self._reads.get(key, 0) + 1
        self._reads.move_to_end(key)
        while len(self._reads) > REMEMBERED:
            self._reads.popitem(last=False)

    def hot(self) -> Iterator[BlobKey]:
        """Those read often, most often first."""
        self._fade()
        hot = [(count, key) for key, count in self._reads.items() if count >= HOT_READS]
        yield from (key for _, key in sorted(hot, key=lambda entry: -entry[0]))

    def _fade(self) -> None:
        while self._clock() >= self._halve_at:
            self._halve_at += HALVED_S
            halved = {key: count // 2 for key, count in self._reads.items() if count > 1}
            self._reads = OrderedDict(halved)
            if not halved:
                self._halve_at = self._clock() + HALVED_S


class Copier:
    """Has peers fetch copies. Belongs to the event loop.

    Args:
        copies: nodes that shall hold what is hot, this one included; 1: none are made.
        bytes_per_hour: that may be sent for it.
        quiet_s: since when no hook has asked for anything.
    """

    def __init__(
        self,
        node_id: str,
        incarnation: int,
        tiers: Tiers,
        peers: Peers,
        directory: Directory,
        counters: Counter[str],
        copies: int,
        bytes_per_hour: int,
        quiet_s: Callable[[], float],
    ) -> None:
        self._node_id, self._incarnation = node_id, incarnation
        self._tiers, self._peers, self._directory = tiers, peers, directory
        self._counters, self._copies, self._quiet_s = counters, copies, quiet_s
        self._budget = ByteBudget(bytes_per_hour, bytes_per_hour / HOUR_S)
        self._not_before: OrderedDict[BlobKey, float] = OrderedDict()
        self.reads = HotReads()

    async def run(self) -> None:
        """Make copies while nothing else is going on, for ever."""
        while self._copies > 1:
            await asyncio.sleep(LOOK_S)
            if self._quiet_s() >= QUIET_S:
                await self.copy_one()

    async def copy_one(self) -> bool:
        """Have one copy made of what is read most and held too rarely; whether it was."""
        now = time.monotonic()
        for key in self.reads.hot():
            if self._not_before.get(key, 0.0) > now:
                continue
            if self._directory.copies(key) + 1 >= self._copies:
                continue
            peer = self._target(key)
            size = await self._size(key)
            if peer is not None and size and self._budget.take(size):
                if await self._ask(peer, key, size):
                    return True
                self._budget.earn(size)
            self._not_before[key] = now + AGAIN_S
            while len(self._not_before) > REMEMBERED:
                self._not_before.popitem(last=False)
            return False
        return False

    def _target(self, key: BlobKey) -> Remote | None:
        """The peer that is reached best of those that have it not."""
        holders = {peer.name for peer in self._directory.holders(key)}
        free = [peer for peer in self._peers.healthy if peer.name not in holders]
        return max(free, key=lambda peer: peer.bytes_per_s, default=None)

    async def _size(self, key: BlobKey) -> int:
        """Bytes of a blob that is here; 0: it is not."""
        infos = await self._tiers.of_page(key.page_key)
        return next((info.size for info in infos if info.key == key), 0)

    async def _ask(self, peer: Remote, key: BlobKey, size: int) -> bool:
        request = peer_pb2.TakeOverRequest(
            node_id=self._node_id,
            incarnation=self._incarnation,
            blobs=told_of([(key, size, 0, None)]),
            copy=True,
        )
        try:
            async with peer.asking(short=False):
                reply = await peer.peer.take_over(request, COPY_S)
        except FerryError as exc:
            log.debug("%s copies nothing: %s", peer.name, exc)
            return False
        if not any(reply.taken):
            return False
        self._directory.has(peer.name, key)
        self._counters["copies_made"] += 1
        self._counters["copies_bytes"] += size
        return True
