"""From what is known of a cluster to the policy that shall hold. Pure functions.

What is in force stays unless something better by `GAIN` is to be had, as a change of step
means new blobs; only a budget that is not kept any more is mended in any case.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvferry.cluster.optimizer.holder import Holder, Range
from kvferry.cluster.optimizer.ladder import Ints, Ladder, make_ladder
from kvferry.cluster.optimizer.pressure import budget_of, next_tier
from kvferry.cluster.optimizer.problem import Problem, make_problem
from kvferry.cluster.optimizer.rings import Ring, make_rings, mixture
from kvferry.cluster.optimizer.rules import (
    Decided,
    base_of,
    compose,
    digits,
    fixed_bits,
    free_layers,
    runs_of,
    too_many,
)
from kvferry.cluster.optimizer.solve import Plan, plan_of, solve
from kvferry.cluster.optimizer.worth import BreakEven, break_even
from kvferry.proto.v1 import coordinator_pb2 as pb

# A restore that is quicker by less, or by less than anybody notices, is worth no new blobs.
GAIN = 0.1
LEAST_GAIN_S = 0.02
_TOLERANCE = 1e-3
_SHRINKINGS = 6


@dataclass(frozen=True, slots=True)
class Facts:
    """What the coordinator knows.

    Attributes:
        policy: in force.
        holders: model id -> nodes that hold some of it, asleep ones too.
        curves: model id -> its curve.
        absent: (node, model digits) that are not there and shall find their rules when they
            come back; with an empty node, models that nobody holds now.
        memory_used_share: on the fullest node.
    """

    policy: pb.Policy
    holders: Mapping[bytes, Sequence[Holder]]
    curves: Mapping[bytes, pb.ModelCurve]
    absent: frozenset[tuple[str, str]] = frozenset()
    memory_used_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One ring: what holds, the best there is, and what to do about it.

    Attributes:
        now: as coded now.
        best: within the budget.
        gain: share of the deadline that the best would save; 0 where nothing is to change.
        urgent: what holds now does not keep the budget, or is not known.
        worth: whether its restores pay at all.
    """

    ring: Ring
    free: tuple[Range, ...]
    now: Plan
    best: Plan
    gain: float
    urgent: bool
    worth: BreakEven

    @property
    def key(self) -> tuple[bytes, frozenset[str]]:
        """What it is remembered by."""
        return self.ring.model_id, self.ring.names


@dataclass(frozen=True, slots=True)
class Outlook:
    """All rings, and the operator's policy with the tier that pressure asks for.

    Attributes:
        unstored: models that are not stored now, as no restore pays.
        turning: models that should be stored and are not, or the other way round.
    """

    facts: Facts
    base: pb.Policy
    tier: str
    budget: float
    rings: tuple[Judged, ...]
    unstored: frozenset[bytes]
    turning: frozenset[bytes]


def look(facts: Facts) -> Outlook:
    """What there is to decide."""
    base = base_of(facts.policy)
    tier = next_tier(base.switch, facts.policy.tier, facts.memory_used_share)
    tier = tier if base.budget_nats else ""
    budget = budget_of(base, tier)
    decided = Decided.of(facts.policy)
    judged: list[Judged] = []
    for model_id, curve in sorted(facts.curves.items()) if base.budget_nats else ():
        judged += _judge_model(base, decided, model_id, curve, facts.holders, budget)
    models = {ring.ring.model_id for ring in judged}
    unstored = frozenset(model for model in models if digits(model) in decided.unstored)
    turning = frozenset(model for model in models if _turns(model, model in unstored, judged))
    return Outlook(facts, base, tier, budget, tuple(judged), unstored, turning)


def _turns(model: bytes, unstored: bool, judged: Sequence[Judged]) -> bool:
    """What one set of nodes stores, the others may fetch: so all have to do without."""
    worth = [ring.worth for ring in judged if ring.ring.model_id == model]
    if unstored:
        return any(each.from_tokens is not None for each in worth)
    return all(each.hopeless for each in worth)


def _judge_model(
    base: pb.Policy,
    decided: Decided,
    model_id: bytes,
    curve: pb.ModelCurve,
    held: Mapping[bytes, Sequence[Holder]],
    budget: float,
) -> list[Judged]:
    rings = make_rings(model_id, held.get(model_id, ()), curve.model_layers, curve.model_heads)
    free = free_layers(base, model_id, curve.model_layers)
    if not rings or not free:
        return []
    ladder = make_ladder(curve, budget)
    problems = [problem_of(base, ladder, ring, free, budget) for ring in rings]
    plans = solve_together(ladder, rings, problems, free)
    found = [decided.columns(ladder, model_id, ring.holders) for ring in rings]
    now = [
        plan_of(problem, _alike(problem) if columns is None else columns)
        for problem, columns in zip(problems, found, strict=True)
    ]
    most = problems[0].budget * (1 + _TOLERANCE)
    broken = mixture(ladder, list(zip(rings, now, strict=True)), free) > most
    return [
        Judged(
            ring=ring,
            free=tuple(free),
            now=plan,
            best=best,
            gain=_gain(plan, best),
            urgent=broken or columns is None,
            worth=break_even(ring, plan),
        )
        for ring, plan, best, columns in zip(rings, now, plans, found, strict=True)
    ]


