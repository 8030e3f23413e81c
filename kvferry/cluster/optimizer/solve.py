"""The least deadline that the budget allows, by bisection; and what to choose for it."""

from dataclasses import dataclass

import numpy as np

from kvferry.cluster.optimizer.frontier import make_frontier
from kvferry.cluster.optimizer.ladder import Floats, Ints
from kvferry.cluster.optimizer.problem import Problem

# No node spends more bits per value than so many times the scarcest one.
SPREAD = 4.0
_HALVINGS = 48


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A solution.

    Attributes:
        problem: of which.
        choice: (nodes, groups) columns of the ladder; without meaning where a node holds
            nothing of a group.
        bits: (nodes,) a token, without fixed layers.
        seconds: (nodes,) of a restore.
        kl: nats, of all.
        bound: the least deadline that could be promised; ``seconds`` lie within it, a little
            where choices are few.
    """

    problem: Problem
    choice: Ints
    bits: Floats
    seconds: Floats
    kl: float
    bound: float

    @property
    def deadline(self) -> float:
        """Seconds until the slowest node has its part."""
        return float(self.seconds.max())


def plan_of(problem: Problem, choice: Ints, bound: float = 0.0) -> Plan:
    """What a choice comes to."""
    bits = problem.bits_of(choice)
    seconds = problem.seconds(problem.cost_of(choice))
    kl = problem.kl_of(choice)
    return Plan(problem, choice, bits, seconds, kl, max(bound, float(seconds.max())))


def solve(problem: Problem, spread: float = SPREAD) -> Plan:
    """The choice with the least deadline within the budget. See the package."""
    frontier = make_frontier(problem)
    low = float(problem.seconds(frontier.cost[:, 0]).max())
    finest = np.where(np.isfinite(frontier.cost), frontier.cost, 0.0).max(axis=1)
    high = float(problem.seconds(finest).max())

    def reached(deadline: float) -> Ints:
        cost = (deadline - problem.waits) * problem.bandwidth / problem.tokens
        return frontier.within(cost - problem.fixed_bits, spread)

    def kept(deadline: float) -> bool:
        kl = frontier.kl_at(reached(deadline))
        return kl <= problem.budget * (1 + 1e-9) + 1e-15

    if kept(low):
        high = low
    for _ in range(_HALVINGS if high > low else 0):
        middle = 0.5 * (low + high)
        if kept(middle):
            high = middle
        else:
            low = middle
    return plan_of(problem, frontier.choose(reached(high)), high)
