"""Staged blobs become visible, all or none, although a server dies half way.

Each is copied inside the bucket, which sends no bytes through here. A record of what is to
be copied is written first: from then on the commit holds, and whoever sweeps finishes it.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvferry.cluster.bucket.layout import UnitKey, blob_path, parse_staged_path
from kvferry.cluster.bucket.objects import Bucket
from kvferry.errors import InvalidKeyError
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import bucket_pb2

_RECORD_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Waiting:
    """A staged blob. ``size`` in bytes."""

    path: str
    key: BlobKey
    ends: int
    deadline: int
    size: int

    @property
    def target(self) -> str:
        """Where it will lie."""
        return blob_path(self.key, self.ends)


class Staging:
    """What is put and not committed yet."""

    def __init__(self, bucket: Bucket, clock: Callable[[], float]) -> None:
        self._bucket, self._clock = bucket, clock

    async def waiting(self, unit: UnitKey) -> dict[BlobKey, Waiting]:
        """Staged blobs of a unit whose time is not over; the others are deleted."""
        found: dict[BlobKey, Waiting] = {}
        over: list[str] = []
        for entry in await self._bucket.names(unit.staged):
            try:
                staged = Waiting(entry.path, *parse_staged_path(entry.path), entry.size)
            except InvalidKeyError:
                continue
            if staged.deadline <= self._clock():
                over.append(staged.path)
            else:
                found[staged.key] = staged
        await self.drop(over)
        return found

    async def drop(self, paths: Sequence[str]) -> None:
        """Forget staged blobs."""
        if paths:
            await self._bucket.delete(paths)
            self._bucket.counters["staged_dropped"] += len(paths)

    async def commit(self, staged: Sequence[Waiting]) -> None:
        """Make them visible."""
        record = bucket_pb2.BucketCommit(staged=[s.path for s in staged])
        path = f"commits/{secrets.token_hex(12)}"
        await self._bucket.put(path, record.SerializeToString())
        await self._finish(path, [s.path for s in staged])

    async def _finish(self, record: str, paths: Sequence[str]) -> list[UnitKey]:
        units: list[UnitKey] = []
        for path in paths:
            try:
                key, ends, _ = parse_staged_path(path)
            except InvalidKeyError:
                continue
            await self._bucket.copy(path, blob_path(key, ends))  # False: it was copied before
            units.append(UnitKey.of(key))
        await self._bucket.delete(list(paths))
        await self._bucket.delete([record])
        return list(dict.fromkeys(units))

    async def replay(self, older_than_unix_s: float) -> list[UnitKey]:
        """Finish commits that a server left half done; the units that they change."""
        units: list[UnitKey] = []
        for entry in await self._bucket.names("commits"):
            if entry.modified_unix_s > older_than_unix_s:
                continue
            data = await self._bucket.get(entry.path, _RECORD_BYTES) or b""
            try:
                paths = list(bucket_pb2.BucketCommit.FromString(data).staged)
            except DecodeError:
                paths = []
            units += await self._finish(entry.path, paths)
        return units
