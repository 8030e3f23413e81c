"""The least KL that a node can have within so many bits: for all numbers of bits at once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvferry.cluster.optimizer.ladder import Floats, Ints, Ladder
from kvferry.cluster.optimizer.problem import Problem

# Combinations are all looked at where a node has so few parts, and few nodes have.
EXACT_PARTS = 3
EXACT_NODES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """Per node, points from coarse to fine.

    Attributes:
        bits: (nodes, points) a token, not falling; infinite behind a node's last point.
        kl: (nodes, points) nats, not rising.
        choose: (nodes,) points -> (nodes, groups) columns of the ladder.
    """

    bits: Floats
    kl: Floats
    choose: Callable[[Ints], Ints]

    def within(self, allowed: Floats) -> Ints:
        """(nodes,) the finest point within (nodes,) bits; -1: not even the coarsest fits."""
        limits, rows = allowed * (1 + 1e-12), np.arange(len(allowed))
        low = np.zeros(len(allowed), dtype=np.int64)
        high = np.full(len(allowed), self.bits.shape[1])
        for _ in range(self.bits.shape[1].bit_length()):  # `searchsorted`, in all rows at once
            middle = np.minimum((low + high) // 2, self.bits.shape[1] - 1)
            fits = (self.bits[rows, middle] <= limits) & (low < high)
            low = np.where(fits, middle + 1, low)
            high = np.where(fits, high, np.minimum(high, np.maximum(middle, low)))
        return low - 1

    def kl_at(self, points: Ints) -> float:
        """The sum over all nodes."""
        return float(self.kl[np.arange(len(points)), points].sum())


def make_frontier(problem: Problem) -> Frontier:
    """All nodes' frontiers."""
    held = (problem.share > 0).sum(axis=1)
    few = np.flatnonzero(held <= EXACT_PARTS)
    hull = _by_slopes(problem)
    if not few.size or few.size > EXACT_NODES:
        return hull
    return _with_exact(problem, hull, few)


def hull_of(ladder: Ladder, group: int) -> Ints:
    """Columns on the lower convex hull of one group's (bits, KL), from coarse to fine."""
    columns = slice(ladder.count)
    order = np.lexsort((ladder.kl[group, columns], ladder.bits[group, columns])).tolist()
    bits, kl = ladder.bits[group].tolist(), ladder.kl[group].tolist()
    kept: list[int] = []
    for at in order:
        if kept and kl[at] >= kl[kept[-1]]:
            continue
        while len(kept) >= 2:
            a, b = kept[-2], kept[-1]
            if (kl[b] - kl[a]) * (bits[at] - bits[a]) < (kl[at] - kl[a]) * (bits[b] - bits[a]):
                break
            kept.pop()
        kept.append(at)
    return np.array(kept)


def _by_slopes(problem: Problem) -> Frontier:
    ladder, share = problem.ladder, problem.share
    hulls = [hull_of(ladder, group) for group in range(len(ladder.layers))]
    groups = np.concatenate([np.full(len(h) - 1, g) for g, h in enumerate(hulls)])
    bits = np.concatenate([np.diff(ladder.bits[g][h]) for g, h in enumerate(hulls)])
    gain = np.concatenate([-np.diff(ladder.kl[g][h]) for g, h in enumerate(hulls)])
    order = np.argsort(-gain / bits, kind="stable")
    groups, bits, gain = groups[order], bits[order], gain[order]
    first = np.array([h[0] for h in hulls])
    every = np.arange(len(hulls))
    start_bits = share @ ladder.bits[every, first]
    start_kl = share @ ladder.kl[every, first]
    grown = np.cumsum(np.hstack([start_bits[:, None], share[:, groups] * bits]), axis=1)
    left = np.hstack([start_kl[:, None], -share[:, groups] * gain])
    table = np.full((len(hulls), max(len(h) for h in hulls)), -1)
    for row, columns in zip(table, hulls, strict=True):
        row[: len(columns)] = columns

    def choose(points: Ints) -> Ints:
        taken = [np.bincount(groups[:point], minlength=len(hulls)) for point in points]
        return np.asarray(table[every, np.array(taken)])

    return Frontier(grown, np.maximum(np.cumsum(left, axis=1), 0.0), choose)


def _with_exact(problem: Problem, hull: Frontier, few: Ints) -> Frontier:
    """``hull``, with the nodes in ``few`` replaced by all their undominated combinations."""
    made = {int(node): _combinations(problem, int(node)) for node in few}
    points = max(hull.bits.shape[1], *(len(bits) for bits, _, _ in made.values()))
    pad = points - hull.bits.shape[1]
    bits = np.pad(hull.bits, ((0, 0), (0, pad)), constant_values=np.inf)
    kl = np.pad(hull.kl, ((0, 0), (0, pad)), mode="edge")
    for node, (node_bits, node_kl, _) in made.items():
        bits[node], kl[node] = np.inf, node_kl[-1]
        bits[node, : len(node_bits)], kl[node, : len(node_kl)] = node_bits, node_kl

    def choose(at: Ints) -> Ints:
        clipped = np.minimum(at, hull.bits.shape[1] - 1)
        chosen = hull.choose(clipped)
        for node, (_, _, columns) in made.items():
            held = np.flatnonzero(problem.share[node] > 0)
            chosen[node] = problem.ladder.count - 1
            chosen[node, held] = columns[at[node]]
        return chosen

    return Frontier(bits, kl, choose)


def _combinations(problem: Problem, node: int) -> tuple[Floats, Floats, Ints]:
    """(points,) bits growing, (points,) KL falling, (points, parts) columns."""
    ladder, share = problem.ladder, problem.share[node]
    count, bits, kl = ladder.count, np.zeros(1), np.zeros(1)
    columns = np.zeros((1, 0), dtype=np.int64)
    for group in np.flatnonzero(share > 0):
        more_bits = (bits[:, None] + share[group] * ladder.bits[group, :count]).ravel()
        more_kl = (kl[:, None] + share[group] * ladder.kl[group, :count]).ravel()
        order = np.lexsort((more_kl, more_bits))
        least = np.minimum.accumulate(more_kl[order])
        kept = order[np.r_[True, more_kl[order][1:] < least[:-1]]]
        old, new = np.divmod(kept, count)
        bits, kl = more_bits[kept], more_kl[kept]
        columns = np.hstack([columns[old], new[:, None]])
    return bits, kl, columns
