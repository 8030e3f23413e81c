"""How many bits each run of principal components gets: the published dynamic program.

arXiv 2511.01815, section 3.2. Components, by falling variance, are cut into consecutive
groups of 1, 16, 64, 256 or 1024. A group is dropped, or each of its coefficients gets 2,
4 or 8 bits; then every token also stores 16 bits of shift and 16 of scale for it. The
program finds the cut and the widths with the least squared error whose bits per token
are within a budget. It is exact: all budgets are carried along at once, as vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvferry.errors import ConfigError

SIZES = (1, 16, 64, 256, 1024)
BITS = (0, 2, 4, 8)
SHIFT_AND_SCALE_BITS = 32
FP16_BITS = 16
MAX_COMPONENTS = 1 << 16
# All costs are even; half of every vector would never be reached.
_UNIT_BITS = 2

Errors = npt.NDArray[np.float64]
GroupErrors = Mapping[tuple[int, int], Errors]


class Group(NamedTuple):
    """Consecutive components that share shift and scale; 0 bits: not stored."""

    size: int
    bits: int

    @property
    def cost(self) -> int:
        """Bits per token."""
        return self.size * self.bits + SHIFT_AND_SCALE_BITS if self.bits else 0


@dataclass(frozen=True, slots=True)
class BitPlan:
    """The groups of one stream from the first component on; the rest is dropped."""

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ConfigError("plan", self.to_json(), problem)

    def _problem(self) -> str:
        if any(group.size not in SIZES or group.bits not in BITS for group in self.groups):
            return f"groups of {SIZES} components with {BITS} bits"
        if self.rank > MAX_COMPONENTS:
            return f"at most {MAX_COMPONENTS} components"
        return ""

    @property
    def rank(self) -> int:
        """Components that the groups cover."""
        return sum(group.size for group in self.groups)

    @property
    def stored(self) -> tuple[Group, ...]:
        """The groups that have bits."""
        return tuple(group for group in self.groups if group.bits)

    @property
    def bits(self) -> int:
        """Bits per token, shifts and scales included."""
        return sum(group.cost for group in self.groups)

    def to_json(self) -> list[list[int]]:
        """Runs of equal groups: [[bits, size, how many], ...]."""
        return [[g.bits, g.size, len(list(run))] for g, run in groupby(self.groups)]

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Raises: ConfigError for what `to_json` does not write. Bounds what it builds."""
        groups: list[Group] = []
        rank = 0
        for run in value if isinstance(value, list) else [None]:
            if not isinstance(run, list) or len(run) != 3 or any(type(n) is not int for n in run):
                raise ConfigError("plan", str(value)[:60], "[[bits, size, count], ...]")
            bits, size, count = run
            rank += size * count
            if size not in SIZES or bits not in BITS or count < 1 or rank > MAX_COMPONENTS:
                raise ConfigError("plan", str(run), f"{BITS} bits, sizes {SIZES}, and a count")
            groups += [Group(size, bits)] * count
        return cls(tuple(groups))


def budget_for(ratio: float, width: int) -> int:
    """Bits per token of ``width`` values that ``ratio`` to fp16 leaves, before DEFLATE."""
    return int(FP16_BITS * width / ratio)


def best_plans(energy: Errors, errors: GroupErrors, budgets: Sequence[int]) -> list[BitPlan]:
    """The plan of least squared error for each budget.

    Args:
        energy: (r,) squared error of leaving a component out.
        errors: (size, bits) -> (r - size + 1,) squared error of a group that starts at
            component s; infinity where no group may start.
        budgets: bits per token.
    Returns: one plan per budget, in order.
    """
    widest = max(max(budgets, default=0), 0) // _UNIT_BITS
    choices = [Group(1, 0)]
    choices += sorted(Group(*key) for key in errors if Group(*key).cost // _UNIT_BITS <= widest)
    chosen = _search(energy, errors, choices, widest)
    return [_trace(chosen, choices, max(budget, 0) // _UNIT_BITS) for budget in budgets]


def _search(
    energy: Errors, errors: GroupErrors, choices: Sequence[Group], widest: int
) -> npt.NDArray[np.uint8]:
    """(r + 1, budgets) which group ends best before a component, within a budget."""
    count = len(energy)
    # Only as many rows as the longest group reaches back are kept.
    window = max(group.size for group in choices) + 1
    best = np.full((window, widest + 1), np.inf)
    best[0] = 0.0
    chosen = np.zeros((count + 1, widest + 1), dtype=np.uint8)
    candidate = np.empty(widest + 1)
    better = np.empty(widest + 1, dtype=np.bool_)
    for end in range(1, count + 1):
        row = best[end % window]
        np.add(best[(end - 1) % window], energy[end - 1], out=row)
        for index, (size, bits) in enumerate(choices[1:], 1):
            start = end - size
            error = errors[size, bits][start] if start >= 0 else np.inf
            if error == np.inf:
                continue
            skip = choices[index].cost // _UNIT_BITS
            found, wins = candidate[skip:], better[skip:]
            np.add(best[start % window][: widest + 1 - skip], error, out=found)
            np.less(found, row[skip:], out=wins)
            np.copyto(row[skip:], found, where=wins)
            np.copyto(chosen[end, skip:], index, where=wins)
    return chosen


def _trace(chosen: npt.NDArray[np.uint8], choices: Sequence[Group], budget: int) -> BitPlan:
    groups: list[Group] = []
    end = len(chosen) - 1
    while end:
        group = choices[chosen[end, budget]]
        groups.append(group)
        end -= group.size
        budget -= group.cost // _UNIT_BITS
    groups.reverse()
    while groups and not groups[-1].bits:
        groups.pop()
    return BitPlan(tuple(groups))
