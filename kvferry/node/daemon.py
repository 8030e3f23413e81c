"""The node daemon: one process a machine, between the hooks there and the cluster."""

import asyncio
import contextlib
import logging
import shutil
import signal
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge

from kvferry.cluster.allocator import release_memory
from kvferry.cluster.backends import open_backend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.metrics import FailureCounts, RepositoryCollector
from kvferry.cluster.policy import default_policy
from kvferry.cluster.server import start_server
from kvferry.cluster.service import Running
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.errors import BlobNotFoundError
from kvferry.node.coordinator_link import CoordinatorLink
from kvferry.node.events import EventHub
from kvferry.node.hook_service import HookServicer, NodeFacts
from kvferry.node.journal import Journal, Pending
from kvferry.node.memory_tier import MemoryTier
from kvferry.node.pressure import IdleWatch, PressureWatch, memory_used_share
from kvferry.node.put_session import LEASE_S
from kvferry.node.remotes import Peers, Remote
from kvferry.node.repository import NodeRepository, PeerView
from kvferry.node.spool import Spool
from kvferry.node.state import NodeState
from kvferry.node.tiers import Tiers
from kvferry.node.upload_queue import UploadQueue
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1 import node_pb2
from kvferry.settings import NodeSettings

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.5
# Hooks that offload before the end put again within this time.
QUIET_S = 0.5


