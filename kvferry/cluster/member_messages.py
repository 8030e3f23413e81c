"""Members as messages: what the coordinator tells of them, and what it takes of exo's state."""

from kvferry.cluster import state as states
from kvferry.errors import ProtocolError
from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_EXO_ENTRIES = 4096
MAX_EXO_BYTES = 1 << 20


def told(member: states.MemberState, presence: states.Presence, age_s: float) -> pb.Member:
    """One member, seen ``age_s`` seconds ago."""
    return pb.Member(
        node_id=member.node_id,
        incarnation=member.incarnation,
        address=member.address,
        state=presence,
        seconds_since_heartbeat=age_s,
        last=_last(member, age_s),
        version=member.version,
        drained=member.drained,
    )


def _last(member: states.MemberState, age_s: float) -> pb.HeartbeatRequest:
    """Its last heartbeat; ages of measurements go on."""
    vitals = member.vitals
    now_s = member.seen_s + age_s
    return pb.HeartbeatRequest(
        node_id=member.node_id,
        incarnation=member.incarnation,
        memory_used_share=vitals.memory_used_share,
        free_disk_bytes=vitals.free_disk_bytes,
        prefill_tokens_per_s=vitals.prefill_tokens_per_s,
        decode_tokens_per_s=vitals.decode_tokens_per_s,
        links=[
            pb.LinkSample(
                to=to,
                bytes_per_s=link.bytes_per_s,
                latency_s=link.latency_s,
                kind=link.kind,
                age_s=now_s - link.measured_s if link.measured_s else 0.0,
                probed=link.probed,
            )
            for to, link in member.links.items()
        ],
        shards=[
            pb.ShardInfo(
                model_id=shard.model_id,
                layer_start=shard.layers[0],
                layer_end=shard.layers[1],
                head_start=shard.heads[0],
                head_end=shard.heads[1],
                curve_id=shard.curve_id,
            )
            for shard in member.shards
        ],
        policy_version=vitals.policy_version,
        counters=vitals.counters,
        decode_values_per_s=vitals.decode_values_per_s,
        near_bytes_per_s=vitals.near_bytes_per_s,
        exo=member.exo,
    )


def check_exo(state: pb.ExoState) -> None:
    """Whether what a node says of exo is of a size to be kept. Raises: ProtocolError."""
    entries = len(state.nodes) + len(state.shards) + len(state.links)
    if entries > MAX_EXO_ENTRIES or state.ByteSize() > MAX_EXO_BYTES:
        raise ProtocolError(
            f"exo's state: at most {MAX_EXO_ENTRIES} entries and {MAX_EXO_BYTES:,} bytes wanted"
        )
