"""Attentions without a rope module: whether they rotate their keys in some way of their own.

Two equal inputs at two positions are run through the live attention. Keys that are cached
alike were not rotated: NoPE layers, and models that add positions to their embeddings.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

_TOLERANCE = 1e-5


class Unrotated:
    """Asked once for each class of attention.

    Args:
        model: whose layers these are.
    """

    def __init__(self, model: Any) -> None:
        self._width = _width(model)
        self._known: dict[type[Any], bool] = {}

    def __call__(self, attention: Any) -> bool:
        """Whether its keys are cached as they are; False also where that cannot be told."""
        kind = type(attention)
        if kind not in self._known:
            try:
                self._known[kind] = self._same_keys(attention)
            except Exception:  # attentions of other calls fail in as many ways as there are
                self._known[kind] = False
        return self._known[kind]

    def _same_keys(self, attention: Any) -> bool:
        values = np.random.default_rng(0).standard_normal((1, 1, self._width))
        # Some way along: small positions rotate by little.
        same = mx.array(np.repeat(values, 64, axis=1).astype(np.float32))
        cache: Any = KVCache()  # type: ignore[no-untyped-call]
        attention(same, mask=None, cache=cache)
        held = [a[0, :, :64].astype(mx.float32) for a in (cache.keys, cache.values)]
        mx.eval(held)  # and nothing behind it: other ranks need not take part
        found = [np.array(array) for array in held if array.size]
        peaks = [float(np.abs(array).max()) for array in found]
        return min(peaks) > 0 and all(
            float(np.abs(array - array[:, :1]).max()) <= _TOLERANCE * peak
            for array, peak in zip(found, peaks, strict=True)
        )


def _width(model: Any) -> int:
    args = getattr(model, "args", None)
    for name in ("hidden_size", "n_embd", "d_model"):
        if isinstance(width := getattr(args, name, None), int):
            return width
    return 0
