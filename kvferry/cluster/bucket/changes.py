"""What changes a bucket: blobs come, live longer, take another's place, go."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from kvferry.cluster.bucket.commit import Staging, Waiting
from kvferry.cluster.bucket.get import Finder
from kvferry.cluster.bucket.layout import UnitKey, blob_path, parse_blob_path
from kvferry.cluster.bucket.limits import BucketLimits
from kvferry.cluster.bucket.marker import Part, longer
from kvferry.cluster.bucket.memo import Memo
from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.pins import Pins
from kvferry.cluster.bucket.room import Room
from kvferry.cluster.bucket.units import Units, stored_at
from kvferry.cluster.bucket.uses import Uses
from kvferry.cluster.index_units import check_all_agree
from kvferry.cluster.repository import BlobInfo, PutSpec
from kvferry.errors import BlobNotFoundError, InvalidKeyError
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

_STRIPES = 256
_OWN_PUTS = 16_384


class Changes:
    """Of one bucket, by one server. For one event loop.

    A unit's lock is held while this server changes it; other servers do not see it, and
    need not: see `kvferry.cluster.bucket.units`.
    """

    def __init__(
        self, bucket: Bucket, limits: BucketLimits, clock: Callable[[], float], units: Units
    ) -> None:
        self.bucket, self.limits, self.clock, self.units = bucket, limits, clock, units
        self.counters = bucket.counters
        self.uses = Uses(bucket)
        self.pins = Pins(bucket)
        self.staging = Staging(bucket, clock)
        self.finder = Finder(bucket, units, clock)
        budget, memory = limits.budget_bytes, limits.in_flight_bytes
        self.room = Room(bucket, self.pins, budget, memory, clock)
        self._locks = [asyncio.Lock() for _ in range(_STRIPES)]
        self._own_puts: Memo[BlobKey, float] = Memo(_OWN_PUTS)

    def lock(self, unit: UnitKey) -> asyncio.Lock:
        """Of a unit, and of some others."""
        return self._locks[unit.page_key[0] % _STRIPES]

    async def present(self, spec: PutSpec) -> bool:
        """Whether a key is taken; it may live longer for being asked."""
        unit = UnitKey.of(spec.key)
        found, waiting = await asyncio.gather(self.finder.ask(spec.key), self.staging.waiting(unit))
        now = self.clock()
        over = {f.path for f in found if 0 < f.ends <= now}
        live = [f for f in found if f.path not in over]
        if over:
            await self.remove_paths(unit, over)
        if not live:
            return spec.key in waiting
        ends = int(now) + spec.ttl_s if spec.ttl_s else 0
        if longer(ends, live[0].ends):
            async with self.lock(unit):
                if await self.bucket.copy(live[0].path, blob_path(spec.key, ends)):
                    await self.units.settle(unit)
                    await self.bucket.delete([f.path for f in live])
                    await self.units.settle(unit)
        return True

    async def check_agreement(self, info: BlobInfo) -> None:
        """Raises: IdentityMismatchError where the page's other blobs say otherwise."""
        unit = UnitKey.of(info.key)
        parts = self.units.known(unit) or await self.units.load(unit)
        check_all_agree([*(part.info for part in parts[:1]), info])

    def put_since(self, key: BlobKey, monotonic_s: float) -> bool:
        """Whether this server put the key after that moment."""
        return (self._own_puts.get(key) or 0.0) > monotonic_s

    async def published(
        self, info: BlobInfo, spec: PutSpec, path: str, new: bool
    ) -> Sequence[Part]:
        """After a blob was written, under its page's lock: mark the page if it is whole now.

        Returns its blobs then; `complete` is called with them after the lock is free.
        """
        self._own_puts.put(spec.key, time.monotonic())
        if spec.stage:
            return ()
        if new:
            self.units.learn(path, stored_at(info, self.clock()))
            self.room.added(info)
        return await self.units.settle(UnitKey.of(spec.key))

    async def complete(self, whole: Sequence[Part], replaces: BlobKey | None) -> None:
        """A unit is whole: note that it is in use, drop the one whose place it takes."""
        if not whole:
            return
        first = whole[0].info
        self.uses.note([(UnitKey.of(first.key), first.tokens[0])], self.clock())
        if replaces is not None and replaces.kind == first.key.kind in ("tail", "state"):
            await self._replace(UnitKey.of(replaces), first)

    async def _replace(self, old: UnitKey, by: BlobInfo) -> None:
        """Drop the tail or state whose place another took, unless it is leased."""
        if old == UnitKey.of(by.key):
            return
        gone = await self.units.load(old)
        if not gone or gone[0].info.model_id != by.model_id:
            return
        leased = await self.pins.live(self.clock())
        if not any(part.info.key in leased for part in gone):
            await self.remove(old, gone)
            self.counters["replaced"] += len(gone)

    async def remove_paths(self, unit: UnitKey, paths: set[str]) -> list[Part]:
        """Delete objects of a unit; those that were there."""
        gone = [part for part in await self.units.load(unit) if part.path in paths]
        await self.remove(unit, gone)
        return gone

    async def remove(self, unit: UnitKey, gone: Sequence[Part]) -> None:
        """Delete blobs of a unit, out of sight first."""
        async with self.lock(unit):
            await self.units.remove(unit, gone)
        for part in gone:
            self._own_puts.drop(part.info.key)
            self.room.removed(part.info)

    async def set_aside(self, key: BlobKey, path: str, reason: str) -> None:
        """Take a damaged blob out of sight, and keep it for a look."""
        unit = UnitKey.of(key)
        async with self.lock(unit):
            parts = await self.units.load(unit)
            await self.units.unmark(parts[:1])
            await self.units.quarantine(path, reason)
            await self.units.settle(unit)
        self._own_puts.drop(key)
        log.warning("%s is damaged (%s) and set aside", key, reason)

    async def delete(self, unit: UnitKey, wanted: set[BlobKey]) -> int:
        """How many of these blobs of one unit were there, staged ones included."""
        paths: set[str] = set()
        for entry in await self.bucket.names(unit.blobs):
            try:
                key, _ = parse_blob_path(entry.path)
            except InvalidKeyError:
                continue
            if key in wanted:
                paths.add(entry.path)
        gone = await self.remove_paths(unit, paths) if paths else []
        waiting = await self.staging.waiting(unit)
        staged = [s for key, s in waiting.items() if key in wanted]
        await self.staging.drop([s.path for s in staged])
        for key in wanted:
            self._own_puts.drop(key)
        return len({part.info.key for part in gone}) + len(staged)

    async def commit(self, staged: Sequence[Waiting]) -> None:
        """Make blobs visible, all or none. Raises: BlobNotFoundError, IdentityMismatchError."""
        try:
            headers = [await self.units.read_header(s.path, s.size, s.key) for s in staged]
        except FileNotFoundError as exc:
            raise BlobNotFoundError(str(exc)) from exc
        check_all_agree([header.info for header in headers])
        for header in headers:
            await self.check_agreement(header.info)
        await self.staging.commit(staged)
        replaces: dict[UnitKey, BlobKey | None] = {}
        for s, header in zip(staged, headers, strict=True):
            self.units.learn(s.target, header.info)
            self.room.added(header.info)
            replaces[UnitKey.of(s.key)] = header.replaces
        for unit, old in replaces.items():
            async with self.lock(unit):
                whole = await self.units.settle(unit)
            await self.complete(whole, old)