class NodeDaemon:
    """All parts of a running node, and how they are wired."""

    def __init__(
        self,
        settings: NodeSettings,
        state: NodeState,
        journal: Journal,
        disk: LocalStore | None,
        facts: NodeFacts,
    ) -> None:
        """Use `start_node`."""
        self.settings, self.state, self.journal = settings, state, journal
        self.counters: Counter[str] = Counter()
        limit, timeout = settings.max_blob_bytes, settings.request_timeout_s
        self.spool = Spool(settings.data_dir / "spool")
        self.tiers = Tiers(MemoryTier(settings.memory_bytes), disk, self.counters)
        self.store = Remote("the store", settings.store, timeout, limit) if settings.store else None
        self.peers = Peers(settings.node_id, settings.peer_timeout_s, limit)
        self.uploads = UploadQueue(
            self.store,
            journal,
            settings.upload_queue_bytes,
            self._read_pending,
            self._uploaded,
            self.counters,
        )
        self.idle = IdleWatch()
        self.repository = NodeRepository(
            self.tiers,
            self.uploads,
            self.peers,
            self.store,
            self.counters,
            timeout,
            self.idle.touch,
        )
        self.hub, self.pressure = EventHub(), PressureWatch()
        self.facts = facts
        self.link: CoordinatorLink | None = None

    # -- uploads ------------------------------------------------------------------

    async def _read_pending(self, key: BlobKey) -> bytes | memoryview:
        try:
            return await self.repository.read_pending(key)
        except BlobNotFoundError:
            return await asyncio.to_thread(self.spool.read, key)

    async def _uploaded(self, item: Pending) -> None:
        await self.repository.uploaded(item)
        await asyncio.to_thread(self.spool.remove, item.key)

    async def resume(self) -> None:
        """Go on with what an earlier run accepted."""
        items = await asyncio.to_thread(self.journal.load)
        await asyncio.to_thread(self.spool.keep_only, [item.key for item in items])
        if not self.uploads.active:
            return
        await self.uploads.requeue(await self._held(items))
        if items:
            log.info("%d blobs of an earlier run wait for their upload", len(items))

    async def _held(self, items: list[Pending]) -> list[Pending]:
        """With leases of this run: those of the last are gone if the index was."""
        disk = self.tiers.disk
        if disk is None:
            return items
        held = [replace(item, lease=(await disk.pin([item.key], LEASE_S))[0]) for item in items]
        await asyncio.to_thread(self.journal.add, held)
        for item in items:
            if item.lease:
                await disk.unpin(item.lease)
        return held

    async def hand_over(self) -> None:
        """Upload what can be uploaded in time; what lives in memory only goes to disk.

        Hooks get a moment to offload first. Where the store does not answer, it is not
        waited for: the journal has everything.
        """
        end = time.monotonic() + self.settings.shutdown_timeout_s
        if self.hub.watchers:
            self._trigger(pb.TRIGGER_BEFORE_SLEEP)
            await self.uploads.quiet(QUIET_S, self.settings.shutdown_timeout_s / 2)
        self.uploads.close()
        while self.store is not None and self.store.breaker.healthy:
            if await self.uploads.flush(0.1) or time.monotonic() > end:
                break
        if self.tiers.disk is None:
            for item in self.uploads.left():
                held = self.tiers.memory.get(item.key)
                if held is not None:
                    await asyncio.to_thread(self.spool.write, item.key, held.data)
        left = len(self.uploads.left())
        if left:
            log.info("%d blobs stay in the journal for the next start", left)

    # -- coordinator --------------------------------------------------------------

    def connect(self, own_address: str) -> CoordinatorLink | None:
        """A link to the coordinator, where there is one."""
        if self.settings.coordinator:
            self.link = CoordinatorLink(
                self.settings.coordinator,
                self.settings.node_id,
                self.facts.incarnation,
                own_address,
                self._beat,
                self._on_reply,
                self._on_policy,
                lambda: self.facts.policy.version,
            )
        return self.link

    def _beat(self) -> pb.HeartbeatRequest:
        self.facts.coordinator_reachable = self.link is not None and self.link.reachable
        return pb.HeartbeatRequest(
            memory_used_share=memory_used_share(),
            free_disk_bytes=_free_bytes(self.settings.data_dir),
            prefill_tokens_per_s=self.facts.prefill_tokens_per_s,
            decode_tokens_per_s=self.facts.decode_tokens_per_s,
            links=self.repository.links(),
            shards=list(self.facts.shards.values()),
            policy_version=self.facts.policy.version,
            counters=dict(self.counters.most_common(256)),
        )

    async def _on_reply(self, reply: pb.RegisterReply | pb.HeartbeatReply) -> None:
        self.facts.coordinator_reachable = True
        await self.peers.update(reply.peers)
        if isinstance(reply, pb.RegisterReply) and reply.namespace_salt != self.facts.salt:
            self.facts.salt = reply.namespace_salt
            await asyncio.to_thread(self.state.save_salt, reply.namespace_salt)
            self.hub.publish(node_pb2.NodeEvent(namespace_salt=reply.namespace_salt))

    async def _on_policy(self, policy: pb.Policy) -> None:
        if policy == self.facts.policy:
            return
        log.info("policy %s, version %d", policy.name, policy.version)
        self.facts.policy = policy
        self.hub.publish(node_pb2.NodeEvent(policy=policy))
        await asyncio.to_thread(self.state.save_policy, policy)

    async def on_restore(self, report: pb.RestoreReport) -> None:
        """Pass a hook's report on to the coordinator."""
        if self.link is not None and self.link.reachable:
            report.node_id = self.settings.node_id
            await self.link.report(report)

    # -- triggers -----------------------------------------------------------------

    async def watch_machine(self) -> None:
        """Tell hooks of memory pressure and idleness, for ever."""
        while True:
            policy = self.facts.policy
            if self.pressure.update(memory_used_share(), policy.memory_mark):
                self._trigger(pb.TRIGGER_MEMORY_PRESSURE)
            if self.idle.update(policy.idle_s):
                self._trigger(pb.TRIGGER_IDLE)
                await asyncio.to_thread(release_memory)
            await asyncio.sleep(WATCH_INTERVAL_S)

    def before_sleep(self) -> None:
        """The machine is about to sleep (SIGUSR1): hooks shall offload now."""
        self._trigger(pb.TRIGGER_BEFORE_SLEEP)

    def _trigger(self, trigger: "pb.Trigger.ValueType") -> None:
        name = pb.Trigger.Name(trigger).removeprefix("TRIGGER_").lower()
        self.counters[f"trigger_{name}"] += 1
        self.hub.trigger(trigger)