def problem_of(
    base: pb.Policy, ladder: Ladder, ring: Ring, free: Sequence[Range], budget: float
) -> Problem:
    """One ring's problem, with what the operator's rules have decided left as it is."""
    model = ring.model_id
    fixed = [fixed_bits(base, ladder, model, holder, free) for holder in ring.holders]
    return make_problem(ladder, ring.holders, budget, free=free, fixed_bits=np.array(fixed))


def solve_together(
    ladder: Ladder, rings: Sequence[Ring], problems: Sequence[Problem], free: Sequence[Range]
) -> list[Plan]:
    """Plans of all rings of a model, whose blobs keep the budget also when they are mixed."""
    budget = problems[0].budget
    share = budget
    plans = _solve_all(problems)
    for _ in range(_SHRINKINGS):
        worst = mixture(ladder, list(zip(rings, plans, strict=True)), free)
        if worst <= budget * (1 + 1e-9) + 1e-15:
            return plans
        share *= 0.98 * budget / worst
        plans = _solve_all([replace(problem, budget=share) for problem in problems])
    return [plan_of(problem, _alike(problem)) for problem in problems]


def _solve_all(problems: Sequence[Problem]) -> list[Plan]:
    """Each problem's plan; sets of like machines are many, and solved once."""
    solved: dict[tuple[bytes, ...], Plan] = {}
    plans = []
    for problem in problems:
        given = (problem.share, problem.bandwidth, problem.waits, problem.fixed_bits)
        key = tuple(array.tobytes() for array in given)
        if key not in solved:
            solved[key] = solve(problem)
        plans.append(solved[key])
    return plans


def _alike(problem: Problem) -> Ints:
    return np.full(problem.share.shape, problem.ladder.alike)


def _gain(now: Plan, best: Plan) -> float:
    saved = now.deadline - best.deadline
    return saved / now.deadline if saved >= max(LEAST_GAIN_S, GAIN * now.deadline) else 0.0


def decide(
    outlook: Outlook, changing: Sequence[Judged], turning: Collection[bytes] = ()
) -> pb.Policy:
    """The policy that holds with the best plans of ``changing``; all else stays.

    Args:
        turning: models that are stored from now on where they were not, and not where they were.

    Rules of nodes that neither hold the model now nor are absent are left out.
    """
    facts = outlook.facts
    old = Decided.of(facts.policy)
    kept = facts.absent | keys_of(facts.holders)
    runs = {key: held for key, held in old.runs.items() if key in kept}
    unstored = old.unstored & {model for _, model in kept}
    unstored ^= {digits(model) for model in turning}
    if not outlook.base.budget_nats:
        runs, unstored = {}, frozenset()
    for ring in changing:
        for holder, columns in zip(ring.ring.holders, ring.best.choice, strict=True):
            key = holder.node_id, digits(ring.ring.model_id)
            runs[key] = runs_of(ring.best.problem.ladder, holder, columns, ring.free)
    made = compose(outlook.base, Decided(runs, unstored), outlook.tier, outlook.budget)
    if too_many(made):
        return compose(outlook.base, Decided(unstored=unstored), outlook.tier, outlook.budget)
    return made


def keys_of(holders: Mapping[bytes, Sequence[Holder]]) -> frozenset[tuple[str, str]]:
    """(node, model digits) of all that hold something."""
    return frozenset((h.node_id, digits(model)) for model, held in holders.items() for h in held)


def with_rings_of_change(outlook: Outlook, changing: Sequence[Judged]) -> list[Judged]:
    """``changing``, and the other rings of a model where a mixture would break the budget."""
    wanted = {ring.key for ring in changing}
    for model in {ring.ring.model_id for ring in changing}:
        rings = [ring for ring in outlook.rings if ring.ring.model_id == model]
        plans = [(r.ring, r.best if r.key in wanted else r.now) for r in rings]
        worst = mixture(rings[0].now.problem.ladder, plans, rings[0].free)
        if worst > rings[0].now.problem.budget * (1 + _TOLERANCE):
            wanted |= {ring.key for ring in rings}
    return [ring for ring in outlook.rings if ring.key in wanted]
