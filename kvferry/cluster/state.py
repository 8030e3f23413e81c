"""Who is in the cluster: ``apply(state, event) -> state``, nothing else changes it.

Soft state. Nodes tell it again after a restart of the coordinator. A node speaks through
its latest incarnation only: what an older start of it still sends is refused. Within an
incarnation messages are numbered, and one that comes late changes nothing.

How a member stands::

    (unknown) --registers--> joining --beats, ready--> ready <--beats-- away
    joining, ready --the operator drains it--> draining --he takes it back--> joining
    any --says that it sleeps--> away        any --says that it ends--> gone
    gone, and all others --registers--> joining, or draining where the order stands

Silence does the rest (`presence`): away, and in the end gone, until it is heard again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kvferry.cluster.member_state import (
    PRESENCES,
    ClusterState,
    Link,
    MemberState,
    Presence,
    Shard,
    Vitals,
    presence,
)
from kvferry.errors import ConfigError, FencedError, QueueFullError
from kvferry.proto.v1 import coordinator_pb2 as pb

__all__ = [
    "MAX_MEMBERS",
    "PRESENCES",
    "Beat",
    "ClusterState",
    "DrainAsked",
    "Event",
    "Left",
    "Link",
    "MemberState",
    "Presence",
    "Registered",
    "Shard",
    "Swept",
    "Vitals",
    "apply",
    "is_known",
    "presence",
]

MAX_MEMBERS = 4096
_USABLE = (pb.NODE_PHASE_UNSPECIFIED, pb.NODE_PHASE_READY)
_LEFT: Mapping[int, Presence] = {pb.NODE_PHASE_AWAY: "away", pb.NODE_PHASE_GONE: "gone"}


@dataclass(frozen=True, slots=True)
class Registered:
    """A node (re-)joined. All of its earlier soft state is void, but an order to drain."""

    request: pb.RegisterRequest
    at_s: float


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat."""

    request: pb.HeartbeatRequest
    at_s: float


