"""The coordinator's optimizer at work: sees the members, decides, and says why.

Everything here is soft state. What was decided is in the policy itself, so that a
coordinator that starts anew goes on from it once its members have told their shards again.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from kvferry.cluster.curves import CurveBook
from kvferry.cluster.optimizer.decide import Facts, Outlook, keys_of
from kvferry.cluster.optimizer.deliberate import Deliberation
from kvferry.cluster.optimizer.explain import explain_rings
from kvferry.cluster.optimizer.holder import Holder
from kvferry.cluster.optimizer.rules import Decided
from kvferry.cluster.optimizer.worth import ITSELF
from kvferry.cluster.policy_keeper import PolicyKeeper
from kvferry.cluster.state import MemberState
from kvferry.errors import FerryError
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MOST_SHARE = 0.05  # of one core, where a look takes long
# A node that is gone, or has let go of a model, finds its rules again for so long.
KEEP_ABSENT_S = 86_400.0
STORE = "store"
Members = Iterable[tuple[MemberState, str, float]]


class PolicyDecider:
    """Re-decides when members, links, curves or memory pressure changed. On one event loop."""

    def __init__(
        self,
        keeper: PolicyKeeper,
        members: Callable[[], Members],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``members`` gives all that are known, how present, and seconds since then."""
        self._keeper, self._members, self._clock = keeper, members, clock
        self._curves = CurveBook(clock)
        self._next_s = -math.inf
        self._seen: object = None
        self._deliberation = Deliberation()
        self._absent: dict[tuple[str, str], float] = {}
        self._outlook: Outlook | None = None
        self._problem = ""

    # -- curves -------------------------------------------------------------------

    def told(self, request: pb.HeartbeatRequest) -> list[bytes]:
        """Take in a heartbeat's curves; ids of those to ask its node for."""
        self._curves.learn(request.curves)
        return self._curves.wanted(request.shards)

    # -- decisions ----------------------------------------------------------------

    async def look(self) -> None:
        """Decide, where it is time and something changed; what fails is tried again."""
        now = self._clock()
        if now < self._next_s:
            return
        self._next_s = now + LOOK_EVERY_S
        facts = self._facts(list(self._members()), now)
        seen = _signature(facts)
        if seen == self._seen and not self._deliberation.pending:
            return
        self._seen = seen
        self._outlook, policy = await asyncio.to_thread(self._deliberation.look, facts)
        took = self._clock() - now
        self._next_s = now + max(LOOK_EVERY_S, took / MOST_SHARE)
        if policy == facts.policy:
            return
        try:
            await self._keeper.decide(policy, "optimizer", based_on=facts.policy.version)
        except FerryError as exc:
            self._seen = None
            if str(exc) != self._problem:
                log.warning("the optimizer's policy is not in force: %s", exc)
            self._problem = str(exc)
        else:
            self._problem = ""

    async def decisions(self, node: str = "", model: bytes = b"") -> list[pb.Decision]:
        """Why things are as they are; empty where no model has a curve. See `explain_rings`."""
        if self._outlook is None:
            return []
        return await asyncio.to_thread(explain_rings, self._outlook, node, model)

    # -- what is known ------------------------------------------------------------

    def _facts(self, members: Sequence[tuple[MemberState, str, float]], now: float) -> Facts:
        found: dict[bytes, list[tuple[MemberState, str, Holder]]] = {}
        curves: dict[bytes, pb.ModelCurve] = {}
        for member, presence, _ in members:
            if presence != "gone":
                for model_id, holder in self._held(member, curves):
                    found.setdefault(model_id, []).append((member, presence, holder))
        holders = {model: with_peers(held) for model, held in found.items()}
        policy = self._keeper.policy
        decided, there = Decided.of(policy), keys_of(holders)
        missing = decided.runs.keys() - there
        missing |= {("", model) for model in decided.unstored - {model for _, model in there}}
        self._absent = {key: self._absent.get(key, now) for key in missing}
        absent = frozenset(key for key, at in self._absent.items() if now - at < KEEP_ABSENT_S)
        awake = [m.vitals.memory_used_share for m, presence, _ in members if presence == "ready"]
        fullest = math.floor(100 * max(awake, default=0.0)) / 100
        return Facts(policy, holders, curves, absent, fullest)

    def _held(
        self, member: MemberState, curves: dict[bytes, pb.ModelCurve]
    ) -> list[tuple[bytes, Holder]]:
        parts: dict[bytes, set[tuple[tuple[int, int], tuple[int, int]]]] = {}
        for shard in member.shards:
            curve = self._curves.get(shard.curve_id) if shard.curve_id else None
            if curve is None or curve.model_id != shard.model_id:
                continue
            known = curves.setdefault(shard.model_id, curve)
            heads = shard.heads if shard.heads[1] else (0, known.model_heads)
            if shard.layers[1] <= known.model_layers and heads[1] <= known.model_heads:
                parts.setdefault(shard.model_id, set()).add((shard.layers, heads))
        link = member.links.get(STORE)
        return [
            (
                model_id,
                Holder(
                    node_id=member.node_id,
                    parts=tuple(sorted(held)),
                    bytes_per_s=_rounded(link.bytes_per_s) if link else 0.0,
                    latency_s=_rounded(link.latency_s) if link else 0.0,
                    decode_tokens_per_s=_rounded(member.vitals.decode_tokens_per_s),
                    prefill_tokens_per_s=_rounded(member.vitals.prefill_tokens_per_s),
                    decode_values_per_s=tuple(
                        (codec, _rounded(rate))
                        for codec, rate in sorted(member.vitals.decode_values_per_s.items())
                    ),
                    nearer=_itself(member.vitals.near_bytes_per_s),
                ),
            )
            for model_id, held in sorted(parts.items())
        ]


def _itself(bytes_per_s: float) -> tuple[tuple[str, float], ...]:
    return ((ITSELF, _rounded(bytes_per_s)),) if bytes_per_s > 0 else ()


def with_peers(held: Sequence[tuple[MemberState, str, Holder]]) -> list[Holder]:
    """Holders of one model, each with the quickest link to a node that holds its part too."""
    made = []
    for member, _, holder in held:
        peers = [
            (other.node_id, _rounded(member.links[other.node_id].bytes_per_s))
            for _, presence, other in held
            if presence == "ready" and other.node_id in member.links and _holds(other, holder)
        ]
        best = max(peers, key=lambda peer: peer[1], default=("", 0.0))
        made.append(replace(holder, nearer=(*holder.nearer, best)) if best[1] > 0 else holder)
    return made


def _holds(other: Holder, holder: Holder) -> bool:
    """Whether another node holds all that a node does."""
    return other.node_id != holder.node_id and all(
        any(
            a <= layers[0] and layers[1] <= b and c <= heads[0] and heads[1] <= d
            for (a, b), (c, d) in other.parts
        )
        for layers, heads in holder.parts
    )


def _signature(facts: Facts) -> object:
    holders = tuple((model, tuple(held)) for model, held in sorted(facts.holders.items()))
    curves = tuple(sorted(facts.curves))
    return facts.policy.version, holders, curves, facts.absent, facts.memory_used_share


def _rounded(value: float) -> float:
    """To two digits: what noise moves beyond them is nothing to decide anew for."""
    return float(f"{value:.2g}")
