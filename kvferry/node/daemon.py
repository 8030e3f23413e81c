"""The node daemon: one process a machine, between the hooks there and the cluster."""

import asyncio
import contextlib
import signal
from collections import Counter
from contextlib import AsyncExitStack

from prometheus_client import CollectorRegistry

from kvferry.cluster.backends import open_backend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.discovery import check_discovery
from kvferry.cluster.link_probe import link_service
from kvferry.cluster.metrics import FailureCounts
from kvferry.cluster.policy import default_policy
from kvferry.cluster.server import start_server
from kvferry.cluster.service import Running
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.node.coordination import Coordination
from kvferry.node.coordinator_link import CoordinatorLink
from kvferry.node.departure import Departure
from kvferry.node.disk_writes import disk_writes
from kvferry.node.events import EventHub
from kvferry.node.exo_watch import ExoWatch
from kvferry.node.finder import Finder, Sought
from kvferry.node.hook_service import HookServicer, NodeFacts
from kvferry.node.journal import Journal
from kvferry.node.link_table import LinkTable
from kvferry.node.memory_tier import MemoryTier
from kvferry.node.node_metrics import add_metrics
from kvferry.node.pending_blobs import PendingBlobs
from kvferry.node.pressure import IdleWatch
from kvferry.node.prober import Prober, Ration
from kvferry.node.remotes import Peers, Remote
from kvferry.node.repository import NodeRepository
from kvferry.node.spool import Spool
from kvferry.node.state import NodeState
from kvferry.node.tiers import Tiers
from kvferry.node.triggers import Triggers
from kvferry.node.upload_queue import UploadQueue
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.settings import NodeSettings


