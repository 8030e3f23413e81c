"""What is given: who holds how much of which layer group, over which links."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvferry.cluster.optimizer.ladder import Floats, Ints, Ladder

Range = tuple[int, int]
# Of links that nobody has measured, and where no other is known either.
GUESSED_BYTES_PER_S = 100e6
TOKENS = 4096  # of the restore that is made fast


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A node, and its part of a model.

    Attributes:
        parts: (layers, heads), absolute, half-open; no two of them overlap.
        bytes_per_s, latency_s: between it and the store; 0 bytes: not measured.
        decode_tokens_per_s: for its part of the model; 0: not measured.
        prefill_tokens_per_s: of all that hold the model with it; 0: not measured.
    """

    node_id: str
    parts: tuple[tuple[Range, Range], ...]
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """One model on nodes that together hold it.

    Attributes:
        ladder: choices of its groups.
        share: (nodes, groups) 0 to 1, of what may be chosen.
        fixed_bits: (nodes,) a token, of layers that the operator's rules decide.
        bandwidth: (nodes,) bits per second.
        waits: (nodes,) seconds that no choice changes: latency and decoding.
        budget: nats.
        tokens: of a restore.
    """

    ladder: Ladder
    share: Floats
    bandwidth: Floats
    waits: Floats
    budget: float
    fixed_bits: Floats = field(default_factory=lambda: np.zeros(0))
    tokens: int = TOKENS

    def __post_init__(self) -> None:
        if not self.fixed_bits.size:
            object.__setattr__(self, "fixed_bits", np.zeros(len(self.share)))

    @property
    def widths(self) -> Floats:
        """(nodes,) values of a token that each node holds and that may be chosen."""
        return np.asarray(self.share @ self.ladder.widths)

    def seconds(self, bits: Floats) -> Floats:
        """(nodes,) until each has its part, at ``bits`` (nodes,) a token."""
        carried = self.tokens * (bits + self.fixed_bits)
        return np.asarray(self.waits + carried / self.bandwidth)

    def bits_of(self, choice: Ints) -> Floats:
        """(nodes,) bits a token of (nodes, groups) columns of the ladder."""
        groups = np.arange(self.share.shape[1])
        return np.asarray((self.share * self.ladder.bits[groups, choice]).sum(axis=1))

    def kl_of(self, choice: Ints) -> float:
        """Nats of (nodes, groups) columns of the ladder."""
        groups = np.arange(self.share.shape[1])
        return float((self.share * self.ladder.kl[groups, choice]).sum())


def links_of(holders: Sequence[Holder]) -> Floats:
    """(nodes,) bytes per second; a link that is not measured is as the others' median."""
    known = [holder.bytes_per_s for holder in holders if holder.bytes_per_s > 0]
    guess = float(np.median(known)) if known else GUESSED_BYTES_PER_S
    return np.array([holder.bytes_per_s or guess for holder in holders])


def _decoding(holders: Sequence[Holder], widths: Floats, tokens: int) -> Floats:
    """(nodes,) seconds; a node that was not measured decodes as the others' median does."""
    known = [
        width * holder.decode_tokens_per_s
        for holder, width in zip(holders, widths, strict=True)
        if holder.decode_tokens_per_s > 0 and width > 0
    ]
    if not known:
        return np.zeros(len(holders))
    values_per_s = float(np.median(known))
    rates = [holder.decode_tokens_per_s for holder in holders]
    return np.array(
        [
            tokens / rate if rate > 0 else tokens * width / values_per_s
            for rate, width in zip(rates, widths, strict=True)
        ]
    )


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
    decoding = _decoding(holders, share @ ladder.widths, tokens)
    return Problem(
        ladder=ladder,
        share=share,
        bandwidth=8.0 * links_of(holders),
        waits=np.array([h.latency_s for h in holders]) + decoding,
        budget=budget * min(1.0, part),
        fixed_bits=np.zeros(len(holders)) if fixed_bits is None else fixed_bits,
        tokens=tokens,
    )
