"""The store's verbs, blocking: engine, index and room kept in step.

Lock order: a stripe (one page's writers), then the room's lock, then the index's.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from kvferry.cluster import store_rebuild
from kvferry.cluster.backends.base import BlobBackend, BlobReader, BlobWriter
from kvferry.cluster.index import Index
from kvferry.cluster.index_rows import Held
from kvferry.cluster.index_units import Record, check_all_agree
from kvferry.cluster.repository import (
    BlobInfo,
    ListQuery,
    LookupQuery,
    LookupResult,
    PutSpec,
)
from kvferry.cluster.room import Room, Staged
from kvferry.cluster.space import StoreLimits
from kvferry.errors import (
    BlobNotFoundError,
    BlobTooLargeError,
    CorruptBlobError,
    StoreFullError,
)
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

_STRIPES = 64


class StoreCore:
    """Blocks; usable from any thread between `open` and `close`."""

    def __init__(
        self,
        backend: BlobBackend,
        limits: StoreLimits,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.backend, self.limits, self.clock = backend, limits, clock
        self.counters: Counter[str] = Counter()
        self.room = Room(backend, limits, clock, self.counters)
        self.index = self.room.index
        self._stripes = [threading.RLock() for _ in range(_STRIPES)]

    def open(self) -> None:
        """Take the root, make index and files agree, come back within the budget.

        Raises: ConfigError: the root is in use or cannot be used.
        """
        self.backend.open()
        room = self.room
        try:
            room.quotas.load()
            with room.lock:
                for record, since in store_rebuild.staged_records(self.backend, self.limits):
                    room.staged[record.info.key] = Staged(record, since)
                self.index.open()
                room.maintain()
                with suppress(StoreFullError):
                    while room.space.shortfall(0) > 0:  # evicting makes the index's log longer
                        room.make_room(0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of index and root. May be called twice."""
        with self.room.lock:
            with suppress(Exception):
                self.room.flush_uses()
            self.index.close()
            self.backend.close()

    def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Which are committed and have not expired."""
        now = self.clock()
        return self.index.ask(lambda index: index.present(keys, now))

    def lookup(self, query: LookupQuery) -> LookupResult:
        """Longest run of complete pages; a use of every one of them."""
        now = self.clock()
        result, units = self.index.ask(lambda index: index.lookup(query, now))
        self.counters["lookups"] += 1
        self.counters["lookup_pages"] += len(query.page_keys)
        self.counters["lookup_pages_found"] += result.complete_pages
        self.room.note_use([(unit.id, unit.token_start) for unit in units])
        return result

    def reader(self, key: BlobKey, upkeep: bool = False) -> tuple[BlobReader, Held]:
        """Open a blob; ``upkeep``: that is no use of it.

        Raises: BlobNotFoundError, CorruptBlobError (another size).
        """
        for _ in range(2):
            held = self.index.ask(lambda index: index.find(key))
            if held is None or 0 < held.expires_s <= self.clock():
                self.counters["misses"] += not upkeep
                raise BlobNotFoundError(str(key))
            try:
                reader = self.backend.reader(held.name)
            except BlobNotFoundError:
                continue  # deleted or renamed since it was found: ask again
            if reader.size != held.info.size:
                reader.close()
                self.set_aside(key, CorruptBlobError.reason)
                raise CorruptBlobError(
                    "length", f"{reader.size:,} bytes on disk, {held.info.size:,} were stored"
                )
            if not upkeep:
                self.room.note_use([(held.unit_id, held.info.tokens[0])])
                self.room.events.add(held.info.namespace_tag, hits=1, hit_bytes=reader.size)
            return reader, held
        self.counters["lost"] += 1
        log.warning("%s is in the index of %s and not on disk", key, self.backend.url)
        self.delete([key])
        raise BlobNotFoundError(str(key))

    def listing(
        self, query: ListQuery, after: tuple[int, int, int]
    ) -> tuple[list[Held], tuple[int, int, int]]:
        """Some blobs that have not expired, oldest use first, and where to go on."""
        now = self.clock()
        while True:
            held, after = self.index.ask(partial(Index.listing, query=query, after=after))
            live = [h for h in held if not 0 < h.expires_s <= now]
            if live or not held:
                return live, after

    def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """(lease id, how many of the keys are held). Raises: QueueFullError."""
        now = self.clock()
        return self.index.ask(lambda index: index.pin(keys, int(now) + ttl_s, now))

    def unpin(self, lease_id: str) -> bool:
        """False: it was over already."""
        now = self.clock()
        return self.index.ask(lambda index: index.unpin(lease_id, now))

    def set_quota(self, tag: int, name: str, quota_bytes: int) -> int:
        """See `Room.set_quota`."""
        return self.room.set_quota(tag, name, quota_bytes)

    def wanted(self, spec: PutSpec) -> bool:
        """Whether a put's bytes are needed; a key that is there may live longer for it.

        Raises: BlobTooLargeError, StoreFullError: it could never fit.
        """
        if spec.size > self.limits.max_blob_bytes:
            raise BlobTooLargeError("size", spec.size, self.limits.max_blob_bytes)
        if self.backend.charge(spec.size) > self.limits.budget_bytes:
            raise StoreFullError(self.backend.url, spec.size, self.limits.budget_bytes)
        with self._stripe(spec.key):
            return not self._present(spec)

    def _stripe(self, key: BlobKey) -> threading.RLock:
        return self._stripes[key.page_key[0] % _STRIPES]

    def _expiry(self, spec: PutSpec) -> int:
        return int(self.clock()) + spec.ttl_s if spec.ttl_s else 0

    def _present(self, spec: PutSpec) -> bool:
        """Whether the key is taken; the caller holds its stripe."""
        held = self.index.ask(lambda index: index.find(spec.key))
        if held is None:
            return self.room.waiting(spec.key) is not None
        if 0 < held.expires_s <= self.clock():
            self.delete([spec.key])
            return False
        expires = self._expiry(spec)
        if held.expires_s and (not expires or expires > held.expires_s):
            new = replace(held, expires_s=expires)
            with self.room.lock, suppress(BlobNotFoundError):
                self.backend.rename(held.name, new.name)
                self.index.ask(lambda index: index.set_expiry(held.blob_id, expires))
        return True

    def check_agreement(self, info: BlobInfo) -> None:
        """Raises: IdentityMismatchError where the page's other blobs say otherwise."""
        self.index.ask(lambda index: index.check_agreement(info))

    def publish(self, writer: BlobWriter, info: BlobInfo, spec: PutSpec, charged: int) -> bool:
        """Make a sealed, verified blob visible (or staged). False: the key was taken.

        Takes over the reservation of ``charged`` bytes when it returns True.
        Raises: IdentityMismatchError.
        """
        now = self.clock()
        record = Record(
            info=info,
            charged=charged,
            expires_s=self._expiry(spec),
            replaces=spec.replaces.page_key if spec.replaces else b"",
            used_ns=self.index.stamp(now, info.tokens[0]),
        )
        room, waiting = self.room, Staged(record, now)
        with self._stripe(info.key):
            if self._present(spec):
                return False
            self.check_agreement(info)
            writer.publish("staged" if spec.stage else "blobs", waiting.name)
            with room.lock:
                if spec.stage:
                    room.staged[info.key] = waiting
                    room.space.staged += charged
                else:
                    self._admit(record, waiting.name)
                room.release(charged, info)
        room.events.add(info.namespace_tag, puts=1, put_bytes=info.size)
        return True

    def _admit(self, record: Record, name: str) -> None:
        space = self.room.space
        space.committed += record.charged
        try:
            self._index_records([record])
        except BaseException:
            space.committed -= record.charged
            self.backend.delete(name)
            raise

    def _index_records(self, records: Sequence[Record]) -> None:
        now = self.clock()
        replaced = self.index.ask(lambda index: index.insert(records, now))
        self.room.forget_files(replaced)
        self.counters["replaced"] += len(replaced)

    def commit(self, keys: Sequence[BlobKey]) -> int:
        """Staged blobs become visible, all or none; those that are already count too.

        Raises: BlobNotFoundError, IdentityMismatchError.
        """
        room = self.room
        with room.lock:
            present = self.has(keys)
            waiting: dict[BlobKey, Staged] = {}
            for key, there in zip(keys, present, strict=True):
                if there:
                    continue
                staged = room.waiting(key)
                if staged is None:
                    raise BlobNotFoundError(str(key))
                waiting[key] = staged
            records = [staged.record for staged in waiting.values()]
            check_all_agree([record.info for record in records])
            for record in records:
                self.check_agreement(record.info)
            if waiting:
                self.backend.commit([staged.name for staged in waiting.values()])
                for key, staged in waiting.items():
                    del room.staged[key]
                    room.space.staged -= staged.record.charged
                    room.space.committed += staged.record.charged
                self._index_records(records)
            return len(keys)

    def delete(self, keys: Sequence[BlobKey]) -> int:
        """How many were there, staged ones included."""
        with self.room.lock:
            now = self.clock()
            held = self.index.ask(lambda index: index.delete(keys, now))
            self.room.forget_files(held)
            return len(held) + sum(self.room.drop_staged(key) for key in keys)

    def set_aside(self, key: BlobKey, reason: str) -> None:
        """Take a damaged blob out of sight, and keep it for a look."""
        room = self.room
        with room.lock:
            now = self.clock()
            for blob in self.index.ask(lambda index: index.delete([key], now)):
                room.space.committed -= blob.charged
                if self.backend.quarantine(blob.name, reason):
                    room.quarantined += 1
                    room.space.quarantined += blob.charged
                self.counters["quarantined"] += 1
                room.events.add(blob.info.namespace_tag, quarantined=1)
                log.warning("%s is damaged (%s) and set aside", key, reason)
