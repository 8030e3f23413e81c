"""Which tokens the entries of a page's streams stand for, where a codec dropped or merged some.

`kvferry.codec.kept_sections` stores it.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Range = tuple[int, int]
Positions = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]

_SUM_ERROR = 1e-3  # of float32 weights, for each token


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the n entries of each stream stand for.

    Attributes:
        positions: int64, absolute; (n,) where all layers and heads keep the same tokens,
            strictly rising; else (layers, heads, n), where entries may share a position.
        weights: float32 (layers, heads, n), how many tokens an entry stands for, 0 for
            padding; None: each for its own token alone. Only with positions per head.
        contiguous: whether a model that goes on from these is to see the entries side by
            side at positions 0, 1, 2, ..., rather than where they were.
    """

    positions: Positions
    weights: Weights | None = None
    contiguous: bool = False

    @property
    def count(self) -> int:
        """Entries of each head."""
        return int(self.positions.shape[-1])

    def problem(self, layers: Range, heads: Range, tokens: Range) -> str:
        """Why this cannot describe entries of these ranges; empty: it can."""
        own = (layers[1] - layers[0], heads[1] - heads[0], self.count)
        shape, weights = self.positions.shape, self.weights
        if self.positions.dtype != np.int64 or shape not in (own, own[2:]) or not self.count:
            return f"positions {self.positions.dtype} {shape} for {own[0]} layers, {own[1]} heads"
        if self.count > tokens[1] - tokens[0]:
            return f"{self.count} entries of {tokens[1] - tokens[0]} tokens"
        if self.positions.min() < tokens[0] or self.positions.max() >= tokens[1]:
            return f"positions do not lie within {tokens}"
        steps = np.diff(self.positions, axis=-1)
        if steps.size and steps.min() < (0 if len(shape) > 1 else 1):
            return "positions do not rise"
        return "" if weights is None else _problem(weights, own, len(shape) > 1, tokens)

    def cut(self, axis: int, part: slice) -> "Kept":
        """Those of some layers (``axis`` 0) or heads (1)."""
        if self.positions.ndim == 1:
            return self
        index = (slice(None),) * axis + (part,)
        weights = None if self.weights is None else self.weights[index]
        return replace(self, positions=self.positions[index], weights=weights)


def _problem(weights: Weights, own: tuple[int, ...], per_head: bool, tokens: Range) -> str:
    if weights.dtype != np.float32 or weights.shape != own or not per_head:
        return f"weights {weights.dtype} {weights.shape} for {own} entries"
    if not (weights >= 0).all():  # false of NaN too
        return "a weight is below 0 or no number"
    count = tokens[1] - tokens[0]
    sums = weights.sum(axis=-1, dtype=np.float64)
    if not (sums.min() > 0 and sums.max() <= count * (1 + _SUM_ERROR)):
        return f"the weights of a head do not add up to 1 to {count} tokens"
    return ""
