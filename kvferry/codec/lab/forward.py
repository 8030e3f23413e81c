"""The model, a few hundred tokens at a time, so that memory stays bounded."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from kvferry.codec.mlx.weighted_attention import attention_for

# On two CPU cores 256 tokens at a time are fastest; a GPU loses little by it.
PREFILL_CHUNK = 256
Done = Callable[[int], None]


def prefill(model: Any, tokens: Sequence[int], cache: list[Any], done: Done | None = None) -> None:
    """Fill ``cache`` with ``tokens``; logits are not computed where the model allows it."""
    body = getattr(model, "model", None)
    run = body if callable(body) else model
    for start in range(0, len(tokens), PREFILL_CHUNK):
        part = tokens[start : start + PREFILL_CHUNK]
        with attention_for(model, cache):
            mx.eval(run(mx.array([list(part)]), cache=cache), *_arrays(cache))
        if done is not None:
            done(len(part))


def logits(model: Any, tokens: Sequence[int], cache: list[Any]) -> mx.array:
    """Logits (tokens, vocabulary), float32, appending to ``cache``."""
    with attention_for(model, cache):
        out: mx.array = model(mx.array([list(tokens)]), cache=cache)[0].astype(mx.float32)
    mx.eval(out, *_arrays(cache))
    return out


def _arrays(cache: list[Any]) -> list[Any]:
    return [tree_map(lambda value: value, layer.state) for layer in cache]