class NodeDaemon:
    """All parts of a running node, and how they are wired. What they do is in them."""

    def __init__(
        self,
        settings: NodeSettings,
        state: NodeState,
        journal: Journal,
        disk: LocalStore | None,
        facts: NodeFacts,
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        """Use `start_node`."""
        self.settings, self.facts = settings, facts
        self.counters: Counter[str] = Counter()
        limit, timeout = settings.max_blob_bytes, settings.request_timeout_s
        writes = disk_writes(settings) if disk is not None else None
        self.tiers = Tiers(MemoryTier(settings.memory_bytes), disk, self.counters, writes)
        self.store: Remote | None = None
        if settings.store or "store" in settings.sought:
            place = "" if "store" in settings.sought else settings.store
            self.store = Remote("the store", place, timeout, limit, credentials)
        self.peers = Peers(settings.node_id, settings.peer_timeout_s, limit, credentials)
        self.uploads = UploadQueue(
            self.store,
            journal,
            settings.upload_queue_bytes,
            lambda key: self.pending.read(key),
            lambda item: self.pending.uploaded(item),
            self.counters,
        )
        self.idle = IdleWatch()
        self.repository = NodeRepository(
            settings,
            facts.incarnation,
            self.tiers,
            self.uploads,
            self.peers,
            self.store,
            self.counters,
            self.idle.touch,
        )
        self.pending = PendingBlobs(self.repository, journal, Spool(settings.data_dir / "spool"))
        self.hub = EventHub()
        self.triggers = Triggers(self.hub, self.idle, lambda: facts.policy, self.counters)
        self.departure = Departure(
            self.hub,
            self.triggers,
            self.repository,
            self.pending,
            settings.shutdown_timeout_s,
            lambda: self.idle.touches,
        )
        self.links, self.exo = LinkTable(self.peers, self.store), ExoWatch(settings.exo_url)
        self.prober = Prober(self.links, Ration(settings.probe_bytes_per_hour), self.counters)
        self.coordination = Coordination(
            facts,
            state,
            settings.data_dir,
            self.hub,
            self.peers,
            self.links,
            self.departure,
            self.exo,
            self.counters,
        )
        self.link: CoordinatorLink | None = None
        if settings.coordinator or "coordinator" in settings.sought:
            place = "" if "coordinator" in settings.sought else settings.coordinator
            self.link = self.coordination.link(place, credentials)

    def hooks(self) -> HookServicer:
        """What hooks on this machine are served, beside blobs."""
        return HookServicer(
            self.facts,
            self.repository,
            self.hub,
            self.idle,
            self.coordination.on_restore,
            self.links,
            self.departure,
            self.exo,
        )

    def finder(self) -> Finder:
        """What looks for those that have no address."""
        sought: dict[str, Sought] = {}
        if self.store is not None and "store" in self.settings.sought:
            store = self.store
            sought["store"] = Sought(store.point_at, lambda: store.breaker.healthy)
        if self.link is not None and "coordinator" in self.settings.sought:
            link = self.link
            sought["coordinator"] = Sought(link.point_at, lambda: link.reachable)
        return Finder(self.settings.discovery, self.settings.listen, sought)

    async def run(self) -> None:
        """Everything that runs for ever; a bug in any of it ends the daemon, loudly."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.settings.upload_workers):
                tasks.create_task(self.uploads.work())
            tasks.create_task(self.triggers.watch())
            tasks.create_task(self.departure.run())
            tasks.create_task(self.repository.exchange.run())
            tasks.create_task(self.prober.run())
            tasks.create_task(self.exo.run())
            if self.tiers.disk is not None:
                tasks.create_task(self.tiers.disk.run_maintenance())
            if self.link is not None:
                tasks.create_task(self.link.stay_known())
                tasks.create_task(self.link.follow_policy())
            if self.settings.sought:
                tasks.create_task(self.finder().run())

    async def aclose(self) -> None:
        """Close all connections."""
        await self.repository.settle()
        if self.link is not None:
            await self.link.aclose()
        await self.peers.aclose()
        if self.store is not None:
            await self.store.aclose()


async def start_node(settings: NodeSettings, registry: CollectorRegistry) -> Running:
    """Open tiers and journal, serve hooks and peers, and join the cluster.

    Raises: ConfigError: an address or folder that cannot be used.
    """
    check_discovery(settings.discovery)
    async with AsyncExitStack() as undo:
        credentials = await asyncio.to_thread(Credentials.of, settings)
        state = await asyncio.to_thread(NodeState, settings.data_dir)
        undo.callback(state.close)
        journal = await asyncio.to_thread(Journal, settings.data_dir / "uploads.sqlite")
        undo.callback(journal.close)
        disk = await _open_disk(settings)
        if disk is not None:
            undo.push_async_callback(disk.aclose)
        facts = await asyncio.to_thread(_facts, settings, state)
        node = NodeDaemon(settings, state, journal, disk, facts, credentials)
        failures = FailureCounts()
        limit = settings.max_blob_bytes
        own = BlobStoreServicer(node.repository, max_blob_bytes=limit, on_failure=failures)
        exchange = node.repository.exchange
        shown = BlobStoreServicer(
            exchange.view(node.repository), max_blob_bytes=limit, on_failure=failures
        )
        for_hooks = await start_server(
            [blob_store_service(own), node.hooks().service(failures)], [f"unix:{settings.socket}"]
        )
        undo.push_async_callback(for_hooks.stop, 0.5)
        for_peers = await start_server(
            [blob_store_service(shown), link_service(failures), exchange.service(failures)],
            [settings.listen],
            credentials=credentials,
            allow_remote_plaintext=settings.allow_remote_plaintext,
            on_refused=failures,
        )
        undo.push_async_callback(for_peers.stop, 0.5)
        await node.pending.resume()
        undo.pop_all()
    add_metrics(node, failures, registry)
    node.coordination.own_address = for_peers.addresses[0]
    background = asyncio.create_task(node.run())
    _obey_signals(node.departure)

    async def stop() -> None:
        await for_hooks.set_serving(False)
        await for_peers.set_serving(False)
        await node.departure.finish()
        node.hub.close()
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)
        await for_hooks.stop(2.0)
        await for_peers.stop(2.0)
        await node.aclose()
        if disk is not None:
            await disk.aclose()
        journal.close()
        state.close()

    return Running(
        addresses=for_peers.addresses,
        stop=stop,
        background=background,
        info={"socket": str(settings.socket), "node_id": settings.node_id},
    )


def _obey_signals(departure: Departure) -> None:
    """SIGUSR1: the machine is about to sleep. SIGUSR2: it is awake."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGUSR1, departure.order, "sleep")
        loop.add_signal_handler(signal.SIGUSR2, departure.order, "wake")


async def _open_disk(settings: NodeSettings) -> LocalStore | None:
    if not settings.disk_bytes:
        return None
    limits = StoreLimits(
        budget_bytes=settings.disk_bytes,
        reserve_bytes=settings.disk_reserve_bytes,
        max_blob_bytes=settings.max_blob_bytes,
    )
    folder = (settings.data_dir / "blobs").resolve()
    return await LocalStore.open(open_backend(f"file://{folder}"), limits, source="disk")


def _facts(settings: NodeSettings, state: NodeState) -> NodeFacts:
    """What an earlier run left behind. Blocks."""
    return NodeFacts(
        node_id=settings.node_id,
        incarnation=state.next_incarnation(),
        max_blob_bytes=settings.max_blob_bytes,
        salt=state.salt() if settings.coordinator else state.own_salt(),
        policy=state.policy() or _first_policy(),
    )


def _first_policy() -> pb.Policy:
    policy = default_policy()
    policy.version = max(1, policy.version)
    return policy
