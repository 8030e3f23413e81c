"""The prefixes that a restore could bring, and what each costs to fetch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvferry.node.restore import Piece, RestorePlan, StatePlan


@dataclass(frozen=True, slots=True)
class Step:
    """A prefix of ``tokens``; bytes to fetch for all of it, by where they are.

    Attributes:
        far_bytes: over a link.
        near_bytes: from this machine's own node daemon.
    """

    tokens: int
    far_bytes: int
    near_bytes: int


def steps_of(plan: RestorePlan, positions: Sequence[StatePlan]) -> list[Step]:
    """Prefixes by growing length: where a segment ends, or where states stand.

    Args:
        positions: of a model with states, which can be restored nowhere else.
    """
    if not positions:
        steps, at = [], Step(0, 0, 0)
        for segment in plan.segments:
            at = _with(at, segment.pieces, segment.tokens[1])
            steps.append(at)
        return steps
    return [
        _with(_rows(plan, state.tokens), state.pieces, state.tokens)
        for state in sorted(positions, key=lambda state: state.tokens)
    ]


def _rows(plan: RestorePlan, tokens: int) -> Step:
    return _with(Step(0, 0, 0), plan.upto(tokens).pieces(), tokens)


def _with(before: Step, pieces: Iterable[Piece], tokens: int) -> Step:
    far, near = before.far_bytes, before.near_bytes
    for info in {piece.info.key: piece.info for piece in pieces}.values():
        if info.near:
            near += info.size
        else:
            far += info.size
    return Step(tokens, far, near)
