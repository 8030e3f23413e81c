"""The ranks of one model, and what they must do together.

If one rank restores 2048 tokens and another 1792, a pipeline hangs and tensor parallel
returns nonsense. So every rank enters the same collectives for every request, whatever
failed on it, and all act on the same answer (design section 11, "Agreement").
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_Integers = npt.NDArray[np.int32]


class Group(Protocol):
    """Ranks that hold parts of one model. Every call is a collective."""

    @property
    def rank(self) -> int:
        """This process, 0 to ``size`` - 1."""

    @property
    def size(self) -> int:
        """How many ranks."""

    def all_min(self, values: Sequence[int]) -> list[int]:
        """Element-wise minimum over all ranks; the same number of values on each."""

    def all_values(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values, by rank; the same number of them on each, of 32 bits."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank; the same length on each."""


class Alone:
    """A model that one process holds whole."""

    rank = 0
    size = 1

    def all_min(self, values: Sequence[int]) -> list[int]:
        """The values themselves."""
        return list(values)

    def all_values(self, values: Sequence[int]) -> list[list[int]]:
        """The one rank's values."""
        return [list(values)]

    def all_gather(self, data: bytes) -> list[bytes]:
        """The one rank's bytes."""
        return [data]


class MlxGroup:
    """An ``mx.distributed`` group. Collectives run on the CPU stream, as exo's do."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = group.rank()
        self.size: int = group.size()

    def all_min(self, values: Sequence[int]) -> list[int]:
        """Element-wise minimum over all ranks (values must fit 32 bits).

        Gathered and compared here: MLX's ring passes a reduction round twice.
        """
        return [min(column) for column in zip(*self.all_values(values), strict=True)]

    def all_values(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values, by rank (they must fit 32 bits)."""
        return [[int(v) for v in row] for row in self._gathered(np.array(values, np.int32))]

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank."""
        everyone = self._gathered(np.frombuffer(data, dtype=np.uint8).astype(np.int32))
        return [row.tobytes() for row in everyone.astype(np.uint8)]

    def _gathered(self, mine: _Integers) -> _Integers:
        """One row for each rank."""
        with mx.stream(mx.cpu):
            everyone = mx.distributed.all_gather(mx.array(mine), group=self._group)
            mx.eval(everyone)
        return np.array(everyone).reshape(self.size, len(mine))


def group_of(group: Any | None) -> Group:
    """Our view of an ``mx.distributed`` group; None or one of size 1: `Alone`."""
    if group is None or group.size() == 1:
        return Alone()
    return MlxGroup(group)
