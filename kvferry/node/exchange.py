"""What goes on between a node and its peers, and what it spends on it: all parts, wired."""

import asyncio
from collections import Counter
from collections.abc import Callable

from kvferry.cluster.repository import BlobRepository
from kvferry.cluster.server import Service
from kvferry.cluster.throttle import Throttle
from kvferry.node.copies import Copier
from kvferry.node.directory import Directory
from kvferry.node.fetching import Fetching
from kvferry.node.hand_over import HandOver
from kvferry.node.holdings import Holdings
from kvferry.node.lanes import Lanes
from kvferry.node.peer_service import PeerServicer
from kvferry.node.peer_view import PeerView
from kvferry.node.remotes import Peers, Remote
from kvferry.node.second_use import SecondUse
from kvferry.node.take_over import TakeOvers
from kvferry.node.tiers import Tiers
from kvferry.node.upload_queue import UploadQueue
from kvferry.proto.keys import BlobKey
from kvferry.settings import NodeSettings


class Exchange:
    """Belongs to the event loop. `run` goes on beside the daemon, `settle` ends it.

    Args:
        quiet_s: since when no hook has asked for anything.
    """

    def __init__(
        self,
        settings: NodeSettings,
        incarnation: int,
        tiers: Tiers,
        uploads: UploadQueue,
        peers: Peers,
        store: Remote | None,
        counters: Counter[str],
        quiet_s: Callable[[], float],
    ) -> None:
        self._tiers, self._counters = tiers, counters
        self._throttle = Throttle(settings.serve_bytes_per_s)
        ask_s = settings.peer_timeout_s
        self.directory = Directory(peers, settings.holdings_interval_s, ask_s, counters)
        self.holdings = Holdings(tiers)
        tiers.on_new = self.holdings.add
        lanes = Lanes(peers, self.directory, store, counters, settings.request_timeout_s, ask_s)
        self.fetching = Fetching(tiers, lanes, counters, settings.fetch_inflight_bytes)
        self.hand_over = HandOver(
            settings.node_id,
            incarnation,
            tiers,
            uploads,
            peers,
            self.directory,
            store,
            counters,
            settings.handover_bytes,
        )
        self.take_overs = TakeOvers(
            tiers,
            uploads,
            peers,
            counters,
            settings.max_blob_bytes,
            settings.handover_bytes,
            settings.copy_bytes_per_hour,
        )
        self.copier = Copier(
            settings.node_id,
            incarnation,
            tiers,
            peers,
            self.directory,
            counters,
            settings.copies,
            settings.copy_bytes_per_hour,
            quiet_s,
        )
        kept = settings.data_dir / "offered.bin"
        self.second_use = SecondUse(kept) if settings.store_on_second_use else None

    def read(self, key: BlobKey) -> None:
        """A blob was asked for: often, and it is copied."""
        self.copier.reads.note(key)

    def view(self, repository: BlobRepository) -> PeerView:
        """What peers see of ``repository``."""
        return PeerView(repository, self._tiers, self._counters, self.read, self._throttle)

    def service(self, on_failure: Callable[[str], None]) -> Service:
        """What peers ask for beside blobs."""
        return PeerServicer(self.holdings, self.take_overs).service(on_failure)

    async def run(self) -> None:
        """What goes on in the background, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.directory.follow())
            tasks.create_task(self.holdings.run())
            tasks.create_task(self.copier.run())
            if self.second_use is not None:
                tasks.create_task(self.second_use.run())

    async def settle(self) -> None:
        """Wait for what is being written, and write what is remembered."""
        await self.fetching.settle()
        if self.second_use is not None:
            await self.second_use.save()
        if self._tiers.writes is not None:
            await asyncio.to_thread(self._tiers.writes.save, exact=True)
