"""A cache that a model is using, with tokens dropped between one turn and the next."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from mlx_lm.models.cache import KVCache

from kvferry.codec.base import Codec, NoCalibrations, PageTensors
from kvferry.codec.kept import Kept
from kvferry.codec.lab.coding import decode_pages, encode_page, page_meta
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.gapped_cache import GappedKVCache
from kvferry.codec.mlx.gaps import Ropes
from kvferry.codec.mlx.leaves import leaves, rows_adapter, state_adapter
from kvferry.codec.mlx.refill import restore
from kvferry.codec.unrotating import told_ropes
from kvferry.errors import ModelError

_MODEL = bytes(32)


def compress_live(
    cache: Sequence[Any], codec: Codec, ropes: Ropes | None = None, *, latent: bool = False
) -> list[Any]:
    """A cache that the model goes on from, which has been through ``codec``.

    To be called between turns, as often as one likes: what an earlier call dropped stays
    dropped, and the codec chooses among what is left. Rings and recurrent states are
    taken over as they are.

    Args:
        cache: of a whole model, as it or an earlier call left it; not changed.
        codec: without calibration, as "streaming" and "random".
        ropes: gives each page layer's `RopeSpec`, as ``partial(page_ropes, model,
            describe(model, config).page_layers)``; needed for contiguous positions.
        latent: whether rows are MLA's.
    Returns: plain `KVCache` objects, or `GappedKVCache` where positions stay; caches of
        weighted entries are run within `weighted_attention`.
    Raises: ModelError: layers of another kind than `KVCache`; CodecError.
    """
    rows = [layer for layer in cache if _holds_rows(layer)]
    if not rows or not rows[0].offset:
        return copy.deepcopy(list(cache))
    page = live_page(rows, latent=latent)
    heads = page.heads[1]
    told = told_ropes(codec, ropes, slice(None))
    blob = encode_page(told, page, page_meta(_MODEL, 0, len(rows), heads))
    (found,) = decode_pages([blob], _MODEL, NoCalibrations())
    rings = [leaf for layer in cache for leaf in leaves(layer) if not _holds_rows(layer)]
    moved = found.kept is not None and found.kept.contiguous
    if moved and any(state_adapter(leaf).length(leaf) is not None for leaf in rings):
        raise ModelError("a cache with rings cannot go on at another position: keep the original")
    made: list[Any] = [KVCache() for _ in rows]  # type: ignore[no-untyped-call]
    restore(made, [found], ropes=ropes)
    fresh = iter(made)
    return [next(fresh) if _holds_rows(layer) else copy.deepcopy(layer) for layer in cache]


def live_page(rows: Sequence[Any], *, latent: bool = False) -> PageTensors:
    """All that live caches hold, and which tokens those are.

    Args:
        rows: `KVCache` or `GappedKVCache` of each page layer.
    Raises: ModelError: layers that do not agree.
    """
    held = {(type(layer), layer.offset, getattr(layer, "entries", 0)) for layer in rows}
    if len(held) != 1:
        raise ModelError("layers of one cache hold different tokens")
    offset = int(rows[0].offset)
    if not isinstance(rows[0], GappedKVCache):
        return adapters.snapshot(rows, offset, latent=latent).page((0, len(rows)), (0, offset))
    entries = rows[0].entries
    plain = [_as_plain(layer) for layer in rows]
    span = (0, len(rows))
    page = adapters.snapshot(plain, entries, latent=latent).page(span, (0, entries))
    kept = _kept(rows, page.heads[1])
    if kept.weights is not None:  # entries side by side stand for more tokens than positions
        offset = max(offset, math.ceil(kept.weights.sum(axis=-1).max()))
    return PageTensors(span, page.heads, (0, offset), page.streams, kept)


def _holds_rows(layer: Any) -> bool:
    if isinstance(layer, GappedKVCache):
        return True
    if any(rows_adapter(leaf) is not None for leaf in leaves(layer)):
        if type(layer).__name__ != "KVCache":
            raise ModelError(f"a {type(layer).__name__} cannot lose tokens: only KVCache can")
        return True
    return False


def _as_plain(layer: GappedKVCache) -> KVCache:
    plain = KVCache()  # type: ignore[no-untyped-call]
    plain.keys, plain.values, plain.offset = layer.keys, layer.values, layer.entries
    return plain


def _kept(rows: Sequence[GappedKVCache], heads: int) -> Kept:
    every = [layer.positions for layer in rows]
    weights = [layer.weights() for layer in rows]
    if all(p.ndim == 1 and np.array_equal(p, every[0]) for p in every) and weights[0] is None:
        return Kept(every[0])
    wide = [np.broadcast_to(p, (heads, rows[0].entries)) for p in every]
    kept = Kept(np.stack(wide))
    held = [w for w in weights if w is not None]
    return replace(kept, weights=np.stack(held).astype(np.float32)) if held else kept
