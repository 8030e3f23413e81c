"""The model's own words: what it says greedily, token by token."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from kvferry.codec.lab.forward import Done, logits


def greedy(
    model: Any, cache: list[Any], first: int, count: int, done: Done | None = None
) -> list[int]:
    """The likeliest ``count`` tokens after ``first``, one after the other.

    Goes on beyond an end of text, so that two runs can be compared over all of them.

    Args:
        cache: of all before ``first``; filled further.
        done: called with 1 for each token.
    """
    found: list[int] = []
    for _ in range(count):
        scores = logits(model, [found[-1] if found else first], cache)
        found.append(int(np.asarray(mx.argmax(scores[-1]))))
        if done is not None:
            done(1)
    return found


def token_match(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of places with the same token. Nothing of both: 1."""
    if not first and not second:
        return 1.0
    same = sum(a == b for a, b in zip(first, second, strict=False))
    return same / max(len(first), len(second))


def first_difference(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens are the same before the first that is not."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
