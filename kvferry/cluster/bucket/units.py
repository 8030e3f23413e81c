"""Which blobs of a page there are, and whether they make it complete: asked of the bucket.

A marker is written from a listing that comes after the writer's own blob, and looked at
again after it is written; so the last of several writers has seen all blobs, whatever the
order in which they arrive. Who deletes removes the marker before the blobs and judges what
is left afterwards: a marker that names a blob which is gone does not outlive either.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvferry.cluster.blob_check import checked_info
from kvferry.cluster.bucket.layout import (
    UnitKey,
    marker_path,
    parse_blob_path,
    quarantine_path,
)
from kvferry.cluster.bucket.marker import Part, pack_marker, parse_marker, whole_of
from kvferry.cluster.bucket.memo import Memo
from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.repository import BlobInfo
from kvferry.errors import CodecError, InvalidKeyError
from kvferry.proto import container
from kvferry.proto.keys import BlobKey

# Attributes of a blob's object: what its bytes do not say.
STORED, REPLACES = "kvferry-stored", "kvferry-replaces"
_FIRST_READ = 8 * 1024
_ROUNDS = 5
_MARKERS, _INFOS = 16_384, 16_384


@dataclass(frozen=True, slots=True)
class Header:
    """What a blob says of itself; ``replaces``: the tail or state whose place it takes."""

    info: BlobInfo
    replaces: BlobKey | None = None


def stored_at(info: BlobInfo, now_s: float) -> BlobInfo:
    """The same, stored now."""
    return replace(info, stored_unix_s=int(now_s))


class Units:
    """Units of one bucket, with what is known of them for ``fresh_s`` seconds."""

    def __init__(
        self,
        bucket: Bucket,
        limits: container.Limits,
        clock: Callable[[], float],
        fresh_s: float,
    ) -> None:
        self._bucket, self._limits, self._clock, self._fresh_s = bucket, limits, clock, fresh_s
        self._known: Memo[UnitKey, tuple[float, list[Part]]] = Memo(_MARKERS)
        self._infos: Memo[str, BlobInfo] = Memo(_INFOS)

    def known(self, unit: UnitKey) -> list[Part] | None:
        """Blobs of a complete unit, if its marker was read a moment ago."""
        found = self._known.get(unit)
        if found is None or not 0 <= self._clock() - found[0] < self._fresh_s:
            return None
        return found[1]

    def forget(self, unit: UnitKey) -> None:
        """Ask the bucket next time."""
        self._known.drop(unit)

    def learn(self, path: str, info: BlobInfo) -> None:
        """What a blob that was just put says of itself."""
        self._infos.put(path, info)

    async def marked(self, unit: UnitKey, path: str) -> list[Part] | None:
        """Blobs of a unit whose marker lies at ``path``; None: it is not complete."""
        parts = self.known(unit)
        if parts is not None:
            return parts
        data = await self._bucket.get(path)
        if data is None:
            self.forget(unit)
            return None
        parts = parse_marker(data, unit)
        if parts is None:
            self._bucket.counters["marker_damaged"] += 1
            whole = await self.settle(unit)
            return whole or None
        self._known.put(unit, (self._clock(), parts))
        return parts

    async def load(self, unit: UnitKey) -> list[Part]:
        """All blobs of a unit, ended ones too, as the bucket lists them now."""
        found: list[tuple[str, int, BlobKey, int]] = []
        for entry in await self._bucket.names(unit.blobs):
            try:
                found.append((entry.path, entry.size, *parse_blob_path(entry.path)))
            except InvalidKeyError:
                self._bucket.counters["foreign"] += 1
        infos = await asyncio.gather(*(self.info(path, size, key) for path, size, key, _ in found))
        return [
            Part(replace(info, expires_unix_s=ends) if ends else info, ends)
            for info, (_, _, _, ends) in zip(infos, found, strict=True)
            if info is not None
        ]

    async def info(self, path: str, size: int, key: BlobKey) -> BlobInfo | None:
        """What a blob's header says; None: it is gone, or damaged and set aside."""
        known = self._infos.get(path)
        if known is not None and known.size == size:
            return known
        try:
            info = (await self.read_header(path, size, key)).info
        except FileNotFoundError:
            return None
        except CodecError as exc:
            await self.quarantine(path, exc.reason)
            return None
        self.learn(path, info)
        return info

    async def read_header(self, path: str, size: int, key: BlobKey) -> Header:
        """Header of an object of ``size`` bytes. Raises: CodecError, FileNotFoundError."""
        head, attributes = await self._head(path, min(size, _FIRST_READ))
        need = container.header_bytes_needed(head, self._limits)
        if need > len(head):
            head, attributes = await self._head(path, min(size, need))
        info = checked_info(container.read_header(head, size, self._limits), key, size)
        stored, replaces = attributes.get(STORED, ""), attributes.get(REPLACES, "")
        return Header(
            replace(info, stored_unix_s=int(stored) if stored.isdecimal() else 0),
            BlobKey.parse(replaces) if replaces else None,
        )

    async def _head(self, path: str, length: int) -> tuple[bytes, Mapping[str, str]]:
        reading = await self._bucket.read(path, 0, length)
        return b"".join([bytes(chunk) async for chunk in reading.chunks]), reading.attributes

    async def settle(self, unit: UnitKey) -> list[Part]:
        """Judge a unit anew: write its marker, or remove one that names too much.

        Returns the blobs that make it complete; none where it is not.
        """
        before = self._known.get(unit)
        marker = marker_path(before[1][0].info) if before else ""
        self.forget(unit)
        for _ in range(_ROUNDS):
            parts = await self.load(unit)
            now = self._clock()
            whole = whole_of([part for part in parts if part.live(now)])
            if not whole:
                marker = marker or (marker_path(parts[0].info) if parts else "")
                if marker and before:
                    await self._bucket.delete([marker])
                return []
            marker = marker_path(whole[0].info)
            if not marker:
                return whole
            await self._bucket.put(marker, pack_marker(whole))
            before = (now, whole)
            there = {entry.path for entry in await self._bucket.names(unit.blobs)}
            if there == {part.path for part in parts}:
                self._known.put(unit, (now, whole))
                return whole
        self._bucket.counters["unsettled"] += 1
        return whole

    async def unmark(self, parts: Sequence[Part]) -> None:
        """Take units out of sight before their blobs go; one blob of each is enough."""
        for part in parts:
            self.forget(UnitKey.of(part.info.key))
        markers = {marker_path(part.info) for part in parts} - {""}
        await self._bucket.delete(sorted(markers))

    async def remove(self, unit: UnitKey, gone: Sequence[Part]) -> None:
        """Delete blobs of a unit, its marker first, and judge what is left."""
        if not gone:
            return
        await self.unmark(gone[:1])
        await self._bucket.delete([part.path for part in gone])
        for part in gone:
            self._infos.drop(part.path)
        # Again: somebody may have marked it in between, from a listing of before.
        await self.unmark(gone[:1])
        await self.settle(unit)

    async def quarantine(self, path: str, reason: str) -> bool:
        """Set a damaged blob aside. False: it was gone already."""
        self._infos.drop(path)
        there = await self._bucket.copy(path, quarantine_path(path, reason))
        await self._bucket.delete([path])
        self._bucket.counters["quarantined"] += int(there)
        return there
