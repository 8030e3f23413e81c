"""The gRPC service Node, for hooks on this machine, over the Unix socket only."""

import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import grpc
import psutil

from kvferry import __version__
from kvferry.cluster.convert import keys_from_proto
from kvferry.cluster.curves import check_curve, curve_id
from kvferry.cluster.handlers import stream, unary
from kvferry.cluster.policy_rules import CODEC_OPTIONS
from kvferry.cluster.server import Service
from kvferry.errors import FerryError
from kvferry.node.departure import Departure
from kvferry.node.events import EventHub
from kvferry.node.exo_watch import ExoWatch
from kvferry.node.link_table import LinkTable
from kvferry.node.locate import locate
from kvferry.node.pressure import IdleWatch
from kvferry.node.repository import NodeRepository
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1 import node_pb2

SERVICE = "kvferry.v1.Node"
MAX_FLUSH_S = 600.0
MAX_REASONS = 64
MAX_REASON_CHARS = 64
MAX_CURVES = 8
MAX_CODECS = 16


@dataclass(slots=True)
class NodeFacts:
    """What the daemon knows about itself and its cluster right now."""

    node_id: str
    incarnation: int
    max_blob_bytes: int
    salt: bytes = b""
    policy: pb.Policy = field(default_factory=pb.Policy)
    shards: dict[str, pb.ShardInfo] = field(default_factory=dict)
    curves: dict[bytes, pb.ModelCurve] = field(default_factory=dict)
    curves_wanted: tuple[bytes, ...] = ()  # by the coordinator, with the next heartbeat
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    decode_values_per_s: dict[str, float] = field(default_factory=dict)
    near_bytes_per_s: float = 0.0


