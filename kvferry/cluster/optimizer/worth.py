"""Whether restores of a model pay: the break-even of design section 10.

A restore of t tokens takes ``latency + t * each`` on the slowest node, prefill
``t / prefill rate``. Where ``each`` is no less than prefill takes a token, no length pays.

Here a node's part comes from the best place that may have it: its own tiers, a node that
holds the same layers, the store. For nothing is stored any more where this says so, which
has to be right for those too who never ask the store; and a node whose own tiers nobody has
measured may have it at once. Nodes decide in the same way, offer by offer
(`kvferry.node.hooks.worth`).

The deadline that the steps are chosen for counts the store alone: it is the one place that
has every page. Which pages a peer holds is not known when a policy is made, a peer may be
asleep when they are wanted, and with its own copies counted a node would be right to hold
everything exactly.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from kvferry.cluster.optimizer.holder import Holder
from kvferry.cluster.optimizer.ladder import Floats
from kvferry.cluster.optimizer.problem import Problem
from kvferry.cluster.optimizer.rings import Ring
from kvferry.cluster.optimizer.solve import Plan, solve

# As `kvferry.node.hooks.worth` has it: rates move by so much from one request to the next.
MARGIN = 1.2
ITSELF = "itself"
_AT_ONCE = 1e15  # bytes per second


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Restores of one set of nodes against its prefill.

    Attributes:
        prefill_s: of a token; 0: not known, and then restores are taken to pay.
        each_s: of a token restored, on the slowest node, beyond latency.
        from_tokens: a restore of fewer takes longer than prefill; 0: not known; None: all do.
        hopeless: that is so by more than rates move, whatever is not known.
    """

    prefill_s: float
    each_s: float
    from_tokens: int | None
    hopeless: bool = False


def best_source(holder: Holder) -> tuple[str, float]:
    """The quickest place that may have a node's part, and its bytes per second; 0: unknown."""
    known = [("store", holder.bytes_per_s), *holder.nearer]
    return max(known, key=lambda source: source[1])


def break_even(ring: Ring, plan: Plan) -> BreakEven:
    """By ``plan``, and where that does not pay by the one whose restores are the quickest."""
    holders = ring.holders
    rates = [h.prefill_tokens_per_s for h in holders if h.prefill_tokens_per_s > 0]
    sources = np.array([best_source(holder)[1] for holder in holders])
    if not rates or not sources.all():
        return BreakEven(1 / min(rates) if rates else 0.0, 0.0, 0)
    prefill = 1 / min(rates)
    nearest = _from(plan.problem, ring, sources)
    each = nearest.seconds(nearest.cost_of(plan.choice)) / nearest.tokens
    if each.max() >= prefill:
        best = solve(nearest)
        if best.bound / nearest.tokens >= prefill:
            told = np.array([_told(holder) for holder in holders])
            if not told.all():
                best = solve(_from(plan.problem, ring, np.where(told, sources, _AT_ONCE)))
            hopeless = best.bound / nearest.tokens > MARGIN * prefill
            return BreakEven(prefill, float(each.max()), None, hopeless)
        each = best.seconds / nearest.tokens
    latency = np.array([_latency(holder) for holder in holders])
    return BreakEven(prefill, float(each.max()), _from_tokens(latency, each, prefill))


def _told(holder: Holder) -> bool:
    """Whether it is known how long its own tiers and the store take."""
    return holder.bytes_per_s > 0 and any(name == ITSELF for name, _ in holder.nearer)


def _from(problem: Problem, ring: Ring, bytes_per_s: Floats) -> Problem:
    """The same without latency, over other links."""
    stored = np.array([holder.latency_s for holder in ring.holders])
    return replace(problem, bandwidth=8 * bytes_per_s, waits=problem.waits - stored)


def _latency(holder: Holder) -> float:
    return 0.0 if best_source(holder)[0] == ITSELF else holder.latency_s


def _from_tokens(latency: Floats, each: Floats, prefill: float) -> int:
    return max(1, math.ceil(float((latency / (prefill - each)).max())))
