"""What merging costs attention, beside merging what chance puts together."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.centroid import CentroidCodec
from kvferry.codec.centroid_entries import (
    attention_loss,
    energy_loss,
    random_merging,
    reconstruction_loss,
)
from kvferry.codec.centroid_plain import Labels
from kvferry.codec.lab.forward import Done, logits, prefill
from kvferry.codec.lab.machine import machine
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import page_ropes
from kvferry.codec.mlx.weighted_attention import Attention, replaced_attention
from kvferry.errors import ConfigError, ModelError

RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0)


def measure(
    loaded: LoadedModel,
    tokens: Sequence[int],
    context: int,
    *,
    codec: CentroidCodec | None = None,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    done: Done | None = None,
) -> dict[str, Any]:
    """Losses of ``centroid`` at several ratios, with the model's own queries.

    Args:
        tokens: a context and what follows it; the queries are those of what follows.
        codec: its settings; ``ratios`` take the place of its ratio.
        seed: of the control, which merges groups of the same sizes.
        done: called with numbers of tokens run, ``len(tokens)`` in all.
    Returns: ``points``, one for each ratio, each with means over all heads: ``entries``
        per head, and for "centroid" and "random" ``key_loss`` and ``value_loss`` (share of
        squared length), ``energy_loss`` (nats) and ``attention_loss`` (share of the squared
        length of what attention returns).
    Raises: ModelError: a cache that is not rows of keys and values.
    """
    model: Any = loaded.model
    if not 0 < context < len(tokens):
        raise ConfigError("context", context, f"1 to {len(tokens) - 1} tokens")
    shape = describe(model, loaded.config)
    if set(shape.streams) != {"k", "v"}:
        raise ModelError("centroid takes models whose caches are rows of keys and values")
    cache = make_prompt_cache(model)
    prefill(model, tokens[:context], cache, done)
    ropes = partial(page_ropes, model, shape.page_layers)
    page = adapters.snapshot(cache, context, ropes=ropes).page((0, shape.layers), (0, context))
    with recorded_queries(model) as queries:
        logits(model, tokens[context:], cache)
    if done is not None:
        done(len(tokens) - context)
    if len(queries) != shape.layers:
        raise ModelError(f"{len(queries)} attentions of {shape.layers} layers were seen")
    asked = _by_kv_head(queries, shape.kv_heads)
    points = []
    for ratio in ratios:
        how = dataclasses.replace(codec or CentroidCodec(), ratio=ratio).with_ropes(ropes())
        labels = how.labels(page)
        chance = random_merging(labels, how.merging(page), seed)
        points.append(
            {
                "ratio": ratio,
                "entries": float((labels == np.arange(context)).sum(axis=1).mean()),
                "centroid": _losses(how, page, labels, asked),
                "random": _losses(how, page, chance, asked),
            }
        )
    return {
        "model": loaded.name,
        "context_tokens": context,
        "query_tokens": len(tokens) - context,
        "seed": seed,
        "points": points,
        "machine": machine(),
    }


@contextmanager
def recorded_queries(model: Any) -> Iterator[list[mx.array]]:
    """Within it, each attention of ``model`` adds its queries times its scale.

    Each is (1, heads, tokens, dim).
    """
    seen: list[mx.array] = []

    def wrap(plain: Attention) -> Attention:
        def attention(queries: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            seen.append(queries * kwargs["scale"])
            return plain(queries, *args, **kwargs)

        return attention

    with replaced_attention(model, wrap):
        yield seen


def _by_kv_head(queries: Sequence[mx.array], kv_heads: int) -> FloatArray:
    """(layers x KV heads, queries of all heads that share it, dim)."""
    host = np.stack([np.array(q.astype(mx.float32))[0] for q in queries])
    layers, _, _, dim = host.shape
    return host.reshape(layers * kv_heads, -1, dim)


def _losses(
    codec: CentroidCodec, page: PageTensors, labels: Labels, queries: FloatArray
) -> dict[str, float]:
    found = codec.entries(page, labels)
    assert found.kept is not None  # noqa: S101
    assert found.kept.weights is not None  # noqa: S101
    weights = found.kept.weights.reshape(len(labels), -1)
    (k, v), (keys, values) = (
        [_rows(p.streams[name].float32()) for name in ("k", "v")] for p in (page, found)
    )
    per_head = {
        "key_loss": reconstruction_loss(codec.unrotated(page), labels),
        "value_loss": reconstruction_loss(v, labels),
        "energy_loss": energy_loss(queries, k, keys, weights, 1.0),
        "attention_loss": attention_loss(queries, (k, v), (keys, values), weights, 1.0),
    }
    return {name: float(loss.mean()) for name, loss in per_head.items()}


def _rows(data: FloatArray) -> FloatArray:
    return data.reshape(-1, *data.shape[2:])
