"""The gRPC service Coordinator: checks every field, then asks the `Coordinator`."""

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import AsyncExitStack, aclosing

import grpc

from kvferry import __version__
from kvferry.cluster import policy as policies
from kvferry.cluster.coordinator import Coordinator
from kvferry.cluster.credentials import Credentials
from kvferry.cluster.curves import check_curve
from kvferry.cluster.discovery import announced
from kvferry.cluster.handlers import stream, unary
from kvferry.cluster.leader_gate import LeaderGate
from kvferry.cluster.member_messages import check_exo, told
from kvferry.cluster.server import Service, start_server
from kvferry.cluster.service import Running
from kvferry.cluster.tokens import check_namespace
from kvferry.errors import ConfigError, ProtocolError
from kvferry.proto.keys import DIGEST_BYTES, MAX_HEADS, MAX_LAYERS
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.settings import CoordinatorSettings

SERVICE = "kvferry.v1.Coordinator"
MAX_SHARDS = 1024
MAX_LINKS = 4096
MAX_COUNTERS = 1024
MAX_EXPLAINED = 4096
MAX_CURVES_TOLD = 4
MAX_SALT_BYTES = 64

_NODE_ID = re.compile(r"[^\s\x00-\x1f\x7f]{1,128}")
_ADDRESS = re.compile(r"(|[^\s:]{1,255}:[0-9]{1,5}|\[[0-9a-fA-F:.%]{2,64}\]:[0-9]{1,5})")


