"""Which tier memory pressure asks for: marks with hysteresis."""

from collections.abc import Mapping

from kvferry.proto.v1 import coordinator_pb2 as pb

# KL budgets in nats (design section 10), from fine to coarse.
TIER_BUDGETS: Mapping[str, float] = {
    "default": 0.005,
    "high_compression": 0.02,
    "memory_emergency": 0.1,
}
EMERGENCY = "memory_emergency"
SWITCHED = ("high_compression", EMERGENCY)


def next_tier(marks: pb.PressureSwitch, tier: str, used_share: float) -> str:
    """The tier from now on; empty: none.

    Args:
        tier: until now.
        used_share: of memory, on the fullest node.
    """
    held = ""
    for name in SWITCHED:
        mark = getattr(marks, name)
        if not mark:
            continue
        # Once in a tier, it or a finer one is left only well below its mark.
        reached = SWITCHED.index(name) <= SWITCHED.index(tier) if tier else False
        if used_share >= mark - (marks.hysteresis if reached else 0.0):
            held = name
    return held


def budget_of(base: pb.Policy, tier: str) -> float:
    """Nats that may be spent: a tier never has less than the operator's own budget."""
    return max(base.budget_nats, TIER_BUDGETS.get(tier, 0.0))