class HookServicer:
    """One method for each call of the service."""

    def __init__(
        self,
        facts: NodeFacts,
        repository: NodeRepository,
        hub: EventHub,
        idle: IdleWatch,
        on_restore: Callable[[pb.RestoreReport], Awaitable[None]],
        links: LinkTable,
        departure: Departure,
        exo: ExoWatch,
    ) -> None:
        self._facts, self._repository, self._hub = facts, repository, hub
        self._idle, self._on_restore = idle, on_restore
        self._links, self._departure, self._exo = links, departure, exo
        self._watching: Counter[str] = Counter()

    async def hello(self, request: node_pb2.HelloRequest) -> node_pb2.HelloReply:
        """Hello."""
        self._take_shard(request.client, request.shard)
        facts = self._facts
        return node_pb2.HelloReply(
            node_id=facts.node_id,
            namespace_salt=facts.salt,
            policy=facts.policy,
            max_blob_bytes=facts.max_blob_bytes,
            version=__version__,
        )

    async def watch_events(
        self, request: node_pb2.WatchEventsRequest
    ) -> AsyncGenerator[node_pb2.NodeEvent, None]:
        """WatchEvents: policy and salt first, then whatever happens."""
        first = [node_pb2.NodeEvent(policy=self._facts.policy)]
        if self._facts.salt:
            first.append(node_pb2.NodeEvent(namespace_salt=self._facts.salt))
        self._watching[request.client] += 1
        try:
            async for event in self._hub.watch(*first):
                yield event
        finally:
            self._watching[request.client] -= 1
            if not self._watching[request.client]:  # its process has let go of the model
                del self._watching[request.client]
                self._facts.shards.pop(request.client[:MAX_REASON_CHARS], None)

    async def report(self, request: node_pb2.HookReport) -> node_pb2.HookReportReply:
        """Report."""
        self._idle.touch()
        self._take_shard(request.client, request.shard)
        counters = self._repository.counters
        for prefix, counts in (("hook_miss", request.misses), ("hook_drop", request.drops)):
            for reason, count in _sane(counts):
                counters[f"{prefix}_{reason}"] += count
        if request.prefill_tokens_per_s > 0:
            self._facts.prefill_tokens_per_s = request.prefill_tokens_per_s
        if request.decode_tokens_per_s > 0:
            self._facts.decode_tokens_per_s = request.decode_tokens_per_s
        if request.near_bytes_per_s > 0:
            self._facts.near_bytes_per_s = request.near_bytes_per_s
        for codec, rate in list(request.decode_values_per_s.items())[:MAX_CODECS]:
            if codec in CODEC_OPTIONS and rate > 0:
                self._facts.decode_values_per_s[codec] = rate
        if request.HasField("restore"):
            counters["hook_restores" if request.restore.tokens else "hook_misses"] += 1
            counters["hook_restored_tokens"] += request.restore.tokens
            await self._on_restore(request.restore)
        return node_pb2.HookReportReply(curve_wanted=self._take_curve(request))

    async def flush(self, request: node_pb2.FlushRequest) -> node_pb2.FlushReply:
        """Flush."""
        self._idle.touch()
        uploads = self._repository.uploads
        done = await uploads.flush(min(request.timeout_ms / 1000, MAX_FLUSH_S))
        return node_pb2.FlushReply(done=done, pending=uploads.count)

    async def status(self, request: node_pb2.NodeStatusRequest) -> node_pb2.NodeStatus:
        """Status."""
        facts, repository = self._facts, self._repository
        store, link = repository.store, self._departure.link
        return node_pb2.NodeStatus(
            node_id=facts.node_id,
            incarnation=facts.incarnation,
            version=__version__,
            tiers=await self._tiers(),
            uploads_pending=repository.uploads.count,
            uploads_pending_bytes=repository.uploads.held_bytes,
            store_reachable=store is not None and await _answers(repository),
            coordinator_reachable=link is not None and link.reachable,
            policy_version=facts.policy.version,
            policy_name=facts.policy.name,
            peers=[pb.NodeAddress(node_id=p.name, address=p.address) for p in repository.peers.all],
            resident_bytes=psutil.Process().memory_info().rss,
            counters=repository.counters,
            prefill_tokens_per_s=facts.prefill_tokens_per_s,
            decode_tokens_per_s=facts.decode_tokens_per_s,
            links=self._links.samples(),
            unix_s=time.time(),
            phase=self._departure.phase,
            drained=self._departure.drained,
            exo=self._exo.state,
            disk_writes=_disk_writes(repository),
        )

    async def locate(self, request: node_pb2.LocateRequest) -> node_pb2.LocateReply:
        """Locate."""
        found = await locate(self._repository, keys_from_proto(request.keys))
        return node_pb2.LocateReply(
            blobs=[node_pb2.Places(places=places) for places in found.places],
            silent=found.silent,
        )

    async def admit(self, request: node_pb2.AdmitRequest) -> node_pb2.AdmitReply:
        """Admit."""
        keys = keys_from_proto(request.keys)
        return node_pb2.AdmitReply(answers=await self._repository.admit(keys, request.again))

    async def _tiers(self) -> list[node_pb2.TierStatus]:
        memory, disk = self._repository.tiers.memory, self._repository.tiers.disk
        tiers = [
            node_pb2.TierStatus(
                name="memory",
                blobs=len(memory),
                bytes=memory.held_bytes,
                budget_bytes=memory.budget_bytes,
            )
        ]
        if disk is not None:
            stat = await disk.stat()
            tiers.append(
                node_pb2.TierStatus(
                    name="disk",
                    blobs=stat.blobs,
                    bytes=stat.bytes,
                    budget_bytes=stat.budget_bytes,
                )
            )
        return tiers

    def _take_shard(self, client: str, shard: pb.ShardInfo) -> None:
        if shard.model_id:
            self._facts.shards[client[:MAX_REASON_CHARS]] = shard
            while len(self._facts.shards) > MAX_REASONS:
                del self._facts.shards[next(iter(self._facts.shards))]

    def _take_curve(self, request: node_pb2.HookReport) -> bool:
        """Whether the curve that the hook's shard names is to be told."""
        curves, wanted = self._facts.curves, request.shard.curve_id
        if request.HasField("curve"):
            check_curve(request.curve)
            curves[curve_id(request.curve)] = request.curve
            while len(curves) > MAX_CURVES:
                del curves[next(iter(curves))]
        return bool(wanted) and wanted not in curves

    def service(self, on_failure: Callable[[str], None]) -> Service:
        """To be given to `kvferry.cluster.server.start_server`."""
        handlers = {
            "Hello": unary(self.hello, node_pb2.HelloRequest, on_failure),
            "WatchEvents": stream(self.watch_events, node_pb2.WatchEventsRequest, on_failure),
            "Report": unary(self.report, node_pb2.HookReport, on_failure),
            "Flush": unary(self.flush, node_pb2.FlushRequest, on_failure),
            "Status": unary(self.status, node_pb2.NodeStatusRequest, on_failure),
            "Locate": unary(self.locate, node_pb2.LocateRequest, on_failure),
            "Admit": unary(self.admit, node_pb2.AdmitRequest, on_failure),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        return Service(SERVICE, lambda server: server.add_generic_rpc_handlers((generic,)))


async def _answers(repository: NodeRepository) -> bool:
    if repository.store is None:
        return False
    try:
        async with repository.store.asking():
            await repository.store.client.stat(timeout_s=1.0)
    except FerryError:
        return False
    return True


def _disk_writes(repository: NodeRepository) -> node_pb2.DiskWrites | None:
    writes = repository.tiers.writes
    if writes is None:
        return None
    now = writes.now()
    return node_pb2.DiskWrites(
        today=now.today,
        budget_per_day=now.budget_per_day,
        per_day=now.per_day,
        total=now.total,
        endurance=now.endurance,
        lifetime_years=now.lifetime_years,
    )


def _sane(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """At most so many reasons of at most so many characters: they become metric labels."""
    for reason, count in list(counts.items())[:MAX_REASONS]:
        if len(reason) <= MAX_REASON_CHARS and reason.isidentifier():
            yield reason, min(count, 1 << 32)
