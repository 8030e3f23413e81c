"""The places that blobs come from, shared by all that are on their way."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from kvferry.node.byte_budget import ByteBudget
from kvferry.node.directory import Directory
from kvferry.node.remotes import Peers, Remote
from kvferry.node.sources import by_arrival
from kvferry.proto.keys import BlobKey

# So many at a time from one source: the link is never idle between two, and what comes
# later can still be given to another.
SLOTS_A_SOURCE = 3
# On a long way more are needed to fill it: so many, while less is under way than it holds.
MOST_LANES = 16
# While all lanes of the best source are taken, it is looked so often whether it still is.
LANE_S = 0.25
# What hedges may fetch in vain before anything was earned.
HEDGE_FIRST_BYTES = 16 << 20


class Lanes:
    """What all races share: the sources, and how many transfers each has.

    Args:
        timeout_s: of one transfer, whatever comes of it.
    """

    def __init__(
        self,
        peers: Peers,
        directory: Directory,
        store: Remote | None,
        counters: Counter[str],
        timeout_s: float,
        ask_timeout_s: float,
    ) -> None:
        self.peers, self.directory, self.store = peers, directory, store
        self.counters, self.timeout_s, self.ask_timeout_s = counters, timeout_s, ask_timeout_s
        self.extra = ByteBudget(HEDGE_FIRST_BYTES)
        self._changed = asyncio.Event()

    def kind(self, remote: Remote) -> str:
        """As counters name it."""
        return "store" if remote is self.store else "peer"

    def open_to(self, key: BlobKey, tried: set[Remote]) -> list[Remote]:
        """Sources that may have a blob, were not tried, and are worth asking now."""
        found = [peer for peer in self.directory.holders(key) if peer not in tried]
        store = self.store
        if store is not None and store not in tried and store.breaker.wait_s() == 0:
            found.append(store)
        return found

    def best(self, remotes: Sequence[Remote], size: int) -> tuple[float, Remote] | None:
        """(seconds until a blob is here, from where), by what is known of the links now."""
        views = [remote.source(remote is self.store) for remote in remotes]
        if not views:
            return None
        seconds, first = by_arrival(views, size)[0]
        return seconds, next(r for r, view in zip(remotes, views, strict=True) if view is first)

    async def next(
        self, key: BlobKey, tried: set[Remote], size: int
    ) -> tuple[float, Remote] | None:
        """`best`, as soon as it has a lane free. None: there is no source left."""
        while (found := self.best(self.open_to(key, tried), size)) is not None:
            if _has_room(found[1]):
                return found
            changed = self._changed
            try:
                async with asyncio.timeout(LANE_S):
                    await changed.wait()
            except TimeoutError:
                continue  # links may have slowed down since
        return None

    def freed(self) -> None:
        """A transfer has ended."""
        self._changed.set()
        self._changed = asyncio.Event()


def _has_room(remote: Remote) -> bool:
    """Whether one more transfer is to be begun there now."""
    meter = remote.meter
    if meter.under_way < SLOTS_A_SOURCE:
        return True
    holds = 2 * meter.bytes_per_s * remote.latency_s
    return meter.under_way < MOST_LANES and meter.queued_bytes < holds
