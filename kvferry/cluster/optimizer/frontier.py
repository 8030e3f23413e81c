"""The least KL that a node can have within so many bits: for all numbers of bits at once.

Where codecs take unlike long to decode, larger blobs may be there sooner. They are not
chosen for that: what fewer bits cost is never less than what more bits do, see the package.
"""

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
        cost: likewise, with decoding (`Problem.cost_of`), not falling either.
        kl: (nodes, points) nats, not rising.
        widths: (nodes,) values of a token.
        choose: (nodes,) points -> (nodes, groups) columns of the ladder.
    """

    bits: Floats
    cost: Floats
    kl: Floats
    widths: Floats
    choose: Callable[[Ints], Ints]

    def within(self, allowed: Floats, spread: float = np.inf) -> Ints:
        """(nodes,) the finest point of each node; the coarsest where not even that fits.

        Args:
            allowed: (nodes,) cost.
            spread: no node spends more than so many times the bits per value of the scarcest.
        """
        points, rows = np.maximum(_within(self.cost, allowed), 0), np.arange(len(allowed))
        widths, held = self.widths, self.widths > 0
        if not (np.isfinite(spread) and held.any()):
            return points
        # Between two points as many bits as the time leaves, but never those of the next.
        after = np.minimum(points + 1, self.bits.shape[1] - 1)
        more = np.where(after > points, self.bits[rows, after], np.inf)
        spent = allowed - (self.cost[rows, points] - self.bits[rows, points])
        dense = np.minimum(spent, more)[held] / widths[held]
        capped = widths * spread * max(float(dense.min()), 0.0)
        return np.minimum(points, np.maximum(_within(self.bits, capped), 0))

    def kl_at(self, points: Ints) -> float:
        """The sum over all nodes."""
        return float(self.kl[np.arange(len(points)), points].sum())


def _within(table: Floats, allowed: Floats) -> Ints:
    """(nodes,) the last column of each row that is at most (nodes,) allowed; -1: none."""
    limits, rows = allowed * (1 + 1e-12), np.arange(len(allowed))
    low = np.zeros(len(allowed), dtype=np.int64)
    high = np.full(len(allowed), table.shape[1])
    for _ in range(table.shape[1].bit_length()):  # `searchsorted`, in all rows at once
        middle = np.minimum((low + high) // 2, table.shape[1] - 1)
        fits = (table[rows, middle] <= limits) & (low < high)
        low = np.where(fits, middle + 1, low)
        high = np.where(fits, high, np.minimum(high, np.maximum(middle, low)))
    return low - 1


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
    cost = grown
    if problem.decode.size:
        ends = np.concatenate([np.stack([h[:-1], h[1:]]) for h in hulls], axis=1)[:, order]
        cost = _costs(problem, grown, first, groups, ends)

    def choose(points: Ints) -> Ints:
        taken = [np.bincount(groups[:point], minlength=len(hulls)) for point in points]
        return np.asarray(table[every, np.array(taken)])

    return Frontier(grown, cost, np.maximum(np.cumsum(left, axis=1), 0.0), problem.widths, choose)


def _costs(problem: Problem, bits: Floats, first: Ints, groups: Ints, ends: Ints) -> Floats:
    """(nodes, points) of points at which one group after the other goes a choice further.

    Args:
        bits: (nodes, points).
        first: (groups,) columns at the first point.
        groups: (points - 1,) which goes further.
        ends: (2, points - 1) columns, from and to.
    """
    values, decode = problem.share * problem.ladder.widths, problem.decode
    before = (values * decode[:, first]).sum(axis=1, keepdims=True)
    unlike = np.flatnonzero((decode[:, ends[0]] != decode[:, ends[1]]).any(axis=0))
    steps = np.zeros(bits.shape)
    steps[:, unlike + 1] = values[:, groups[unlike]] * (
        decode[:, ends[1, unlike]] - decode[:, ends[0, unlike]]
    )
    steps[:, :1] = before
    cost = bits + problem.bandwidth[:, None] * np.cumsum(steps, axis=1)
    return np.asarray(np.maximum.accumulate(cost, axis=1))


def _with_exact(problem: Problem, hull: Frontier, few: Ints) -> Frontier:
    """``hull``, with the nodes in ``few`` replaced by all their undominated combinations."""
    made = {int(node): _combinations(problem, int(node)) for node in few}
    points = max(hull.bits.shape[1], *(len(bits) for bits, _, _ in made.values()))
    pad = points - hull.bits.shape[1]
    bits = np.pad(hull.bits, ((0, 0), (0, pad)), constant_values=np.inf)
    cost = bits
    if hull.cost is not hull.bits:
        cost = np.pad(hull.cost, ((0, 0), (0, pad)), constant_values=np.inf)
    kl = np.pad(hull.kl, ((0, 0), (0, pad)), mode="edge")
    for node, (node_bits, node_kl, columns) in made.items():
        bits[node], kl[node] = np.inf, node_kl[-1]
        bits[node, : len(node_bits)], kl[node, : len(node_kl)] = node_bits, node_kl
        if cost is not bits:
            held = np.flatnonzero(problem.share[node] > 0)
            values = problem.share[node, held] * problem.ladder.widths[held]
            decoded = (values * problem.decode[node][columns]).sum(axis=1)
            cost[node] = np.inf
            cost[node, : len(node_bits)] = np.maximum.accumulate(
                node_bits + problem.bandwidth[node] * decoded
            )

    def choose(at: Ints) -> Ints:
        clipped = np.minimum(at, hull.bits.shape[1] - 1)
        chosen = hull.choose(clipped)
        for node, (_, _, columns) in made.items():
            held = np.flatnonzero(problem.share[node] > 0)
            chosen[node] = problem.ladder.count - 1
            chosen[node, held] = columns[at[node]]
        return chosen

    return Frontier(bits, cost, kl, hull.widths, choose)


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
