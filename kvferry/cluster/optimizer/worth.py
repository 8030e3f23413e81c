"""Whether restores of a model pay: the break-even of design section 10.

A restore of t tokens takes ``latency + t * each`` on the slowest node, prefill
``t / prefill rate``. Where ``each`` is no less than prefill takes a token, no length pays.

Here a node's part comes from the best place that may have it: its own tiers, a node that
holds the same layers, the store. For nothing is stored any more where this says so, which
has to be right for those too who never ask the store. The deadline that the steps are chosen
for counts the store alone: it is the one place that has every page. Which pages a peer holds
is not known when a policy is made, a peer may be asleep when they are wanted, and with its
own copies counted a node would be right to hold everything exactly.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from kvferry.cluster.optimizer.holder import Holder
from kvferry.cluster.optimizer.ladder import Floats
from kvferry.cluster.optimizer.rings import Ring
from kvferry.cluster.optimizer.solve import Plan, solve

# As `kvferry.node.hooks.worth` has it: rates move by so much from one request to the next.
MARGIN = 1.2


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Restores of one set of nodes against its prefill.

    Attributes:
        prefill_s: of a token; 0: not known, and then restores are taken to pay.
        each_s: of a token restored, on the slowest node, beyond latency.
        from_tokens: a restore of fewer takes longer than prefill; 0: not known; None: all do.
    """

    prefill_s: float
    each_s: float
    from_tokens: int | None

    @property
    def hopeless(self) -> bool:
        """Whether no restore pays, by more than rates move."""
        return self.from_tokens is None and self.each_s > MARGIN * self.prefill_s


def best_source(holder: Holder) -> tuple[str, float]:
    """The quickest place that may have a node's part, and its bytes per second; 0: unknown."""
    known = [("store", holder.bytes_per_s), *holder.nearer]
    return max(known, key=lambda source: source[1])


def break_even(ring: Ring, plan: Plan) -> BreakEven:
    """By ``plan``, and where that does not pay by the one whose restores are the quickest."""
    rates = [h.prefill_tokens_per_s for h in ring.holders if h.prefill_tokens_per_s > 0]
    sources = np.array([best_source(holder)[1] for holder in ring.holders])
    if not rates or not sources.all():
        return BreakEven(1 / min(rates) if rates else 0.0, 0.0, 0)
    latency = np.array([_latency(holder) for holder in ring.holders])
    problem, prefill = plan.problem, 1 / min(rates)
    stored = np.array([holder.latency_s for holder in ring.holders])
    nearest = replace(problem, bandwidth=8 * sources, waits=problem.waits - stored)
    each = nearest.seconds(nearest.cost_of(plan.choice)) / problem.tokens
    if each.max() >= prefill:
        best = solve(nearest)
        each = best.seconds / problem.tokens
        if best.bound / problem.tokens >= prefill:
            return BreakEven(prefill, best.bound / problem.tokens, None)
    return BreakEven(prefill, float(each.max()), _from_tokens(latency, each, prefill))


def _latency(holder: Holder) -> float:
    return 0.0 if best_source(holder)[0] == "itself" else holder.latency_s


def _from_tokens(latency: Floats, each: Floats, prefill: float) -> int:
    return max(1, math.ceil(float((latency / (prefill - each)).max())))
