"""What is given: who holds how much of which layer group, over which links."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvferry.cluster.optimizer.holder import Holder, Range, decoding, links_of
from kvferry.cluster.optimizer.ladder import Floats, Ints, Ladder

TOKENS = 4096  # of the restore that is made fast


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """One model on nodes that together hold it.

    Attributes:
        ladder: choices of its groups.
        share: (nodes, groups) 0 to 1, of what may be chosen.
        fixed_bits: (nodes,) a token, of layers that the operator's rules decide.
        bandwidth: (nodes,) bits per second.
        waits: (nodes,) seconds that no choice changes: latency, and decoding as far as it
            takes as long under every codec.
        budget: nats.
        decode: (nodes, choices) seconds a value that decoding takes beyond that; empty: none.
        tokens: of a restore.
    """

    ladder: Ladder
    share: Floats
    bandwidth: Floats
    waits: Floats
    budget: float
    fixed_bits: Floats = field(default_factory=lambda: np.zeros(0))
    decode: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    tokens: int = TOKENS

    def __post_init__(self) -> None:
        if not self.fixed_bits.size:
            object.__setattr__(self, "fixed_bits", np.zeros(len(self.share)))

    @property
    def widths(self) -> Floats:
        """(nodes,) values of a token that each node holds and that may be chosen."""
        return np.asarray(self.share @ self.ladder.widths)

    def seconds(self, cost: Floats) -> Floats:
        """(nodes,) until each has its part, at ``cost`` (nodes,) bits a token."""
        carried = self.tokens * (cost + self.fixed_bits)
        return np.asarray(self.waits + carried / self.bandwidth)

    def bits_of(self, choice: Ints) -> Floats:
        """(nodes,) bits a token of (nodes, groups) columns of the ladder."""
        groups = np.arange(self.share.shape[1])
        return np.asarray((self.share * self.ladder.bits[groups, choice]).sum(axis=1))

    def cost_of(self, choice: Ints) -> Floats:
        """(nodes,) bits a token that could cross the link while these are sent and decoded."""
        bits = self.bits_of(choice)
        if not self.decode.size:
            return bits
        nodes = np.arange(len(self.share))[:, None]
        values = self.share * self.ladder.widths
        decoded = (values * self.decode[nodes, choice]).sum(axis=1)
        return np.asarray(bits + self.bandwidth * decoded)

    def kl_of(self, choice: Ints) -> float:
        """Nats of (nodes, groups) columns of the ladder."""
        groups = np.arange(self.share.shape[1])
        return float((self.share * self.ladder.kl[groups, choice]).sum())


def shares_of(ladder: Ladder, holders: Sequence[Holder], free: Sequence[Range]) -> Floats:
    """(nodes, groups): the part of each group that a node holds of the layers in ``free``."""
    share = np.zeros((len(holders), len(ladder.layers)))
    starts = np.array([span[0] for span in ladder.layers])
    ends = np.array([span[1] for span in ladder.layers])
    for row, holder in zip(share, holders, strict=True):
        for layers, heads in holder.parts:
            for span in free:
                low, high = max(layers[0], span[0]), min(layers[1], span[1])
                common = np.minimum(ends, high) - np.maximum(starts, low)
                row += (
                    np.clip(common, 0, None)
                    / (ends - starts)
                    * ((heads[1] - heads[0]) / ladder.heads)
                )
    return share


def make_problem(
    ladder: Ladder,
    holders: Sequence[Holder],
    budget: float,
    *,
    free: Sequence[Range] | None = None,
    fixed_bits: Floats | None = None,
    tokens: int = TOKENS,
) -> Problem:
    """The problem of nodes that together hold a model.

    Args:
        free: layers that may be chosen; all if None. They get their part of the budget,
            by what they cost where all are coded alike.
        fixed_bits: see `Problem`.
    """
    whole = (0, ladder.layers[-1][1])
    share = shares_of(ladder, holders, [whole] if free is None else free)
    covered = np.minimum(1.0, share.sum(axis=0))
    fits = np.flatnonzero(ladder.kl[:, : ladder.count].sum(axis=0) <= budget)
    alike = ladder.kl[:, fits[0]]  # the exact one costs nothing
    part = float(covered @ alike / alike.sum()) if alike.sum() > 0 else 1.0
    held = shares_of(ladder, holders, [whole]) @ ladder.widths
    common, decode, longest = decoding(ladder, holders, held)
    free_values = share @ ladder.widths
    waits = np.array([h.latency_s for h in holders])
    return Problem(
        ladder=ladder,
        share=share,
        bandwidth=8.0 * links_of(holders),
        waits=waits + tokens * (free_values * common + (held - free_values) * longest),
        decode=decode,
        budget=budget * min(1.0, part),
        fixed_bits=np.zeros(len(holders)) if fixed_bits is None else fixed_bits,
        tokens=tokens,
    )