@dataclass(frozen=True, slots=True)
class Left:
    """A node said that it goes: to sleep, or for good."""

    request: pb.GoodbyeRequest
    at_s: float


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The operator wants a node drained, or (``undo``) back at work."""

    node_id: str
    undo: bool = False


@dataclass(frozen=True, slots=True)
class Swept:
    """Members not seen for ``forget_after_s`` are forgotten."""

    at_s: float
    forget_after_s: float


Event = Registered | Beat | Left | DrainAsked | Swept


def apply(state: ClusterState, event: Event) -> ClusterState:
    """The state after ``event``.

    A heartbeat of a node (or of an incarnation) that never registered changes nothing:
    ask `is_known` whether the node has to register.

    Raises: FencedError for an older incarnation; QueueFullError beyond `MAX_MEMBERS`;
        ConfigError for an order to a node that is not there.
    """
    match event:
        case Registered():
            return _register(state, event)
        case Beat():
            return _beat(state, event)
        case Left():
            return _leave(state, event)
        case DrainAsked():
            return _drain(state, event)
        case Swept():
            return _sweep(state, event)


def is_known(state: ClusterState, node_id: str, incarnation: int) -> bool:
    """Whether exactly this start of the node has registered, and has not ended."""
    member = state.members.get(node_id)
    return member is not None and member.incarnation == incarnation and member.said != "gone"


def _fence(state: ClusterState, node_id: str, incarnation: int) -> None:
    member = state.members.get(node_id)
    if member is not None and incarnation < member.incarnation:
        raise FencedError(
            f"node {node_id!r} has been started again since (incarnation {member.incarnation}, "
            f"this is {incarnation}): stop this one, or give it another node_id"
        )


def _heard(
    state: ClusterState, request: pb.HeartbeatRequest | pb.GoodbyeRequest
) -> MemberState | None:
    """The member whose message is to be taken; None: it is not known, or the message late."""
    _fence(state, request.node_id, request.incarnation)
    if not is_known(state, request.node_id, request.incarnation):
        return None
    member = state.members[request.node_id]
    return None if 0 < request.sequence <= member.sequence else member


def _shards(shards: Iterable[pb.ShardInfo]) -> tuple[Shard, ...]:
    return tuple(
        Shard(s.model_id, (s.layer_start, s.layer_end), (s.head_start, s.head_end), s.curve_id)
        for s in shards
    )


def _with(state: ClusterState, member: MemberState) -> ClusterState:
    return ClusterState({**state.members, member.node_id: member})


def _register(state: ClusterState, event: Registered) -> ClusterState:
    request = event.request
    _fence(state, request.node_id, request.incarnation)
    old = state.members.get(request.node_id)
    if old is None and len(state.members) >= MAX_MEMBERS:
        raise QueueFullError("members", MAX_MEMBERS)
    # A daemon that was started again is back at work; the same one is not.
    same = old is not None and old.incarnation == request.incarnation
    drain = request.draining or (same and old is not None and old.drain)
    member = MemberState(
        node_id=request.node_id,
        incarnation=request.incarnation,
        address=request.address,
        version=request.version,
        seen_s=event.at_s,
        said="draining" if drain else "joining",
        sequence=old.sequence if same and old is not None else 0,
        drain=drain,
        shards=_shards(request.shards),
        vitals=Vitals(policy_version=request.policy_version),
    )
    return _with(state, member)


def _beat(state: ClusterState, event: Beat) -> ClusterState:
    request = event.request
    member = _heard(state, request)
    if member is None:
        return state
    vitals = Vitals(
        memory_used_share=request.memory_used_share,
        free_disk_bytes=request.free_disk_bytes,
        prefill_tokens_per_s=request.prefill_tokens_per_s,
        decode_tokens_per_s=request.decode_tokens_per_s,
        policy_version=request.policy_version,
        counters=dict(request.counters),
        decode_values_per_s=dict(request.decode_values_per_s),
        near_bytes_per_s=request.near_bytes_per_s,
    )
    usable = request.phase in _USABLE
    told = request.exo if request.HasField("exo") else None
    return _with(
        state,
        replace(
            member,
            seen_s=event.at_s,
            said="draining" if member.drain else "ready" if usable else "joining",
            sequence=request.sequence or member.sequence,
            drained=member.drain and request.drained,
            shards=_shards(request.shards),
            links=_links(state, member, event),
            vitals=vitals,
            exo=member.exo if told is None else told if told.reachable else None,
        ),
    )


def _links(state: ClusterState, member: MemberState, event: Beat) -> dict[str, Link]:
    """What was measured now, and before of links to members that still are."""
    kept = {to: link for to, link in member.links.items() if to == "store" or to in state.members}
    for link in event.request.links:
        kept[link.to] = Link(
            link.bytes_per_s,
            link.latency_s,
            link.kind,
            event.at_s - link.age_s if link.age_s else 0.0,
            link.probed,
        )
    return kept


def _leave(state: ClusterState, event: Left) -> ClusterState:
    request = event.request
    member = _heard(state, request)
    if member is None:
        return state
    return _with(
        state,
        replace(
            member,
            seen_s=event.at_s,
            said=_LEFT.get(request.phase, "away"),
            sequence=request.sequence or member.sequence,
        ),
    )


def _drain(state: ClusterState, event: DrainAsked) -> ClusterState:
    member = state.members.get(event.node_id)
    if member is None:
        names = ", ".join(sorted(state.members)[:8]) or "there is none yet"
        raise ConfigError("node", event.node_id, f"the name of a member ({names})")
    if member.drain != event.undo:  # as it is already
        return state
    here = member.said not in ("away", "gone")
    said: Presence = member.said if not here else "joining" if event.undo else "draining"
    return _with(state, replace(member, drain=not event.undo, drained=False, said=said))


def _sweep(state: ClusterState, event: Swept) -> ClusterState:
    limit = event.at_s - event.forget_after_s
    kept = {name: m for name, m in state.members.items() if m.seen_s >= limit}
    return state if len(kept) == len(state.members) else ClusterState(kept)
