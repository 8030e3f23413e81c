"""Leases against eviction as objects: any server sees them, and they end by their name."""

import secrets
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from kvferry.cluster.bucket.layout import UnitKey
from kvferry.cluster.bucket.objects import Bucket
from kvferry.errors import InvalidKeyError, QueueFullError
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import bucket_pb2

MAX_LEASES = 10_000
_ID_HEX = 32


def _ends(path: str) -> int:
    ends = path.rpartition("@")[2]
    return int(ends) if ends.isdecimal() else 0


class Pins:
    """Leases of one bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def add(self, keys: Sequence[BlobKey], ends: int) -> str:
        """A lease on blobs that are there; returns its id. Raises: QueueFullError."""
        if len(await self._bucket.names("pins", MAX_LEASES)) >= MAX_LEASES:
            raise QueueFullError("leases", MAX_LEASES)
        lease = secrets.token_hex(_ID_HEX // 2)
        message = bucket_pb2.BucketPin(keys=[key.to_proto() for key in keys])
        # A folder of its own: found again by the id alone.
        await self._bucket.put(f"pins/{lease}/@{ends}", message.SerializeToString())
        return lease

    async def end(self, lease: str, now_s: float) -> bool:
        """False: it was over already, or never was."""
        if len(lease) != _ID_HEX or any(c not in "0123456789abcdef" for c in lease):
            return False
        found = [entry.path for entry in await self._bucket.names(f"pins/{lease}", 10)]
        await self._bucket.delete(found)
        return any(_ends(path) > now_s for path in found)

    async def live(self, now_s: float) -> set[BlobKey]:
        """Blobs under a lease. Leases that are over are deleted."""
        held: set[BlobKey] = set()
        over: list[str] = []
        for entry in await self._bucket.names("pins", 2 * MAX_LEASES):
            if _ends(entry.path) <= now_s:
                over.append(entry.path)
                continue
            data = await self._bucket.get(entry.path) or b""
            try:
                pin = bucket_pb2.BucketPin.FromString(data)
                held.update(BlobKey.from_proto(key) for key in pin.keys)
            except (DecodeError, InvalidKeyError):
                self._bucket.counters["pin_damaged"] += 1
        await self._bucket.delete(over)
        return held


def units_of(keys: set[BlobKey]) -> set[UnitKey]:
    """Units of blobs."""
    return {UnitKey.of(key) for key in keys}
