"""What a model's attention gives, layer by layer, while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from kvferry.codec.lab.forward import logits
from kvferry.codec.mlx.weighted_attention import replaced_attention

Outputs = list[mx.array]


@contextmanager
def recorded_attention(model: Any) -> Iterator[Outputs]:
    """Within it, every attention of the model leaves its output in the list that is yielded.

    The modules that define the model's layers are changed and put back at the end.

    Yields: one array (1, query heads, tokens, dim) per call, in the order of calls.
    Raises: ModelError: a model whose attention is not mlx-lm's own.
    """
    seen: Outputs = []
    with replaced_attention(model, partial(_recording, seen=seen)):
        yield seen


def _recording(plain: Callable[..., mx.array], seen: Outputs) -> Callable[..., mx.array]:
    def attention(*given: Any, **named: Any) -> mx.array:
        out = plain(*given, **named)
        seen.append(out)
        return out

    return attention


def attention_difference(
    model: Any, exact: list[Any], restored: list[Any], tokens: Sequence[int]
) -> list[float]:
    """How far attention's outputs are apart over ``tokens``, which both caches are fed.

    What differs in one layer differs in the input of the next, so this is what the whole
    stack up to a layer has come to.

    Returns: for each attention in turn, the norm of the difference over that of the exact
        one's output.
    Raises: ModelError.
    """
    with recorded_attention(model) as first:
        logits(model, tokens, exact)
    with recorded_attention(model) as second:
        logits(model, tokens, restored)
    found = []
    for a, b in zip(first, second, strict=True):
        own, other = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (a, b))
        found.append(float(np.linalg.norm(other - own)) / max(float(np.linalg.norm(own)), 1e-30))
    return found
