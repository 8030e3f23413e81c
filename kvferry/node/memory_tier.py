"""The fastest tier: whole, verified blobs in memory, least recently used out first.

What is being written counts like what is held, so the budget holds at every moment. Blobs
that wait for their upload and exist nowhere else are pinned. Belongs to the event loop.
"""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvferry.cluster.repository import BlobInfo
from kvferry.proto.keys import BlobKey


@dataclass(frozen=True, slots=True)
class MemoryBlob:
    """A whole blob. ``expires_unix_s`` 0: no end."""

    info: BlobInfo
    data: bytes | memoryview
    expires_unix_s: float = 0.0


class Reservation:
    """Room for one blob that is being written. Ends by `commit` or `release`."""

    def __init__(self, tier: "MemoryTier", size: int) -> None:
        self._tier, self.size, self._open = tier, size, True

    def commit(self, blob: MemoryBlob, pinned: bool = False) -> bool:
        """Turn the room into a held blob; it has exactly `size` bytes. False: was there."""
        if len(blob.data) != self.size:
            raise ValueError(f"{self.size} bytes were reserved, {len(blob.data)} come")
        self.release()
        return self._tier._insert(blob, pinned)

    def release(self) -> None:
        """Give the room back; does nothing a second time."""
        if self._open:
            self._open = False
            self._tier._in_flight -= self.size


class MemoryTier:
    """Blobs by key within ``budget_bytes``."""

    def __init__(self, budget_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.budget_bytes, self._clock = budget_bytes, clock
        self._blobs: OrderedDict[BlobKey, MemoryBlob] = OrderedDict()
        self._pinned: set[BlobKey] = set()
        self._pages: defaultdict[bytes, set[BlobKey]] = defaultdict(set)
        self._held = self._in_flight = 0

    def __len__(self) -> int:
        return len(self._blobs)

    @property
    def held_bytes(self) -> int:
        """Bytes of the blobs held."""
        return self._held

    @property
    def in_flight_bytes(self) -> int:
        """Bytes reserved for blobs that are being written."""
        return self._in_flight

    def reserve(self, size: int) -> Reservation | None:
        """Room for ``size`` bytes, made by letting go of what was used longest ago.

        None where even that is not enough: what is pinned or in flight stays.
        """
        fixed = self._in_flight + sum(len(self._blobs[key].data) for key in self._pinned)
        if size + fixed > self.budget_bytes:
            return None
        spare = (key for key in list(self._blobs) if key not in self._pinned)
        while self._held + self._in_flight + size > self.budget_bytes:
            self.remove(next(spare))
        self._in_flight += size
        return Reservation(self, size)

    def _insert(self, blob: MemoryBlob, pinned: bool) -> bool:
        key = blob.info.key
        if self._live(key) is not None:
            if pinned:
                self._pinned.add(key)
            return False
        self._blobs[key] = blob
        self._held += len(blob.data)
        self._pages[key.page_key].add(key)
        if pinned:
            self._pinned.add(key)
        return True

    def _live(self, key: BlobKey) -> MemoryBlob | None:
        blob = self._blobs.get(key)
        if blob is not None and 0 < blob.expires_unix_s <= self._clock():
            self.remove(key)
            return None
        return blob

    def __contains__(self, key: BlobKey) -> bool:
        return self._live(key) is not None

    def get(self, key: BlobKey) -> MemoryBlob | None:
        """The blob, now the most recently used."""
        blob = self._live(key)
        if blob is not None:
            self._blobs.move_to_end(key)
        return blob

    def unpin(self, key: BlobKey) -> None:
        """It may be let go of again."""
        self._pinned.discard(key)

    def remove(self, key: BlobKey) -> bool:
        """False: it was not there."""
        blob = self._blobs.pop(key, None)
        if blob is None:
            return False
        self._held -= len(blob.data)
        self._pinned.discard(key)
        page = self._pages[key.page_key]
        page.discard(key)
        if not page:
            del self._pages[key.page_key]
        return True

    def of_page(self, page_key: bytes) -> Sequence[BlobInfo]:
        """What is held under one page key."""
        keys = sorted(self._pages.get(page_key, ()))
        return [blob.info for key in keys if (blob := self._live(key)) is not None]

    def infos(self) -> Iterator[BlobInfo]:
        """What is held, least recently used first."""
        for key in list(self._blobs):
            if (blob := self._live(key)) is not None:
                yield blob.info

    def pinned(self) -> Sequence[BlobKey]:
        """Keys that wait for their upload."""
        return sorted(self._pinned)
