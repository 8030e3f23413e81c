"""Room in a store: what is held against what is allowed, and who goes first."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvferry.cluster.backends.base import BlobBackend
from kvferry.cluster.blob_name import blob_name
from kvferry.cluster.index import Index
from kvferry.cluster.index_keeper import IndexKeeper
from kvferry.cluster.index_rows import Held
from kvferry.cluster.index_sums import charged_to
from kvferry.cluster.index_units import Chain, Record
from kvferry.cluster.quotas import FILE_NAME, NamespaceEvents, QuotaBook
from kvferry.cluster.repository import BlobInfo
from kvferry.cluster.space import Space, StoreLimits
from kvferry.errors import StoreFullError
from kvferry.proto.keys import BlobKey

_USES_BATCH = 2000


@dataclass(frozen=True, slots=True)
class Staged:
    """A blob that waits for its commit."""

    record: Record
    since_s: float

    @property
    def name(self) -> str:
        """Its name in the engine."""
        return blob_name(self.record.info.key, self.record.expires_s)


class Room:
    """Reservations, eviction, expiry and uses. Blocks; usable from any thread.

    ``lock`` (reentrant) guards everything here; whoever changes ``space`` or ``staged``
    holds it.
    """

    def __init__(
        self,
        backend: BlobBackend,
        limits: StoreLimits,
        clock: Callable[[], float],
        counters: Counter[str],
    ) -> None:
        self.lock = threading.RLock()
        self.space = Space(backend, limits)
        self.staged: dict[BlobKey, Staged] = {}
        self.quarantined = 0
        self.index = IndexKeeper(backend, limits, clock, counters, self.lock, self._recount)
        beside = Path(backend.index_path).with_name(FILE_NAME)
        self.quotas = QuotaBook(None if backend.index_path == ":memory:" else beside)
        self.events = NamespaceEvents()
        self._backend, self._limits, self._clock = backend, limits, clock
        self._counters = counters
        self._uses: dict[int, int] = {}
        self._uses_lock = threading.Lock()
        self._writing: list[tuple[BlobInfo, int]] = []

    def _recount(self, index: Index) -> None:
        with self._uses_lock:
            self._uses.clear()
        self.space.committed = index.totals().charged
        self.space.staged = sum(s.record.charged for s in self.staged.values())
        aside = [self._backend.charge(e.size) for e in self._backend.entries("quarantine")]
        self.quarantined, self.space.quarantined = len(aside), sum(aside)

    def reserve(self, charged: int, info: BlobInfo) -> None:
        """Set bytes apart for a write, evicting if need be.

        The pages before the one written stay; where the one just before it is not here,
        nothing is evicted for it, as nobody could find it. What its namespace has beyond its
        quota goes first, and is its own.
        Raises: StoreFullError; no live blob was evicted for it.
        """
        with self.lock:
            self._keep_quota(info.namespace_tag, charged, info)
            self.make_room(charged, info)
            self.space.in_flight += charged
            self._writing.append((info, charged))

    def release(self, charged: int, info: BlobInfo) -> None:
        """End of a reservation: its bytes are gone, or counted elsewhere."""
        with self.lock:
            self.space.in_flight -= charged
            self._writing.remove((info, charged))

    def make_room(self, charged: int, info: BlobInfo | None = None) -> None:
        """First what has ended, then damaged blobs, then the least recently used."""
        if self.space.shortfall(charged) <= 0:
            return
        while self.drop_ended() and self.space.shortfall(charged) > 0:
            pass
        self._trim_quarantine(charged)
        short = self.space.shortfall(charged)
        if short <= 0:
            return
        if not self._evict(short, info):
            raise StoreFullError(self._backend.url, charged, self.space.free())

    def _evict(self, short: int, info: BlobInfo | None, namespace: int | None = None) -> int:
        """Let the least recently used go for ``short`` bytes; 0: so much is not to be had."""
        self.flush_uses()
        now = self._clock()
        chain = self._chain_before(info) if info is not None else None
        victims = self.index.ask(lambda index: index.take_victims(short, chain, now, namespace))
        self.forget_files(victims)
        self._counters["evicted"] += len(victims)
        self._counters["evicted_bytes"] += sum(h.info.size for h in victims)
        for blob in victims:
            self.events.add(blob.info.namespace_tag, evicted=1, evicted_bytes=blob.info.size)
        return len(victims)

    def _keep_quota(self, tag: int, more: int, info: BlobInfo | None = None) -> int:
        """Make room within a namespace's quota; how many of its blobs went.

        Raises: StoreFullError: what it has is leased, or comes before the blob written.
        """
        quota = self.quotas.get(tag)
        if quota is None:
            return 0
        over = self._held_by(tag) + more - quota.bytes
        if over > 0 and self.drop_ended():
            over = self._held_by(tag) + more - quota.bytes
        if over <= 0:
            return 0
        evicted = self._evict(over, info, tag)
        if not evicted:
            self.events.add(tag, refused_quota=1)
            where = f"quota of namespace {quota.name or f'{tag:016x}'}"
            raise StoreFullError(where, more, max(0, more - over))
        return evicted

    def _held_by(self, tag: int) -> int:
        """Bytes of the medium: committed, staged and being written."""
        held = self.index.ask(lambda index: index.sums(partial(charged_to, namespace=tag)))
        staged = (s.record for s in self.staged.values())
        held += sum(r.charged for r in staged if r.info.namespace_tag == tag)
        return held + sum(c for info, c in self._writing if info.namespace_tag == tag)

    def set_quota(self, tag: int, name: str, quota_bytes: int) -> int:
        """Durable when this returns; how many of the namespace's blobs went for it at once."""
        with self.lock:
            self.quotas.set(tag, name, quota_bytes)
            try:
                return self._keep_quota(tag, 0)
            except StoreFullError:
                return 0  # leased: they go when their leases have ended

    def _chain_before(self, info: BlobInfo) -> Chain:
        """The pages before a blob that are being written, and the first that is not."""
        writing = {i.key.page_key: i for i, _ in self._writing if i.key.kind == "page"}
        pages: list[bytes] = []
        first = info
        while (before := writing.get(first.previous_key)) and len(pages) < len(writing):
            pages.append(first.previous_key)
            first = before
        whole = first.tokens[0] == 0 or info.key.kind == "calibration"
        return Chain(pages, first.previous_key, whole)

    def forget_files(self, held: Sequence[Held]) -> None:
        """Delete files whose rows are gone already."""
        for blob in held:
            self.space.committed -= blob.charged
            self._backend.delete(blob.name)

    def drop_ended(self) -> int:
        """Some expired blobs, and staged ones that nobody committed in time; how many."""
        now = self._clock()
        self._drop_abandoned(now)
        ended = self.index.ask(lambda index: index.take_expired(now))
        self.forget_files(ended)
        self._counters["expired"] += len(ended)
        for blob in ended:
            self.events.add(blob.info.namespace_tag, expired=1)
        return len(ended)

    def _drop_abandoned(self, now: float) -> None:
        for key, staged in list(self.staged.items()):  # oldest first
            if staged.since_s + self._limits.staged_ttl_s > now:
                return
            self.drop_staged(key)
            self._counters["staged_dropped"] += 1

    def waiting(self, key: BlobKey) -> Staged | None:
        """What is staged under a key, if its time is not over."""
        with self.lock:
            self._drop_abandoned(self._clock())
            return self.staged.get(key)

    def drop_staged(self, key: BlobKey) -> bool:
        """False: there was none."""
        staged = self.staged.pop(key, None)
        if staged is None:
            return False
        self.space.staged -= staged.record.charged
        self._backend.delete(staged.name, "staged")
        return True

    def _trim_quarantine(self, charged: int) -> None:
        if not self.quarantined:
            return
        for entry in sorted(self._backend.entries("quarantine"), key=lambda e: e.modified_unix_s):
            if self.space.shortfall(charged) <= 0:
                break
            if self._backend.delete(entry.name, "quarantine"):
                self.quarantined -= 1
                self.space.quarantined -= self._backend.charge(entry.size)

    def note_use(self, units: Sequence[tuple[int, int]]) -> None:
        """Uses of (unit id, first token). Readers wait for nothing here: see `flush_uses`."""
        now = self._clock()
        with self._uses_lock:
            for unit_id, token_start in units:
                self._uses[unit_id] = self.index.stamp(now, token_start)

    def flush_uses(self) -> None:
        """Write noted uses to the index, some at a time."""
        with self._uses_lock:
            uses, self._uses = list(self._uses.items()), {}
        for at in range(0, len(uses), _USES_BATCH):
            self.index.ask(partial(Index.touch, used_ns=dict(uses[at : at + _USES_BATCH])))

    def maintain(self) -> None:
        """What is due: expired and abandoned blobs, noted uses, the index's size."""
        self.flush_uses()
        with self.lock:
            self.drop_ended()
            self.index.ask(lambda index: index.tidy())
