"""Who may have which blob. A hint: whoever uses it finds out, and says so here.

Three sources, all bounded: filters that peers are asked for in the background, what they
answered to lookups, and what they were found not to have.
"""

import asyncio
import logging
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvferry.cluster.repository import BlobInfo, LookupResult
from kvferry.errors import FerryError
from kvferry.node.bloom import Bloom, item_of, page_item
from kvferry.node.remotes import Peers, Remote
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

REMEMBERED = 16_384
# What a peer was found not to have is not asked of it again for so long.
DENIED_S = 30.0
# Filters kept, and asked for: 16 MiB at the most.
MAX_FILTERS = 256
ASKED_AT_ONCE = 8
LOOK_S = 0.25

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Recent(Generic[K, V]):
    """The last `REMEMBERED` entries."""

    def __init__(self) -> None:
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        return self._entries.get(key)

    def set(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > REMEMBERED:
            self._entries.popitem(last=False)

    def drop(self, key: K) -> None:
        self._entries.pop(key, None)


@dataclass(slots=True)
class _Told:
    """What one peer said of itself, and when to ask again."""

    version: int = 0
    filter: Bloom | None = None
    due_s: float = 0.0


class Directory:
    """Belongs to the event loop.

    Args:
        interval_s: between two questions to the same peer.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        peers: Peers,
        interval_s: float,
        timeout_s: float,
        counters: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers, self._interval_s, self._timeout_s = peers, interval_s, timeout_s
        self._counters, self._clock = counters, clock
        self._told: OrderedDict[str, _Told] = OrderedDict()
        self._seen: _Recent[BlobKey, frozenset[str]] = _Recent()
        self._denied: _Recent[tuple[str, BlobKey], float] = _Recent()
        self._sizes: _Recent[BlobKey, int] = _Recent()

    # -- questions ------------------------------------------------------------------

    def holders(self, key: BlobKey) -> list[Remote]:
        """Peers that may have a blob and have answered lately."""
        seen, item = self._seen.get(key) or frozenset(), item_of(key)
        return [
            peer
            for peer in self._peers.healthy
            if (peer.name in seen or self._says(peer.name, item)) and not self._no(peer.name, key)
        ]

    def copies(self, key: BlobKey) -> int:
        """How many peers may have a blob, those that are silent now included."""
        seen, item = self._seen.get(key) or frozenset(), item_of(key)
        names = [peer.name for peer in self._peers.all]
        return sum(
            (name in seen or self._says(name, item)) and not self._no(name, key) for name in names
        )

    def with_page(self, page_keys: Sequence[bytes], most: int) -> list[Remote]:
        """At most ``most`` peers to be asked for pages, the likeliest first."""
        items = [page_item(key) for key in page_keys[:1]]
        healthy = self._peers.healthy
        said = {p.name for p in healthy if any(self._says(p.name, item) for item in items)}
        return sorted(healthy, key=lambda peer: peer.name not in said)[:most]

    def size_of(self, key: BlobKey) -> int:
        """Bytes of a blob that a lookup has named; 0: not known."""
        return self._sizes.get(key) or 0

    def _says(self, name: str, item: bytes) -> bool:
        told = self._told.get(name)
        return told is not None and told.filter is not None and item in told.filter

    def _no(self, name: str, key: BlobKey) -> bool:
        return (self._denied.get((name, key)) or 0.0) > self._clock()

    # -- what was found out ---------------------------------------------------------

    def learn(self, name: str, infos: Iterable[BlobInfo]) -> None:
        """A peer says that it has these."""
        for info in infos:
            self.has(name, info.key)

    def has(self, name: str, key: BlobKey) -> None:
        """A peer has a blob."""
        self._seen.set(key, (self._seen.get(key) or frozenset()) | {name})
        self._denied.drop((name, key))

    def has_not(self, name: str, key: BlobKey) -> None:
        """It was asked and has it not."""
        self._seen.set(key, (self._seen.get(key) or frozenset()) - {name})
        self._denied.set((name, key), self._clock() + DENIED_S)

    def note_sizes(self, found: LookupResult) -> None:
        """Remember how large blobs are that will be asked for soon."""
        groups = [*found.pages, *(t.blobs for t in found.tails), *(s.blobs for s in found.states)]
        for blobs in groups:
            for info in blobs:
                self._sizes.set(info.key, info.size)

    # -- in the background ------------------------------------------------------------

    async def follow(self) -> None:
        """Ask peers what they hold, new ones at once, for ever. Also finds those that woke."""
        slots = asyncio.Semaphore(ASKED_AT_ONCE)
        async with asyncio.TaskGroup() as asking:
            while True:
                for peer in self._due():
                    asking.create_task(self._ask(peer, slots))
                await asyncio.sleep(min(LOOK_S, self._interval_s))

    def _due(self) -> list[Remote]:
        now = self._clock()
        peers = {peer.name: peer for peer in self._peers.all[:MAX_FILTERS]}
        for name in [name for name in self._told if name not in peers]:
            del self._told[name]
        due = []
        for name, peer in peers.items():
            told = self._told.setdefault(name, _Told())
            if told.due_s <= now:
                # The jitter keeps nodes that started together from asking together for ever.
                told.due_s = now + self._interval_s * random.uniform(0.75, 1.25)  # noqa: S311
                due.append(peer)
        return due

    async def _ask(self, peer: Remote, slots: asyncio.Semaphore) -> None:
        told = self._told.get(peer.name)
        if told is None:
            return
        async with slots:
            try:
                async with peer.asking():
                    reply = await peer.peer.holdings(told.version, self._timeout_s)
                if reply.bits:
                    told.filter = Bloom(reply.bits, reply.hashes)
                told.version = reply.version
                self._counters["holdings_asked"] += 1
            except FerryError as exc:
                log.debug("what %s holds: %s", peer.name, exc)

    async def ask_around(self, key: BlobKey, most: int, timeout_s: float) -> list[Remote]:
        """Peers that say they have a blob, the first to say so; for when no hint is left.

        At most ``most`` are asked, those that have not answered lately not at all.
        """
        asked = [peer for peer in self._peers.healthy if not self._no(peer.name, key)][:most]

        async def ask(peer: Remote) -> Remote | None:
            try:
                async with peer.asking():
                    held = (await peer.client.has([key], timeout_s=timeout_s))[0]
            except FerryError:
                return None
            if held:
                self.has(peer.name, key)
            return peer if held else None

        tasks = [asyncio.create_task(ask(peer)) for peer in asked]
        try:
            for answer in asyncio.as_completed(tasks):
                if (peer := await answer) is not None:
                    return [peer]
            return []
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
