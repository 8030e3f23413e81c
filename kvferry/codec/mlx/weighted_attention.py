"""Attention in which an entry weighs as much as the tokens that it stands for.

log(count) is added to an entry's scores, per layer, KV head and entry, so that one of
weight c attends like c equal copies (MP-KVM; "energy-preserving" merging). mlx-lm gives
all layers one mask, so what the model's modules call for attention is wrapped instead.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from kvferry.codec.mlx.gapped_cache import GappedKVCache
from kvferry.errors import ModelError

_NAME = "scaled_dot_product_attention"
Attention = Callable[..., mx.array]


def weighted_attention(model: Any) -> AbstractContextManager[None]:
    """Within it, ``model`` adds the weights of caches that have such; others are as ever.

    Raises: ModelError: a model whose attention is not mlx-lm's own.
    """
    return replaced_attention(model, _weighted)


@contextmanager
def replaced_attention(model: Any, wrap: Callable[[Attention], Attention]) -> Iterator[None]:
    """Within it, ``model`` calls ``wrap`` of mlx-lm's attention.

    The modules that define the model's layers are changed and put back at the end; it may
    be nested, but not left on one thread while another is within.

    Raises: ModelError: a model whose attention is not mlx-lm's own.
    """
    names = {type(module).__module__ for module in model.modules()}
    homes = [sys.modules[name] for name in sorted(names) if hasattr(sys.modules[name], _NAME)]
    homes = [home for home in homes if home is not base]
    if not homes:
        raise ModelError(f"the attention of {type(model).__module__} cannot be replaced")
    before = [(home, getattr(home, _NAME)) for home in homes]
    for home, plain in before:
        setattr(home, _NAME, wrap(plain))
    try:
        yield
    finally:
        for home, plain in before:
            setattr(home, _NAME, plain)


def attention_for(model: Any, cache: Sequence[Any]) -> AbstractContextManager[None]:
    """`weighted_attention` where ``cache`` needs it."""
    if any(isinstance(layer, GappedKVCache) and layer.log_weights is not None for layer in cache):
        return weighted_attention(model)
    return nullcontext()


def _weighted(plain: Attention) -> Attention:
    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        **more: Any,
    ) -> mx.array:
        if isinstance(cache, GappedKVCache) and cache.awaits_weights:
            mask = cache.weigh(mask, queries)
        return plain(queries, keys, values, cache=cache, scale=scale, mask=mask, **more)

    return attention