async def start_node(settings: NodeSettings, registry: CollectorRegistry) -> Running:
    """Open tiers and journal, serve hooks and peers, and join the cluster.

    Raises: ConfigError: an address or folder that cannot be used.
    """
    async with AsyncExitStack() as undo:
        state = await asyncio.to_thread(NodeState, settings.data_dir)
        undo.callback(state.close)
        journal = await asyncio.to_thread(Journal, settings.data_dir / "uploads.sqlite")
        undo.callback(journal.close)
        disk = await _open_disk(settings)
        if disk is not None:
            undo.push_async_callback(disk.aclose)
        facts = await asyncio.to_thread(_facts, settings, state)
        node = NodeDaemon(settings, state, journal, disk, facts)
        failures = FailureCounts()
        hooks = HookServicer(node.facts, node.repository, node.hub, node.idle, node.on_restore)
        limit = settings.max_blob_bytes
        own = BlobStoreServicer(node.repository, max_blob_bytes=limit, on_failure=failures)
        shown = BlobStoreServicer(
            PeerView(node.repository), max_blob_bytes=limit, on_failure=failures
        )
        for_hooks = await start_server(
            [blob_store_service(own), hooks.service(failures)], [f"unix:{settings.socket}"]
        )
        undo.push_async_callback(for_hooks.stop, 0.5)
        for_peers = await start_server(
            [blob_store_service(shown)],
            [settings.listen],
            allow_remote_plaintext=settings.allow_remote_plaintext,
        )
        undo.push_async_callback(for_peers.stop, 0.5)
        await node.resume()
        undo.pop_all()
    _add_metrics(node, failures, registry)
    link = node.connect(for_peers.addresses[0])
    background = asyncio.create_task(_background(node, link))
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, node.before_sleep)

    async def stop() -> None:
        await for_hooks.set_serving(False)
        await for_peers.set_serving(False)
        await node.hand_over()
        node.hub.close()
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)
        await for_hooks.stop(2.0)
        await for_peers.stop(2.0)
        await node.repository.settle()
        if link is not None:
            await link.aclose()
        await node.peers.aclose()
        if node.store is not None:
            await node.store.aclose()
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


async def _background(node: NodeDaemon, link: CoordinatorLink | None) -> None:
    """Everything that runs for ever; a bug in any of it ends the daemon, loudly."""
    async with asyncio.TaskGroup() as tasks:
        for _ in range(node.settings.upload_workers):
            tasks.create_task(node.uploads.work())
        tasks.create_task(node.watch_machine())
        if node.tiers.disk is not None:
            tasks.create_task(node.tiers.disk.run_maintenance())
        if link is not None:
            tasks.create_task(link.stay_known())
            tasks.create_task(link.follow_policy())


def _add_metrics(node: NodeDaemon, failures: FailureCounts, registry: CollectorRegistry) -> None:
    registry.register(RepositoryCollector("kvferry_node", node.repository.stat_now, failures))
    for name, text, value in (
        ("uploads_pending", "Blobs that wait for their upload", lambda: node.uploads.count),
        ("uploads_pending_bytes", "Their bytes", lambda: node.uploads.held_bytes),
        ("memory_bytes", "Bytes held in the memory tier", lambda: node.tiers.memory.held_bytes),
        ("peers", "Peers known", lambda: len(node.peers.all)),
        ("policy_version", "Policy in force", lambda: node.facts.policy.version),
        ("hooks", "Hooks that watch for events", lambda: node.hub.watchers),
    ):
        Gauge(f"kvferry_node_{name}", text, registry=registry).set_function(value)


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


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
