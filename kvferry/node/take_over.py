"""Blobs that another node asks this one to fetch from it: what it hands over, or a copy.

They are fetched from the address that the coordinator gave for that node, so whoever asks
can make this node hold nothing but what a peer of it serves; and no more than a budget.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

from kvferry.cluster.convert import MAX_TTL_S
from kvferry.cluster.repository import PutSpec
from kvferry.errors import FencedError, FerryError, ProtocolError
from kvferry.node.byte_budget import ByteBudget
from kvferry.node.put_session import NodePut
from kvferry.node.remotes import Peers, Remote
from kvferry.node.tiers import Tiers
from kvferry.node.upload_queue import UploadQueue
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import peer_pb2

log = logging.getLogger(__name__)

MAX_BLOBS = 64
FETCH_S = 10.0
HOUR_S = 3600.0
_AT_A_TIME = 2


class TakeOvers:
    """The receiving side. Belongs to the event loop.

    Args:
        handover_bytes: taken from others in an hour, that they need not keep.
        copy_bytes: of copies in an hour.
    """

    def __init__(
        self,
        tiers: Tiers,
        uploads: UploadQueue,
        peers: Peers,
        counters: Counter[str],
        max_blob_bytes: int,
        handover_bytes: int,
        copy_bytes: int,
    ) -> None:
        self._tiers, self._uploads, self._peers = tiers, uploads, peers
        self._counters, self._max = counters, max_blob_bytes
        self._handover = ByteBudget(handover_bytes, handover_bytes / HOUR_S)
        self._copies = ByteBudget(copy_bytes, copy_bytes / HOUR_S)
        self._slots = asyncio.Semaphore(_AT_A_TIME)

    async def take(self, request: peer_pb2.TakeOverRequest) -> list[bool]:
        """Which are held here now; handed over ones durably, and on their way to the store.

        Raises: ProtocolError (nobody known here), FencedError (an earlier start of it).
        """
        if len(request.blobs) > MAX_BLOBS:
            raise ProtocolError(
                f"{len(request.blobs)} blobs at once, at most {MAX_BLOBS} are taken"
            )
        peer = self._peers.named(request.node_id)
        if peer is None:
            raise ProtocolError(f"node {request.node_id[:80]!r} is no peer of this one")
        if request.incarnation < peer.incarnation:
            raise FencedError(f"node {request.node_id!r} has been started again since")
        async with self._slots:
            return [await self._taken(peer, told, request.copy) for told in request.blobs]

    async def _taken(self, peer: Remote, told: peer_pb2.TakenBlob, copy: bool) -> bool:
        key = BlobKey.from_proto(told.key)
        if not 0 < told.size <= self._max or told.ttl_s > MAX_TTL_S:
            return False
        budget, name = (self._copies, "copies") if copy else (self._handover, "handovers")
        if not budget.take(told.size):
            self._counters[f"{name}_over_budget"] += 1
            return False
        try:
            await (self._copy if copy else self._hold)(peer, key, told)
        except FerryError as exc:
            budget.earn(told.size)
            self._counters[f"{name}_refused_{exc.reason}"] += 1
            log.info("%s of %s is not taken over: %s", key, peer.name, exc)
            return False
        self._counters[f"{name}_taken"] += 1
        return True

    async def _fetch(self, peer: Remote, key: BlobKey, size: int) -> memoryview:
        data = await peer.get(key, local_only=True, timeout_s=FETCH_S)
        if len(data) != size:
            raise ProtocolError(f"{key} has {len(data):,} bytes, {size:,} were announced")
        return data

    async def _hold(self, peer: Remote, key: BlobKey, told: peer_pb2.TakenBlob) -> None:
        """As if a hook had put it here. Raises: FerryError."""
        if key in self._uploads or (not self._uploads.active and await self._here(key)):
            return
        replaces = BlobKey.from_proto(told.replaces) if told.HasField("replaces") else None
        spec = PutSpec(key=key, size=told.size, ttl_s=told.ttl_s, replaces=replaces)
        put = await NodePut.open(self._tiers, self._uploads, spec, self._counters)
        try:
            await put.write(await self._fetch(peer, key, told.size))
            await put.finish()
        except BaseException:
            await put.abort()
            raise

    async def _copy(self, peer: Remote, key: BlobKey, told: peer_pb2.TakenBlob) -> None:
        """Into the tiers. Raises: FerryError."""
        if await self._here(key):
            return
        data = await self._fetch(peer, key, told.size)
        await self._tiers.remember(key, data, told.ttl_s)
        await self._tiers.store_on_disk(key, data, told.ttl_s)
        if not await self._here(key):
            raise ProtocolError(f"no room for a copy of {key}")

    async def _here(self, key: BlobKey) -> bool:
        return (await self._tiers.has([key]))[0]


def told_of(
    keys: Sequence[tuple[BlobKey, int, int, BlobKey | None]],
) -> list[peer_pb2.TakenBlob]:
    """Messages of (key, size, time to live in seconds, what it replaces)."""
    return [
        peer_pb2.TakenBlob(
            key=key.to_proto(),
            size=size,
            ttl_s=ttl_s,
            replaces=replaces.to_proto() if replaces is not None else None,
        )
        for key, size, ttl_s, replaces in keys
    ]
