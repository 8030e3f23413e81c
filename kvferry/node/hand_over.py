"""What only this node has goes to others before it sleeps or is drained.

To the store, if it answers; what is left then, or all where there is none, to the peers
that are reached best. The journal keeps what it has in any case: nothing that was accepted
is lost, whatever becomes of the other side.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cluster.repository import ListQuery
from kvferry.errors import FerryError
from kvferry.node.directory import Directory
from kvferry.node.journal import Pending
from kvferry.node.remotes import Peers, Remote
from kvferry.node.take_over import MAX_BLOBS, told_of
from kvferry.node.tiers import Tiers
from kvferry.node.upload_queue import UploadQueue
from kvferry.proto.v1 import peer_pb2

log = logging.getLogger(__name__)

# Of the time that there is; the rest is for peers.
STORE_SHARE = 0.7
BATCH_BYTES = 32 << 20
BATCH_S = 30.0
FLUSH_S = 0.1
# Of what ends by itself; its own end is not in any listing.
SHORT_LIVED_S = 86_400.0


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What came of it.

    Attributes:
        blobs: that others have now and had not before.
        bytes: of those.
        left: blobs that are still nowhere else.
    """

    blobs: int
    bytes: int
    left: int


class HandOver:
    """The giving side. Belongs to the event loop.

    Args:
        most_bytes: where there is no store, of blobs that are only here; those that were
            used last go first.
    """

    def __init__(
        self,
        node_id: str,
        incarnation: int,
        tiers: Tiers,
        uploads: UploadQueue,
        peers: Peers,
        directory: Directory,
        store: Remote | None,
        counters: Counter[str],
        most_bytes: int,
    ) -> None:
        self._node_id, self._incarnation = node_id, incarnation
        self._tiers, self._uploads = tiers, uploads
        self._peers, self._directory, self._store = peers, directory, store
        self._counters, self._most = counters, most_bytes

    async def run(self, deadline_s: float) -> HandedOver:
        """Within the time; may be called as often as one likes."""
        end = time.monotonic() + deadline_s
        waiting = self._uploads.left()
        share = STORE_SHARE if self._peers.healthy else 1.0
        await self._upload(time.monotonic() + share * deadline_s)
        left, beyond = self._uploads.left(), 0
        if self._store is None:
            left, beyond = await self._only_here()
        still = {item.key for item in left}
        given = await self._give(left, end)
        gone = [item for item in waiting if item.key not in still] + given
        size = sum(item.size for item in gone)
        done = HandedOver(len(gone), size, beyond + len(left) - len(given))
        log.info("handed over %d blobs, %d bytes; %d are left", done.blobs, done.bytes, done.left)
        return done

    async def _upload(self, end: float) -> None:
        """Wait for uploads, as long as the store takes them."""
        store = self._store
        while store is not None and store.breaker.healthy and self._uploads.count:
            if await self._uploads.flush(FLUSH_S) or time.monotonic() > end:
                return

    async def _only_here(self) -> tuple[list[Pending], int]:
        """Without a store: what no peer says it holds, last used first; and how many more."""
        infos = {info.key: info for info in await self._tiers.list(ListQuery())}
        alone = [info for key, info in infos.items() if not self._directory.copies(key)]
        alone.sort(key=lambda info: info.used_unix_s, reverse=True)
        found: list[Pending] = []
        left = self._most
        for info in alone:
            left -= info.size
            if left < 0:
                break
            ends = info.key.kind in ("tail", "state")
            expires = time.time() + SHORT_LIVED_S if ends else 0.0
            found.append(Pending(key=info.key, size=info.size, expires_unix_s=expires))
        return found, len(alone) - len(found)

    async def _give(self, items: Sequence[Pending], end: float) -> list[Pending]:
        """To the peers that are reached best, one after the other; those that were taken."""
        given: list[Pending] = []
        left = list(items)
        for peer in sorted(self._peers.healthy, key=lambda p: (-p.bytes_per_s, p.latency_s)):
            refused: list[Pending] = []
            while left and time.monotonic() < end:
                batch = _batch(left)
                left = left[len(batch) :]
                taken = await self._ask(peer, batch, end - time.monotonic())
                given += [item for item, there in zip(batch, taken, strict=True) if there]
                refused += [item for item, there in zip(batch, taken, strict=True) if not there]
                if not any(taken):
                    break
            left = [*refused, *left]
        return given

    async def _ask(self, peer: Remote, batch: Sequence[Pending], left_s: float) -> Sequence[bool]:
        now = time.time()
        request = peer_pb2.TakeOverRequest(
            node_id=self._node_id,
            incarnation=self._incarnation,
            blobs=told_of([(i.key, i.size, _ttl_s(i, now), i.replaces) for i in batch]),
        )
        try:
            async with peer.asking(short=False):
                reply = await peer.peer.take_over(request, min(BATCH_S, max(0.1, left_s)))
            taken = list(reply.taken)
        except FerryError as exc:
            self._counters[f"handover_{exc.reason}"] += 1
            log.info("%s takes nothing over: %s", peer.name, exc)
            return [False] * len(batch)
        taken = (taken + [False] * len(batch))[: len(batch)]
        for item, there in zip(batch, taken, strict=True):
            if there:
                self._directory.has(peer.name, item.key)
                self._counters["handed_over_blobs"] += 1
                self._counters["handed_over_bytes"] += item.size
        return taken


def _batch(items: Sequence[Pending]) -> list[Pending]:
    """The first of them, of which one call is made; at least one."""
    size, batch = 0, list[Pending]()
    for item in items[:MAX_BLOBS]:
        size += item.size
        if batch and size > BATCH_BYTES:
            break
        batch.append(item)
    return batch


def _ttl_s(item: Pending, now: float) -> int:
    return max(1, int(item.expires_unix_s - now)) if item.expires_unix_s else 0
