"""Which nodes together hold a model: each such set restores by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvferry.cluster.coverage import covers
from kvferry.cluster.optimizer.holder import Holder, Range
from kvferry.cluster.optimizer.ladder import Floats, Ladder
from kvferry.cluster.optimizer.solve import Plan

Part = tuple[Range, Range]
MAX_CELLS = 1 << 20


@dataclass(frozen=True, slots=True)
class Ring:
    """Nodes that hold every layer and head of a model, each once."""

    model_id: bytes
    holders: tuple[Holder, ...]

    @property
    def names(self) -> frozenset[str]:
        """Its nodes."""
        return frozenset(holder.node_id for holder in self.holders)


def make_rings(
    model_id: bytes, holders: Sequence[Holder], layers: int, heads: int
) -> tuple[Ring, ...]:
    """Rings of a model, complete ones only: a page that lacks layers never counts.

    Parts are given out in the order of their layers, each to the first ring where it fits
    on without a gap, else to the first where it overlaps nothing.
    """
    placed: list[dict[str, list[Part]]] = []
    whole = {holder.node_id: holder for holder in holders}
    parts = sorted({(p, h.node_id) for h in holders for p in h.parts})
    for part, node in parts:
        fits = [ring for ring in placed if not _overlaps(part, ring)]
        ends = [r for r in fits if any(p[0][1] == part[0][0] for ps in r.values() for p in ps)]
        ring = (ends or fits or [{}])[0]
        if not fits:
            placed.append(ring)
        ring.setdefault(node, []).append(part)
    made: list[Ring] = []
    taken: set[str] = set()
    for ring in placed:
        if not taken.isdisjoint(ring):
            continue  # a node has one coding; the first set of nodes decides it
        if covers([part for parts in ring.values() for part in parts], layers, heads):
            names = sorted(ring)
            kept = (replace(whole[name], parts=tuple(ring[name])) for name in names)
            made.append(Ring(model_id, tuple(kept)))
            taken |= ring.keys()
    return tuple(made)


def _overlaps(part: Part, ring: Mapping[str, Sequence[Part]]) -> bool:
    (a, b), (c, d) = part
    return any(
        a < layers[1] and layers[0] < b and c < heads[1] and heads[0] < d
        for parts in ring.values()
        for layers, heads in parts
    )


def mixture(ladder: Ladder, plans: Sequence[tuple[Ring, Plan]], free: Sequence[Range]) -> float:
    """Nats of the worst page that a reader could put together of several rings' blobs.

    Args:
        free: the layers that were to be chosen.
    """
    if len(plans) == 1:
        return plans[0][1].kl
    layers = ladder.layers[-1][1]
    heads = ladder.heads if layers * ladder.heads <= MAX_CELLS else 1
    worst = np.zeros((layers, heads))
    for ring, plan in plans:
        np.maximum(worst, _cells(ladder, ring, plan, heads), out=worst)
    return float(sum(worst[slice(*span)].sum() for span in free))


def _cells(ladder: Ladder, ring: Ring, plan: Plan, heads: int) -> Floats:
    """(layers, heads) nats of what one ring chose."""
    cells = np.zeros((ladder.layers[-1][1], heads))
    scale = heads / ladder.heads
    for node, holder in enumerate(ring.holders):
        for group, (start, end) in enumerate(ladder.layers):
            if not plan.problem.share[node, group]:
                continue
            each = plan.problem.ladder.kl[group, plan.choice[node, group]] / (end - start) / heads
            for (a, b), (c, d) in holder.parts:
                rows = slice(max(a, start), max(a, start, min(b, end)))
                cells[rows, int(c * scale) : max(int(c * scale) + 1, int(d * scale))] = each
    return cells