class CoordinatorServicer:
    """One method for each call of the service."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        """Register."""
        _check_node(request.node_id)
        if not _ADDRESS.fullmatch(request.address):
            raise ProtocolError(f"address {request.address[:80]!r}: HOST:PORT or none wanted")
        if len(request.version) > 64:
            raise ProtocolError("version: at most 64 characters wanted")
        _check_shards(request.shards)
        if len(request.namespace_salt) > MAX_SALT_BYTES:
            raise ProtocolError(f"salt: at most {MAX_SALT_BYTES} bytes wanted")
        return await self._coordinator.register(request)

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """Heartbeat."""
        _check_node(request.node_id)
        _check_shards(request.shards)
        if request.HasField("exo"):
            check_exo(request.exo)
        rates = [request.prefill_tokens_per_s, request.decode_tokens_per_s]
        rates += [request.near_bytes_per_s, *request.decode_values_per_s.values()]
        rates += [n for link in request.links for n in _figures(link)]
        _check_numbers(request.memory_used_share, *rates)
        if len(request.curves) > MAX_CURVES_TOLD:
            raise ProtocolError(f"at most {MAX_CURVES_TOLD} curves in a heartbeat wanted")
        for curve in request.curves:
            check_curve(curve)
        if len(request.links) > MAX_LINKS or len(request.counters) > MAX_COUNTERS:
            raise ProtocolError(f"at most {MAX_LINKS} links and {MAX_COUNTERS} counters wanted")
        if any(len(name) > 128 for name in (*request.counters, *_names(request))):
            raise ProtocolError("names of links and counters: at most 128 characters wanted")
        return await self._coordinator.heartbeat(request)

    async def goodbye(self, request: pb.GoodbyeRequest) -> pb.GoodbyeReply:
        """Goodbye."""
        _check_node(request.node_id)
        if request.phase not in (pb.NODE_PHASE_AWAY, pb.NODE_PHASE_GONE):
            raise ProtocolError("goodbye: away or gone wanted")
        return await self._coordinator.goodbye(request)

    async def drain(self, request: pb.DrainRequest) -> pb.DrainReply:
        """Drain."""
        _check_node(request.node_id)
        return await self._coordinator.drain(request)

    async def watch_policy(self, request: pb.WatchPolicyRequest) -> AsyncGenerator[pb.Policy, None]:
        """WatchPolicy."""
        _check_node(request.node_id)
        async with aclosing(self._coordinator.policies.watch()) as watch:
            async for policy in watch:
                yield policy

    async def report_restore(self, request: pb.RestoreReport) -> pb.ReportRestoreReply:
        """ReportRestore."""
        _check_node(request.node_id)
        _check_numbers(request.seconds)
        self._coordinator.metrics.restored(request)
        return pb.ReportRestoreReply()

    async def explain(self, request: pb.ExplainRequest) -> pb.ExplainReply:
        """Explain."""
        if request.layers > MAX_EXPLAINED:
            raise ProtocolError(f"{request.layers} layers: at most {MAX_EXPLAINED} wanted")
        if not re.fullmatch(r"([0-9a-f]{2}){0,32}", request.model):
            raise ProtocolError("model: an id of up to 64 hex digits wanted")
        now = self._coordinator.policies
        reply = pb.ExplainReply(policy=now.policy, source=now.source, problem=now.problem)
        if request.node:
            _check_node(request.node)
        model = bytes.fromhex(request.model)
        told = policies.explain(now.policy, model, request.layers, request.node)
        for layer, (codec, why) in enumerate(told):
            reply.layers.add(layer=layer, codec=codec, why=why)
        if request.layers:
            reply.decisions.extend(await self._coordinator.decider.decisions(request.node, model))
        return reply

    async def set_policy(self, request: pb.SetPolicyRequest) -> pb.SetPolicyReply:
        """SetPolicy."""
        if not request.HasField("policy"):
            raise ConfigError("policy", "", "given")
        policy = await self._coordinator.policies.decide(request.policy, "admin")
        return pb.SetPolicyReply(version=policy.version)

    async def members(self, request: pb.MembersRequest) -> pb.MembersReply:
        """Members."""
        reply = pb.MembersReply(
            policy_version=self._coordinator.policies.policy.version,
            version=__version__,
            unix_s=time.time(),
        )
        reply.members.extend(told(*found) for found in self._coordinator.members())
        return reply

    async def leadership(self, request: pb.LeadershipRequest) -> pb.LeadershipReply:
        """Leadership. Standbys answer it too."""
        now = self._coordinator.leadership
        return pb.LeadershipReply(
            role=now.role,
            term=now.term,
            leader=now.leader,
            policy_version=self._coordinator.policies.policy.version,
            version=__version__,
        )

    async def namespaces(self, request: pb.NamespacesRequest) -> pb.NamespacesReply:
        """Namespaces."""
        if request.name:
            check_namespace(request.name)
        reply = pb.NamespacesReply()
        for name, tag in sorted((await self._coordinator.namespaces(request.name)).items()):
            reply.namespaces.add(name=name, tag=tag)
        return reply

    def service(self) -> Service:
        """To be given to `kvferry.cluster.server.start_server`."""

        def count(reason: str) -> None:
            self._coordinator.metrics.refused.labels(reason).inc()

        led = LeaderGate(self._coordinator.leadership)
        handlers = {
            "Register": unary(led.unary(self.register), pb.RegisterRequest, count),
            "Heartbeat": unary(led.unary(self.heartbeat), pb.HeartbeatRequest, count),
            "WatchPolicy": stream(led.stream(self.watch_policy), pb.WatchPolicyRequest, count),
            "ReportRestore": unary(led.unary(self.report_restore), pb.RestoreReport, count),
            "Explain": unary(led.unary(self.explain), pb.ExplainRequest, count),
            "SetPolicy": unary(led.unary(self.set_policy), pb.SetPolicyRequest, count),
            "Members": unary(led.unary(self.members), pb.MembersRequest, count),
            "Leadership": unary(self.leadership, pb.LeadershipRequest, count),
            "Goodbye": unary(led.unary(self.goodbye), pb.GoodbyeRequest, count),
            "Drain": unary(led.unary(self.drain), pb.DrainRequest, count),
            "Namespaces": unary(led.unary(self.namespaces), pb.NamespacesRequest, count),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        return Service(SERVICE, lambda server: server.add_generic_rpc_handlers((generic,)))


def _check_node(node_id: str) -> None:
    if not _NODE_ID.fullmatch(node_id):
        raise ProtocolError(f"node id {node_id[:80]!r}: 1 to 128 characters without spaces wanted")


def _check_shards(shards: Iterable[pb.ShardInfo]) -> None:
    for count, shard in enumerate(shards, start=1):
        if count > MAX_SHARDS:
            raise ProtocolError(f"at most {MAX_SHARDS} shards wanted")
        if len(shard.model_id) != DIGEST_BYTES:
            raise ProtocolError(f"shard: model id of {len(shard.model_id)} bytes, 32 wanted")
        if not 0 <= shard.layer_start < shard.layer_end <= MAX_LAYERS:
            raise ProtocolError(f"shard: layers {shard.layer_start}-{shard.layer_end} are no range")
        heads = shard.head_start, shard.head_end
        if heads != (0, 0) and not 0 <= heads[0] < heads[1] <= MAX_HEADS:
            raise ProtocolError(f"shard: heads {heads[0]}-{heads[1]} are no range")
        if len(shard.curve_id) not in (0, DIGEST_BYTES):
            raise ProtocolError(f"shard: curve id of {len(shard.curve_id)} bytes, 32 wanted")


def _check_numbers(*values: float) -> None:
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ProtocolError("shares, rates and times: finite numbers of at least 0 wanted")


def _figures(link: pb.LinkSample) -> tuple[float, ...]:
    return link.bytes_per_s, link.latency_s, link.age_s


def _names(request: pb.HeartbeatRequest) -> Iterator[str]:
    for link in request.links:
        yield link.to
        yield link.kind


async def start_coordinator(coordinator: Coordinator, settings: CoordinatorSettings) -> Running:
    """Serve an open coordinator; whoever gets the answer stops it.

    Raises: ConfigError for an address that cannot be bound; the coordinator is closed.
    """
    announcement = AsyncExitStack()
    async with AsyncExitStack() as undo:
        undo.push_async_callback(coordinator.aclose)
        server = await start_server(
            [CoordinatorServicer(coordinator).service()],
            [settings.listen],
            credentials=await asyncio.to_thread(Credentials.of, settings),
            allow_remote_plaintext=settings.allow_remote_plaintext,
            on_refused=lambda reason: coordinator.metrics.refused.labels(reason).inc(),
        )
        undo.push_async_callback(server.stop, 0.5)
        await announcement.enter_async_context(
            announced(settings.discovery, "coordinator", server.addresses[0])
        )
        undo.pop_all()
    coordinator.announce(server.addresses[0])
    background = asyncio.ensure_future(coordinator.run())

    async def stop() -> None:
        await announcement.aclose()
        background.cancel()
        await asyncio.wait([background])
        await coordinator.aclose()  # ends the watches, which would hold the server up
        await server.stop()

    return Running(
        addresses=server.addresses,
        stop=stop,
        background=background,
        info={"policy_version": coordinator.policies.policy.version},
    )
