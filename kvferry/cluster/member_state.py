"""What is known of one member, and what its silence means."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvferry.proto.v1 import coordinator_pb2 as pb

Presence = Literal["joining", "ready", "away", "draining", "gone"]
PRESENCES: tuple[Presence, ...] = ("joining", "ready", "away", "draining", "gone")


@dataclass(frozen=True, slots=True)
class Shard:
    """Layers (absolute, half-open) of a model that a node holds, of heads (0, 0): all."""

    model_id: bytes
    layers: tuple[int, int]
    heads: tuple[int, int] = (0, 0)
    curve_id: bytes = b""


@dataclass(frozen=True, slots=True)
class Link:
    """The last measurement from a node to another one or to "store".

    Attributes:
        kind: "loopback", "thunderbolt", "ethernet", "wifi", ...; empty: not told.
        measured_s: the coordinator's clock when bandwidth was measured; 0: never told.
        probed: measured by a probe, not by a blob.
    """

    bytes_per_s: float
    latency_s: float
    kind: str = ""
    measured_s: float = 0.0
    probed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """What the last heartbeat said."""

    memory_used_share: float = 0.0
    free_disk_bytes: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    policy_version: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    decode_values_per_s: Mapping[str, float] = field(default_factory=dict)
    near_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberState:
    """One node.

    Attributes:
        seen_s: the clock's reading at its last sign of life.
        said: how it stood when it was last heard of; `presence` adds what silence means.
        sequence: of the last message taken from this incarnation.
        drain: the operator wants it to hand over and take nothing new.
        drained: it has.
        exo: what exo's API on its machine says; not to be changed.
    """

    node_id: str
    incarnation: int
    address: str
    version: str
    seen_s: float
    said: Presence = "joining"
    sequence: int = 0
    drain: bool = False
    drained: bool = False
    shards: tuple[Shard, ...] = ()
    links: Mapping[str, Link] = field(default_factory=dict)
    vitals: Vitals = Vitals()
    exo: pb.ExoState | None = None


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All members by node id."""

    members: Mapping[str, MemberState] = field(default_factory=dict)


def presence(
    member: MemberState, now_s: float, away_after_s: float, gone_after_s: float
) -> Presence:
    """What a member said, and what its silence since then means.

    Laptops sleep: away is a normal state, and one that said so is not given up.
    """
    age = now_s - member.seen_s
    if member.said in ("away", "gone") or age < away_after_s:
        return member.said
    return "away" if age < gone_after_s else "gone"
