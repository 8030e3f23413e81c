"""Who is in the cluster: ``apply(state, event) -> state``, nothing else changes it.

Soft state. Nodes tell it again after a restart of the coordinator. A node speaks through
its latest incarnation only: what an older start of it still sends is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from kvferry.errors import FencedError, QueueFullError
from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_MEMBERS = 4096

Presence = Literal["ready", "away", "gone"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Layers (absolute, half-open) of a model that a node holds."""

    model_id: bytes
    layers: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Link:
    """The last measurement from a node to another one or to "store"."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """What the last heartbeat said."""

    memory_used_share: float = 0.0
    free_disk_bytes: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    policy_version: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberState:
    """One node. ``seen_s`` is the clock's reading at its last sign of life."""

    node_id: str
    incarnation: int
    address: str
    version: str
    seen_s: float
    shards: tuple[Shard, ...] = ()
    links: Mapping[str, Link] = field(default_factory=dict)
    vitals: Vitals = Vitals()


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All members by node id."""

    members: Mapping[str, MemberState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Registered:
    """A node (re-)joined. All of its earlier soft state is void."""

    request: pb.RegisterRequest
    at_s: float


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat."""

    request: pb.HeartbeatRequest
    at_s: float


@dataclass(frozen=True, slots=True)
class Swept:
    """Members not seen for ``forget_after_s`` are forgotten."""

    at_s: float
    forget_after_s: float


Event = Registered | Beat | Swept


def apply(state: ClusterState, event: Event) -> ClusterState:
    """The state after ``event``.

    A heartbeat of a node (or of an incarnation) that never registered changes nothing:
    ask `is_known` whether the node has to register.

    Raises: FencedError for an older incarnation; QueueFullError beyond `MAX_MEMBERS`.
    """
    match event:
        case Registered():
            return _register(state, event)
        case Beat():
            return _beat(state, event)
        case Swept():
            return _sweep(state, event)


def is_known(state: ClusterState, node_id: str, incarnation: int) -> bool:
    """Whether exactly this start of the node has registered."""
    member = state.members.get(node_id)
    return member is not None and member.incarnation == incarnation


def presence(
    member: MemberState, now_s: float, away_after_s: float, gone_after_s: float
) -> Presence:
    """By the age of the last sign of life. Laptops sleep: away is a normal state."""
    age = now_s - member.seen_s
    if age < away_after_s:
        return "ready"
    return "away" if age < gone_after_s else "gone"


def _fence(state: ClusterState, node_id: str, incarnation: int) -> None:
    member = state.members.get(node_id)
    if member is not None and incarnation < member.incarnation:
        raise FencedError(
            f"node {node_id!r} has been started again since (incarnation {member.incarnation}, "
            f"this is {incarnation}): stop this one, or give it another node_id"
        )


def _shards(shards: Iterable[pb.ShardInfo]) -> tuple[Shard, ...]:
    return tuple(Shard(s.model_id, (s.layer_start, s.layer_end)) for s in shards)


def _with(state: ClusterState, member: MemberState) -> ClusterState:
    return ClusterState({**state.members, member.node_id: member})


def _register(state: ClusterState, event: Registered) -> ClusterState:
    request = event.request
    _fence(state, request.node_id, request.incarnation)
    if request.node_id not in state.members and len(state.members) >= MAX_MEMBERS:
        raise QueueFullError("members", MAX_MEMBERS)
    member = MemberState(
        node_id=request.node_id,
        incarnation=request.incarnation,
        address=request.address,
        version=request.version,
        seen_s=event.at_s,
        shards=_shards(request.shards),
        vitals=Vitals(policy_version=request.policy_version),
    )
    return _with(state, member)


def _beat(state: ClusterState, event: Beat) -> ClusterState:
    request = event.request
    _fence(state, request.node_id, request.incarnation)
    if not is_known(state, request.node_id, request.incarnation):
        return state
    member = state.members[request.node_id]
    vitals = Vitals(
        memory_used_share=request.memory_used_share,
        free_disk_bytes=request.free_disk_bytes,
        prefill_tokens_per_s=request.prefill_tokens_per_s,
        decode_tokens_per_s=request.decode_tokens_per_s,
        policy_version=request.policy_version,
        counters=dict(request.counters),
    )
    measured = {link.to: Link(link.bytes_per_s, link.latency_s) for link in request.links}
    return _with(
        state,
        replace(
            member,
            seen_s=event.at_s,
            shards=_shards(request.shards),
            links={**member.links, **measured},
            vitals=vitals,
        ),
    )


def _sweep(state: ClusterState, event: Swept) -> ClusterState:
    limit = event.at_s - event.forget_after_s
    kept = {name: m for name, m in state.members.items() if m.seen_s >= limit}
    return state if len(kept) == len(state.members) else ClusterState(kept)
